"""Plans of ready configurations over simulated ranks, the search, and the tool."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_patch.config.parsing import parse
from megatron_patch.config.resolve import load_config
from megatron_patch.model.flops import parameter_count
from megatron_patch.planning.hardware import DEVICES
from megatron_patch.planning.layout import layout_of
from megatron_patch.planning.plan import make_plan
from megatron_patch.planning.search import search
from megatron_patch.planning.sensitivity import sensitivity
from megatron_patch.training.pretrain import main, make_engine_config

ROOT = Path(__file__).parent.parent.parent
SMALL = "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --vocab-size 2048 --seq-length 512 --global-batch-tokens 64k --lr 1e-3"
SMALL += " --train-tokens 100M --patch-size 4 --patch-fraction 0.5 --bf16"


def plan(*words, ranks=8, device="H100"):
    run = load_config([*words, "--dry-run", "--world-size", str(ranks)], 1)
    return make_plan(run.shape, run.plan, layout_of(run, make_engine_config(run)), DEVICES[device], run.options.stages.seq_length)


@pytest.mark.parametrize(("name", "billions", "layers"), [("llama_70b", 70.55, 80), ("llama_405b", 405.85, 126)])
def test_large_models_resolve_over_a_thousand_simulated_ranks(name, billions, layers):
    found = plan("--config", f"examples/configs/{name}.yaml", ranks=1024)
    assert parameter_count(found.shape).total / 1e9 == pytest.approx(billions, abs=0.01)
    assert found.fits and sum(part.ranks for part in found.parts) == 1024
    held = [layer for part in found.parts for layer in part.layers]
    assert held == list(range(layers + 2))
    whole = sum(part.parameters for part in found.parts) * found.layout.tensor
    # Norms are replicated on the tensor parallel ranks.
    assert parameter_count(found.shape).total < whole < 1.001 * parameter_count(found.shape).total


def test_a_dry_run_prints_parameters_and_memory_of_each_rank(capsys):
    assert main(["--config", "examples/configs/llama_70b.yaml", "--dry-run", "--world-size", "1024"]) == 0
    text = capsys.readouterr().out
    assert "TP8 SP PP8 DP16 ZeRO 1" in text and "embedding, blocks 0-10" in text and "norm and head" in text
    assert f"{plan('--config', 'examples/configs/llama_70b.yaml', ranks=1024).parts[0].parameters:,}" in text


def test_the_cost_of_the_run_is_that_of_its_stages():
    found = plan(*SMALL.split())
    assert found.run.flops / found.token_level.flops == pytest.approx(1 / 8 + 1 / 2, rel=0.01)
    assert found.equal_cost.tokens == pytest.approx(found.run.tokens * (1 / 8 + 1 / 2), rel=0.01)
    assert found.run.device_hours == pytest.approx(8 * sum(stage.seconds for stage in found.stages) / 3600)
    assert found.run.dollars == found.run.device_hours * DEVICES["H100"].dollars_per_hour
    assert found.equal_cost.device_hours == pytest.approx(found.run.device_hours, rel=0.1)


def test_sensitivity_is_the_papers_formula():
    for point in sensitivity(plan(*SMALL.split()), (4,), (0.0, 0.5, 0.8)):
        assert point.cost == pytest.approx(point.fraction / 4 + 1 - point.fraction)
    rows = sensitivity(plan(*SMALL.split()), (2, 8), (0.5,))
    assert rows[0].hours > rows[1].hours


def test_search_lists_the_layouts_that_fit_fastest_first():
    parsed = parse(["--config", "examples/configs/llama_70b.yaml", "--dry-run"])
    found, tried = search(parsed, 64, DEVICES["H200"])
    assert 0 < len(found) < tried and all(one.plan.fits for one in found)
    assert [one.seconds_per_token for one in found] == sorted(one.seconds_per_token for one in found)
    first = found[0]
    words = "--no-sequence-parallel --recompute-granularity none --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1"
    words = f"--config examples/configs/llama_70b.yaml {words} {first.choice.flags()}"
    again = plan(*words.split(), ranks=64, device="H200")
    assert again.run == first.plan.run, "the flags that are shown ask for the layout that was found"


def tool(*words, code=0):
    done = subprocess.run([sys.executable, "tools/plan.py", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_the_tool_prints_json_and_draws(tmp_path):
    words = [*SMALL.split(), "--simulate", "--plot", str(tmp_path / "s.png"), "--json", "--preemptions-per-day", "3"]
    result = json.loads(tool(*words))
    assert result["counted"]["ranks"][0]["parameters"] == plan(*SMALL.split()).parts[0].parameters
    assert not set(result["counted"]) & set(result["estimated"]) - {"ranks", "stages"} and 0 < result["simulated"]["goodput"] <= 1
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"


def test_errors_have_three_parts():
    for words, what in (
        ([*SMALL.split(), "--gpu", "K80"], "--gpu K80"),
        ([*SMALL.split(), "--world-sice", "8"], "did you mean --world-size"),
        (["--world-size", "0"], "--world-size 0"),
        ([*SMALL.split(), "--search", "--plot", "x.png"], "--search with --plot"),
        ([*SMALL.split(), "--simulate", "--device-hours-per-failure", "0.01"], "of the time for training"),
    ):
        error = tool(*words, code=2)
        assert what in error and "Allowed: " in error and "Traceback" not in error
