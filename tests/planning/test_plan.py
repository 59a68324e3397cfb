"""Plans of ready configurations over simulated ranks, the search, and the tool."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megatron_patch.cli.command_line import run_tool
from megatron_patch.cli.plan import main as plan_main
from megatron_patch.config.parsing import parse
from megatron_patch.config.resolve import load_config
from megatron_patch.errors import ConfigError
from megatron_patch.exit_codes import ExitCode
from megatron_patch.model.flops import parameter_count
from megatron_patch.planning.hardware import DEVICES, load_hardware
from megatron_patch.planning.hidden_matrices import matrix_step
from megatron_patch.planning.layout import layout_of
from megatron_patch.planning.plan import make_plan
from megatron_patch.planning.search import search
from megatron_patch.planning.sensitivity import plot_sensitivity, sensitivity
from megatron_patch.planning.tables import print_search, print_tables
from megatron_patch.training.pretrain import main, make_engine_config
from tests.programs import run_program

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
    assert "TP8 SP PP4 DP32 ZeRO 1" in text and "embedding, blocks 0-20" in text and "norm and head" in text
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
    result = search(parsed, 64, DEVICES["H200"])
    found = result.candidates
    assert 0 < len(found) < result.tried and all(one.plan.fits for one in found)
    assert [one.seconds_per_token for one in found] == sorted(one.seconds_per_token for one in found)
    first = found[0]
    words = f"--config examples/configs/llama_70b.yaml {first.flags}"
    again = plan(*words.split(), ranks=64, device="H200")
    assert again.run == first.plan.run, "the flags that are shown ask for the layout that was found"


def tool(*words, code=0):
    done = run_program("tools/plan.py", *words, cwd=ROOT)
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


BIG = ["--config", "examples/configs/llama_405b.yaml", "--pipeline-model-parallel-size", "4", "--world-size", "1024"]


def run(*words, capsys, monkeypatch):
    """Returns (exit code, standard output, standard error) of the tool, in this process."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["plan.py", *words])
    code = run_tool(plan_main)
    return code, *capsys.readouterr()


def test_a_plan_that_does_not_fit_is_printed_and_ends_with_its_own_code(capsys, monkeypatch):
    code, text, error = run(*BIG, capsys=capsys, monkeypatch=monkeypatch)
    assert code == ExitCode.DOES_NOT_FIT == 7
    for part in ("Per rank:", "Stages on this hardware", "Budget at", "it does not fit into the 77.1 GiB"):
        assert part in text
    assert error.startswith("DoesNotFitError: ranks of pipeline rank 0 need about ")
    assert "more than the 77.1 GiB that are usable on one H100 of 79.6 GiB" in error
    assert "Allowed: plans of at most 77.1 GiB a rank" in error and "What to do: give --search" in error
    code, text, error = run(*BIG, "--json", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 7 and json.loads(text)["estimated"]["fits"] is False and "DoesNotFitError" in error
    code, text, error = run(*SMALL.split(), "--json", capsys=capsys, monkeypatch=monkeypatch)
    assert (code, error) == (0, "") and json.loads(text)["estimated"]["fits"] is True


def test_a_search_without_a_layout_that_fits_names_the_smallest(capsys, monkeypatch):
    words = ["--config", "examples/configs/llama_70b.yaml", "--gpu", "A100", "--world-size", "8", "--search"]
    code, text, error = run(*words, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 7 and "0 layouts fit" in text
    assert error.startswith("DoesNotFitError: no layout fits: the smallest, ") and "needs about" in error and "give more devices" in error
    code, text, _ = run(*words, "--json", capsys=capsys, monkeypatch=monkeypatch)
    assert (code, json.loads(text)) == (7, [])


def test_one_rank_needs_and_ranks_need(capsys, monkeypatch):
    words = ["--config", "examples/configs/llama_405b.yaml", "--tensor-model-parallel-size", "8", "--pipeline-model-parallel-size", "1"]
    code, text, error = run(*words, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 7 and "14,357 s" in text and "--search to list the layouts that fit, or more devices with" in error
    assert error.startswith("DoesNotFitError: each rank needs about 901.4 GiB in stage patch, more than ")


def test_a_plan_says_that_full_micro_batches_change_the_batch(capsys, monkeypatch):
    words = ["--config", "examples/configs/llama_370m.yaml", "--world-size", "13"]
    _, text, _ = run(*words, capsys=capsys, monkeypatch=monkeypatch)
    assert "Note a step at K = 1 has 1,703,936 tokens instead of --global-batch-tokens 2,000,000" in text


def test_more_devices_do_not_mend_a_batch_that_is_too_small_for_them(capsys, monkeypatch):
    words = ["--config", "examples/configs/llama_370m.yaml", "--world-size", "1000000", "--search"]
    words += ["--lr-warmup-steps", "None", "--lr-warmup-tokens", "4B"]  # so few steps of such a batch are no warm-up of 2,000
    code, _, error = run(*words, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 7 and "no layout keeps the global batch" in error and "more devices" not in error
    assert "What to do: give another number of devices with --world-size, or a larger --global-batch-tokens" in error


def test_infinite_figures_are_refused(tmp_path):
    (tmp_path / "mine.json").write_text('{"peak_tflops": 1e400}')
    with pytest.raises(ConfigError, match="peak_tflops is inf"):
        load_hardware("H100", tmp_path / "mine.json")


@pytest.mark.parametrize("name", ["cost.xyz", "cost", "folder"])
def test_a_plot_is_written_where_its_flag_says(tmp_path, name):
    """matplotlib would write `cost.png` for `cost`, and end with a traceback for `cost.xyz`."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=f"cannot write .*{name}: its name does not end in .png, "):
        plot_sensitivity(plan(*SMALL.split()), tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_a_dry_run_knows_no_device_and_ends_with_zero(capsys):
    assert main([*BIG, "--dry-run"]) == 0


def test_a_search_leaves_out_layouts_that_would_change_the_batch():
    parsed = parse([*SMALL.replace("64k", "4k").split(), "--dry-run"])
    found = search(parsed, 8, DEVICES["H100"])
    assert found.other_batch > 0
    for one in found.candidates:
        assert all(abs(stage.tokens_per_step / wanted - 1) < 0.05 for stage, wanted in zip(one.plan.plan.stages, (4096, 4096), strict=True))


@pytest.mark.parametrize(
    ("name", "gpu", "ranks"),
    [("llama_70b", "H100", 1024), ("llama_405b", "H100", 1024), ("llama_8b_128k", "H100", 64), ("llama_370m", "A100", 8)],
)
def test_shipped_configurations_are_near_the_fastest_layout_of_a_search(name, gpu, ranks):
    shipped = plan("--config", f"examples/configs/{name}.yaml", ranks=ranks, device=gpu)
    fastest = search(parse(["--config", f"examples/configs/{name}.yaml", "--dry-run"]), ranks, DEVICES[gpu]).candidates[0].plan
    assert shipped.fits and shipped.run.device_hours < 1.06 * fastest.run.device_hours


LONG = ["--config", "examples/configs/llama_8b_128k.yaml"]


def test_a_stage_with_fewer_positions_needs_fewer_ranks_for_a_sample():
    """The patch stage has a quarter of the positions and of the ranks: as many positions on a rank, and four times the data-parallel ranks."""
    found = plan(*LONG, ranks=64)
    patch, token = found.plan.stages
    assert (patch.positions, token.positions) == (32768, 131072) and (patch.context_parallel_size, token.context_parallel_size) == (4, 16)
    assert patch.rank_positions == token.rank_positions and (patch.sample_ranks(32), token.sample_ranks(32)) == (8, 2)
    assert found.layout.name() == "TP2 SP CP4/16 DP32 ZeRO 1 bf16" and found.fits
    own = plan(*LONG, "--context-parallel-size", "1", ranks=64)
    assert not own.fits and own.fullest.memory.activations > 14 * found.fullest.memory.activations
    # The cost in FLOPs is that of the stages, whoever computes them; attention has more than half of them in the token stage alone.
    assert own.run.flops == found.run.flops
    assert found.run.flops / found.token_level.flops < 0.42


def test_a_search_varies_the_context_parallel_size_of_long_samples(capsys, monkeypatch):
    result = search(parse([*LONG, "--dry-run"]), 64, DEVICES["H100"])
    assert {one.choice.context for one in result.candidates} == {1, 2, 4, 8, 16}
    for one in (result.candidates[0], next(one for one in result.candidates if one.choice.context == 4)):
        assert plan(*LONG, *one.flags.split(), ranks=64).run == one.plan.run
    short = search(parse([*SMALL.split(), "--dry-run"]), 8, DEVICES["H100"])
    assert {one.choice.context for one in short.candidates} == {1}
    code, text, _ = run(*LONG, "--gpu", "H100", "--world-size", "64", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0 and "ranks per sample" in text and "in attention" in text and "~context" in text
    assert "context" not in tool(*SMALL.split(), "--json")


def test_compiled_blocks_are_planned_faster():
    eager, compiled = plan(*SMALL.split()), plan(*SMALL.split(), "--compile")
    assert compiled.layout.name() == f"{eager.layout.name()} compiled"
    assert compiled.run.device_hours < eager.run.device_hours and compiled.fullest.memory == eager.fullest.memory


@pytest.mark.parametrize("width", [80, 200])
def test_tables_fit_into_the_terminal(width):
    found = plan("--config", "examples/configs/llama_70b.yaml", ranks=1024)
    result = search(parse(["--config", "examples/configs/llama_70b.yaml", "--dry-run"]), 64, DEVICES["H200"])
    console = Console(width=width, file=io.StringIO())
    print_tables(found, console)
    print_search(result, DEVICES["H200"], 64, console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    assert "so the run takes ~8 d 04 h" in " ".join(text.split())
    for title in ("fragmentation", "~optimizer", "~dollars", "--tensor-model-parallel-size 4"):
        assert title in text


def test_a_search_says_how_the_given_layout_compares(capsys, monkeypatch):
    words = ["--config", "examples/configs/llama_370m.yaml", "--gpu", "A100", "--search", "--recompute-granularity", "full"]
    code, text, _ = run(*words, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0 and "Given DP8 ZeRO 1 bf16 recompute full, ~" in text and "% more than the fastest" in text
    assert "1 --recompute-granularity none" in text, "the flags turn the given layout into the fastest"
    code, text, _ = run(*words[:-2], capsys=capsys, monkeypatch=monkeypatch)
    assert ", as fast as the fastest" in text and "1 as given" in text
    code, text, _ = run(*SMALL.split(), "--search", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0 and "--zero-stage 1" not in text, "ZeRO 1 is what these flags without --zero-stage mean"
    big = [*BIG[:4], "--world-size", "8", "--gpu", "B200", "--search"]
    code, text, _ = run(*big, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 7 and "Given" not in text, "8 devices cannot form the given layout"


def test_published_runs_are_printed_without_a_run(capsys, monkeypatch):
    code, text, _ = run("--published", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0 and "| torchtitan | Llama 3 8B | 8 H100 | 8,192 | 2 of 16 | data parallel | half | yes | 6,667 |" in text


def test_plans_of_adamw_have_none_of_muon_s_figures():
    adamw, muon = (json.dumps(plan(*SMALL.split(), "--optimizer", name).to_json()) for name in ("adamw", "muon"))
    for key in ("orthogonalization_seconds", "matrices_seconds", "matrices_bytes", "newton_schulz_steps", "matrices (node)"):
        assert f'"{key}"' in muon and key not in adamw


def test_muon_s_step_is_part_of_the_plan():
    adamw, muon = (plan("--config", "examples/configs/llama_70b.yaml", "--optimizer", name, ranks=1024) for name in ("adamw", "muon"))
    for before, after in zip(adamw.stages, muon.stages, strict=True):
        time = after.time
        assert (before.time.orthogonalization, before.time.matrices) == (0, 0) and time.orthogonalization > 0 < time.matrices
        added = time.optimizer - before.time.optimizer + time.orthogonalization + time.matrices
        assert time.total - before.time.total == pytest.approx(added)
    assert all(after.memory.optimizer < before.memory.optimizer for before, after in zip(adamw.parts, muon.parts, strict=True))
    assert muon.checkpoints.bytes < adamw.checkpoints.bytes
    more = plan("--config", "examples/configs/llama_70b.yaml", "--optimizer", "muon", "--muon-num-ns-steps", "10", ranks=1024)
    assert more.stages[0].time.orthogonalization == pytest.approx(2 * muon.stages[0].time.orthogonalization, rel=0.1)
    console = Console(width=80, file=io.StringIO())
    print_tables(muon, console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80 and ", muon" in text and "~Newton-Schulz" in text and "matrices" in text


def test_patch_stages_pay_more_for_muon_than_token_stages():
    """A step reads the same tokens in fewer positions, and Muon's part of it stays."""
    found = plan(*SMALL.split(), "--optimizer", "muon")
    patch, token = (stage.time for stage in found.stages)
    assert patch.orthogonalization == token.orthogonalization
    shares = [1 - part.compute / part.total for part in (patch, token)]
    assert shares[0] > shares[1]
    adamw = {(point.patch_size, point.fraction): point for point in sensitivity(plan(*SMALL.split()))}
    for point in sensitivity(found):
        other = adamw[point.patch_size, point.fraction]
        assert point.hours > other.hours and point.cost == other.cost


def test_with_muon_a_search_prefers_zero_1_to_a_given_zero_0():
    words = [*MODELS["7B"].split(), "--optimizer", "muon", "--zero-stage", "0", "--dry-run"]
    found = search(parse(words), 64, DEVICES["H200"])
    wanted = (1, 1, 1, "none")
    (same,) = (
        one for one in found.candidates if (one.choice.tensor, one.choice.pipeline, one.choice.zero_level, one.choice.recompute) == wanted
    )
    assert found.given.layout.zero_level == 0 and found.given.run.seconds > 1.02 * same.plan.run.seconds
    assert found.given.fullest.memory.optimizer > 10 * same.plan.fullest.memory.optimizer


MODELS = {
    "1B": "--num-layers 16 --hidden-size 2048 --num-attention-heads 16 --num-query-groups 8 --ffn-hidden-size 8192 --vocab-size 32000 "
    "--seq-length 4096 --global-batch-tokens 1M --micro-batch-size 4 --lr 3e-4 --train-tokens 100B --patch-size 4 --bf16",
    "7B": "--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --ffn-hidden-size 11008 --vocab-size 32000 "
    "--seq-length 4096 --global-batch-tokens 4M --micro-batch-size 1 --lr 3e-4 --train-tokens 100B --patch-size 4 --bf16",
    "70B": "--config examples/configs/llama_70b.yaml",
}
PLANNED = [
    ("1B", 8, 1),
    ("7B", 8, 1),
    ("7B", 64, 0),
    ("7B", 64, 1),
    ("7B", 64, 3),
    ("70B", 1024, 1),
]


def muon_row(model, ranks, zero):
    """Returns a row of the table of Muon in docs/planning.md."""
    words = [*MODELS[model].split(), "--zero-stage", str(zero)]
    adamw, muon = plan(*words, ranks=ranks), plan(*words, "--optimizer", "muon", ranks=ranks)
    buffers = max(matrix_step(muon.shape, muon.layout, part.layers).buffer_bytes for part in muon.parts)
    patch, token = muon.stages
    sent = {row.link: row.bytes / 1e9 for row in token.traffic if row.kind == "matrices"}
    shares = [(time.orthogonalization + time.matrices) / time.total for time in (patch.time, token.time)]
    states = [max(part.memory.optimizer for part in found.parts) / 2**30 for found in (adamw, muon)]
    cells = [model, f"{ranks:,}, {muon.layout.name().removesuffix(' bf16')}", f"{states[0]:.2f}, {states[1]:.2f}"]
    cells += [f"{buffers / 2**30:.2f}", f"{sent.get('node', 0):.2f}, {sent.get('network', 0):.2f}"]
    cells += [
        f"{1000 * token.time.orthogonalization:.1f}, {1000 * token.time.matrices:.1f}",
        " / ".join(f"{share:.1%}" for share in shares),
    ]
    return f"| {' | '.join(cells)} |"


def test_the_docs_show_what_plans_of_muon_say_now():
    text = (ROOT / "docs/planning.md").read_text()
    for case in PLANNED:
        assert (row := muon_row(*case)) in text, row
    words = [*MODELS["1B"].split(), "--optimizer", "muon", "--zero-stage", "3"]
    times = [plan(*words, ranks=ranks, device=device).stages[-1].time for device, ranks in (("B200", 8), ("H100", 1))]
    first, second = (f"{1000 * (time.optimizer + time.orthogonalization + time.matrices):.0f} ms" for time in times)
    assert f"says {first} and {second}" in " ".join(text.split())
