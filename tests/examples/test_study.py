"""Replication: configurations have the stated sizes, arms cost the same, tables follow from metrics, and a study resumes."""

from __future__ import annotations

import json
import math
import os
import signal
import textwrap
import threading
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

import megatron_patch.cli.compare_studies
import megatron_patch.cli.study
import megatron_patch.replication.study
from megatron_patch import cli
from megatron_patch.config.resolve import load_config
from megatron_patch.errors import ConfigError, DataError
from megatron_patch.model.flops import parameter_count
from megatron_patch.planning.cost import Cost
from megatron_patch.replication.arms import Arm, all_arms, patch_train, select_arms
from megatron_patch.replication.records import RunRecord, StudyHeader, StudyText, read_records, write_records
from megatron_patch.replication.results import Outcome, markdown, plot_study, read_outcome, significance, summarize, write_json
from megatron_patch.replication.routing import Routing, RoutingWindow, read_routing, routing_markdown
from megatron_patch.replication.switches import Switch, compare_switch, read_switch, switch_markdown, training_curve

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "examples" / "replicate"
SIZES = {"10b_a1b": 10.489e9, "270m": 270e6, "370m": 370e6, "600m": 600e6, "780m": 780e6, "1.3b": 1.3e9, "2.7b": 2.7e9, "3b": 3e9}
ARMS = all_arms(1e-3, 256)
MODEL = ["--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--vocab-size", "64", "--seq-length", "16", "--dry-run"]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*_*[mb].yaml")), ids=lambda path: path.stem)
def test_ready_configurations_can_be_planned_and_have_the_stated_size(path):
    run = load_config(["--config", str(path), "--dry-run", "--world-size", "8"], 8)
    wanted = next(size for name, size in sorted(SIZES.items(), key=lambda item: -len(item[0])) if path.stem.endswith(f"_{name}"))
    assert parameter_count(run.shape).total == pytest.approx(wanted, rel=0.08)
    patch, token = run.plan.stages
    if path.stem.startswith("patch_train"):
        assert (patch.patch_size, token.optimizer, token.lr_policy) == (4, "reset", "restart")
        assert patch.tokens_per_step == token.tokens_per_step and run.plan.cost() == pytest.approx(0.5, rel=2e-3)
        assert run.plan.tokens == pytest.approx(360e9, rel=1e-3)
    else:
        assert (patch.patch_size, token.optimizer, token.lr_policy) == (6, "keep", "continue")
        assert patch.positions_per_step == token.positions_per_step and run.plan.cost() == pytest.approx(0.4, rel=1e-2)


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_costs_the_budget(arm):
    budget = 4_000_000
    words = [
        *MODEL,
        "--global-batch-tokens",
        "256",
        "--lr-warmup-fraction",
        "0.02",
        *arm.flags,
        "--train-tokens",
        str(arm.train_tokens(budget)),
    ]
    run = load_config(words, 1)
    cost = Cost(run.shape, run.plan, 16)
    assert cost.total * run.plan.tokens / budget == pytest.approx(arm.cost, rel=2e-3)
    # The arms set their schedules, which must not follow the defaults for this size.
    decay, style = run.plan.stages[0].lr.wsd_decay_tokens, run.plan.stages[0].lr.style
    assert style == ("WSD" if arm.name == "token-wsd" or arm.baseline not in (None, "token") else "cosine")
    if style == "WSD":
        assert decay / budget == pytest.approx(0.5 if arm.name.endswith("-long") else 0.1, rel=2e-3)


def test_arms_include_their_baselines_and_unknown_arms_are_reported():
    assert [arm.name for arm in select_arms(["superposition-k3"], ARMS)] == ["token-wsd", "superposition-k3"]
    assert select_arms([], ARMS) == ARMS
    with pytest.raises(ConfigError, match=r"--arms patch-k5: no such arm\n.*Allowed: token, .*\n.*What to do: choose names"):
        select_arms(["patch-k5"], ARMS)
    lrs = {arm.name: json.loads(arm.flags[1])[1].get("lr") for arm in ARMS if arm.name.startswith("patch-k4")}
    assert lrs["patch-k4-lr-half"] == 5e-4 and lrs["patch-k4-lr-double"] == 2e-3 and lrs["patch-k4"] is None


def command(module):
    """Returns a command as a function of its arguments, run in this process."""
    return lambda *words: module.main([str(word) for word in words])


def outcome(arm, seed, loss):
    return Outcome(arm, seed, 200, 100.0, 10, loss, 60.0, ((50.0, loss + 0.5), (100.0, loss)))


def test_differences_are_taken_seed_by_seed():
    arms = select_arms(["patch-k4"], ARMS)
    # Seeds differ by much more than the arms do, so only the difference seed by seed shows the effect.
    runs = [outcome("token", seed, 4.0 + seed) for seed in (1, 2, 3)]
    runs += [outcome("patch-k4", seed, 4.0 + seed + shift) for seed, shift in ((1, -0.09), (2, -0.10), (3, -0.11))]
    token, patch = summarize(arms, runs, 100)
    assert token.loss == 6.0 and token.spread == 1.0 and token.difference is None and token.cost == 0.5
    assert patch.difference == pytest.approx(-0.10) and patch.error == pytest.approx(0.01 / math.sqrt(3)) and patch.pairs == 3
    assert (
        significance(patch) == "better"
        and significance(replace(patch, error=0.06)) == "not separated"
        and significance(replace(patch, difference=0.1)) == "worse"
    )
    single = summarize(arms, [run for run in runs if run.seed == 1], 100)[1]
    assert single.spread is None and single.error is None and significance(single) == "one seed"
    text = markdown([token, patch], arms, "about", "command", "x.png")
    assert "| `patch-k4` | 3 | 200 | 0.500 | 10 | 5.900 ± 0.990 | -0.100 ± 0.006 (`token`) | better | 1.0 min |" in text


def run_of(losses, budget=1000.0):
    """Returns the records of a run with steps of equal cost, (patch size, loss) each, and its switches."""
    records, each = [], budget / len(losses)
    for step, (patch_size, loss) in enumerate(losses, 1):
        if step > 1 and losses[step - 2][0] != patch_size:
            records.append({"type": "evaluation", "step": step - 1, "tokens": 7 * (step - 1), "token_loss": 5.0})
            records.append({"type": "switch", "step": step - 1, "tokens": 7 * (step - 1), "to_patch_size": patch_size})
        records.append(
            {"type": "step", "step": step, "tokens": 7 * step, "cost_tokens": each * step, "patch_size": patch_size, "loss": loss}
        )
    return records


def test_a_switch_is_described_by_its_jump_and_by_when_the_gap_closes():
    # 400 steps, the last switch after 100; the gap falls by 0.001 a step from 0.15, so it is gone 150 steps later.
    baseline = run_of([(1, 4.0)] * 400)
    arm = run_of([(4, 5.5)] * 50 + [(2, 5.2)] * 50 + [(1, 4.15 - 0.001 * step) for step in range(300)])
    switch, curve = read_switch(arm), training_curve(arm)
    assert switch == Switch(250.0, 5.0, pytest.approx(4.1455), 4.15)
    assert [number for number, _ in curve] == list(range(50, 200)) and curve[10][1] == pytest.approx(4.15 - 0.001 * 20, abs=2e-3)
    row = compare_switch("arm", "token", {1: switch, 2: switch}, {1: curve, 2: curve}, {1: training_curve(baseline)}, 1000)
    assert (row.seeds, row.at, row.before) == (1, 0.25, 5.0)
    assert dict(row.behind) == {share: pytest.approx(0.15 - 0.4 * share, abs=4e-3) for share in (0.02, 0.05, 0.2)}
    assert row.level == pytest.approx(150 / 400, abs=0.01)
    never = compare_switch("arm", "token", {1: switch}, {1: curve}, {1: training_curve(run_of([(1, 3.0)] * 400))}, 1000)
    assert never.level is None and "| never |" in switch_markdown([row, never], "x.png")
    assert compare_switch("arm", "token", {1: switch}, {1: curve}, {}, 1000) is None
    assert read_switch(baseline) is None and read_switch(arm[:101]) is None


def test_studies_are_compared_by_their_steps(tmp_path, capsys):
    arms, settings = select_arms(["patch-k4"], ARMS), {"config": {"global-batch-tokens": "1k"}}
    for name, budget, gap in (("long", 80_000, -0.05), ("short", 10_000, 0.2)):
        runs = [outcome("token", seed, 4.0 + seed) for seed in (1, 2)] + [outcome("patch-k4", seed, 4.0 + seed + gap) for seed in (1, 2)]
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "study.json", summarize(arms, runs, budget), [], runs, settings | {"budget": budget}, 1000)
    docs = tmp_path / "docs.md"
    docs.write_text("a\n<!-- comparison -->\n<!-- end of comparison -->\nb\n")
    compare = command(cli.compare_studies)
    compare(tmp_path / "long", tmp_path / "short", "--output", tmp_path / "out", "--docs", docs)
    shown = capsys.readouterr().out
    assert "| `patch-k4` | +0.200 ± 0.000 (n = 2) | -0.050 ± 0.000 (n = 2) |" in shown
    assert "lowest held-out loss of all arms** | `token`, 5.500 ± 0.707 (n = 2) | `patch-k4`, 5.450 ± 0.707 (n = 2) |" in shown
    assert (
        "1k parameters, 10k tokens (10 per parameter), 10 steps | 1k parameters, 80k tokens (80 per parameter), 80 steps |"
        in docs.read_text()
    )
    assert (tmp_path / "comparison.png").stat().st_size > 5_000
    with pytest.raises(DataError, match=r"holds no study\.json"):
        compare(tmp_path, "--output", tmp_path / "out")
    with pytest.raises(ConfigError, match="needs the lines <!-- comparison -->"):
        compare(tmp_path / "long", "--output", tmp_path / "out", "--docs", tmp_path / "out" / "comparison.md")


def test_unfinished_runs_are_left_out(tmp_path):
    lines = [
        {"type": "step", "step": 1, "tokens": 10, "cost_tokens": 5.0, "step_seconds": 2.0, "patch_size": 2, "loss": 5.0},
        {"type": "evaluation", "step": 1, "cost_tokens": 5.0, "token_loss": 4.5},
        {"type": "end", "step": 1, "reason": "done"},
    ]
    path = tmp_path / "metrics.jsonl"
    assert read_outcome(tmp_path, "token", 1) is None
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    assert read_outcome(tmp_path, "token", 1) is None
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_outcome(tmp_path, "token", 1) == Outcome("token", 1, 10, 5.0, 1, 4.5, 2.0, ((5.0, 4.5),))


def test_the_routing_of_a_run_is_read_around_its_switch(tmp_path):
    def step(number: int, load: float) -> dict:
        return {"type": "step", "step": number, "expert_load": [load, load + 2], "dead_experts": [0, 3], "router_entropy": [1.0, None]}

    steps = [step(number, 3.0) for number in range(1, 31)] + [step(31, 2.0)] + [step(number, 1.0) for number in range(32, 81)]
    switch = {"type": "switch", "step": 30, "to_patch_size": 1}
    found = read_routing([*steps[:30], switch, *steps[30:]])
    assert found == Routing(*(RoutingWindow(load, 1.5, 1.0) for load in (4.0, 3.0, 2.05, 2.0)))
    alone = read_routing(steps)
    assert alone == Routing(None, None, None, found.end)
    assert read_routing([{"type": "step", "step": 1}]) is None
    assert "| `a` | 2 | 4.00 | 3.00 | 2.05 | 2.00 | 1.5 | 1.5 | 1.000 | 1.000 |" in routing_markdown({"a": [found, alone]})
    header = StudyHeader({}, 100, 64, 1000, StudyText(1, 100, 64, "0"))
    for routing in (found, alone, None):
        write_records(tmp_path / "r.jsonl", header, [RunRecord(replace(outcome("a", 1, 3.0), routing=routing), {}, "c", "m", "2026-12-01")])
        (record,) = read_records(tmp_path / "r.jsonl")[1]
        assert record.outcome.routing == routing


def test_the_plot_takes_any_number_of_arms_and_seeds(tmp_path):
    arms = ARMS
    plot_study(tmp_path / "one.png", arms, [outcome("token", 1, 4.0)], 100, "one")
    plot_study(tmp_path / "all.png", arms, [outcome(arm.name, seed, 4.0) for arm in arms for seed in (1, 2)], 100, "all")
    assert (tmp_path / "one.png").stat().st_size > 5_000 and (tmp_path / "all.png").stat().st_size > 20_000


@pytest.fixture(scope="module")
def study():
    """The command in this process; it starts real processes."""
    return command(cli.study)


def test_a_study_resumes_without_repeating_a_run(tmp_path, study, capsys):
    text = tmp_path / "text.jsonl"
    words = [f"the {name} of the {thing} went to the {place}" for name in "abcdefgh" for thing in "klmnop" for place in "qrstuvw"]
    text.write_text("".join(json.dumps({"text": ". ".join(words[start:] + words[:start])}) + "\n" for start in range(0, 300, 12)))
    config = tmp_path / "tiny.yaml"
    config.write_text(
        "num-layers: 1\nhidden-size: 16\nnum-attention-heads: 2\nffn-hidden-size: 32\ntrain-tokens: 2048\nseq-length: 16\n"
        "micro-batch-size: 4\nglobal-batch-tokens: 128\nlr: 1e-2\n"
    )
    docs = tmp_path / "replication.md"
    docs.write_text("before\n<!-- tiny -->\nold\n<!-- end of tiny -->\nafter\n")
    common = ["--output", tmp_path / "study", "--config", config, "--vocab-size", "300", "--docs", docs]
    study("--text", text, *common, "--arms", "superposition-k2", "--seeds", "1", "--seconds", "0.1")
    none = capsys.readouterr().out
    assert (
        "$ python -m megatron_patch preprocess --input" in none
        and "2 runs not finished (--seconds has passed); run the same command again to resume" in none
        and ", seed" not in none
    )
    study("--text", text, *common, "--arms", "superposition-k2", "--seeds", "1", "--parallel", "2")
    first = capsys.readouterr().out
    assert "run 1 of 2: token-wsd, seed 1" in first and "run 2 of 2: superposition-k2, seed 1" in first
    study(*common, "--arms", "superposition-k2", "--seeds", "1")
    second = capsys.readouterr().out
    assert ", seed" not in second and "$ python" not in second and "2 runs finished" in second
    document = json.loads((tmp_path / "study" / "study.json").read_text())
    assert [row["arm"] for row in document["rows"]] == ["token-wsd", "superposition-k2"]
    final = [json.loads(line) for line in (tmp_path / "study" / "runs" / "token-wsd-seed1" / "metrics.jsonl").read_text().splitlines()]
    assert document["runs"][0]["loss"] == [record["token_loss"] for record in final if record["type"] == "evaluation"][-1]
    shown = docs.read_text()
    assert (
        shown.startswith("before\n")
        and shown.endswith("after\n")
        and "| `token-wsd` | 1 |" in shown
        and shown.count("| `superposition-k2` | 1 |") == 2
        and str(tmp_path) not in shown
    )
    assert (tmp_path / "tiny.png").is_file() and (tmp_path / "tiny_switch.png").is_file()
    with pytest.raises(ConfigError, match="holds a study with another budget"):
        study(*common, "--budget", "4k", "--status")
    # A file in place of a run's folder makes that run fail; with --keep-going the next one is still trained.
    (tmp_path / "study" / "runs" / "token-wsd-seed2").write_text("")
    with pytest.raises(DataError, match=r"-m megatron_patch.pretrain failed with exit code 4"):
        study(*common, "--arms", "superposition-k2", "--seeds", "2", "--keep-going")
    document = json.loads((tmp_path / "study" / "study.json").read_text())
    assert {(run["arm"], run["seed"]) for run in document["runs"]} == {("token-wsd", 1), ("superposition-k2", 1), ("superposition-k2", 2)}


def test_a_script_adds_an_arm(tmp_path, capsys):
    arm = patch_train("patch-k3", "patches of 3 for half of the tokens", 3, Fraction(1, 2))
    module = cli.study
    flags = ["--text", "a.txt", "--output", str(tmp_path / "study"), "--config", str(FOLDER / "study_cpu.yaml"), "--seeds", "1"]
    module.main([*flags, "--arms", "patch-k3", "--plan"], more_arms=[arm])
    shown = capsys.readouterr().out
    assert "patches of 3 for half of the tokens" in shown and "30M" in shown and "2 arms x 1 seed = 2 runs" in shown
    with pytest.raises(ConfigError, match="--arms patch-k3: no such arm"):
        module.main([*flags, "--arms", "patch-k3", "--plan"])
    with pytest.raises(ConfigError, match="two arms are named 'patch-k4'"):
        module.main([*flags, "--plan"], more_arms=[replace(arm, name="patch-k4")])
    with pytest.raises(ConfigError, match="arm 'patch-k3' has the unknown baseline 'tokens'"):
        module.main([*flags, "--plan"], more_arms=[replace(arm, baseline="tokens")])


def test_an_added_arm_is_trained_by_its_program_and_drawn_with_the_main_arms(tmp_path, monkeypatch, capsys):
    module = megatron_patch.replication.study
    arm = Arm("mine", "my launcher", 1.0, ("--optimizer", "mine"), baseline="token", program="mine.py")
    (tmp_path / "mine.py").write_text("import sys; print(sys.argv)")
    flags = ["--text", "a.txt", "--output", str(tmp_path / "study"), "--config", str(FOLDER / "study_cpu.yaml"), "--seeds", "1"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module.Study, "prepare", lambda study: None)
    text = StudyText(25, 9000, 300, "0123456789abcdef")
    monkeypatch.setattr(module.Study, "header", StudyHeader({}, 0, 300, 1000, text))
    monkeypatch.setattr(module.Study, "report", lambda study, *_: "")
    runs = [outcome(name, 1, 4.0) for name in ("token", "mine")]
    monkeypatch.setattr(module, "read_outcome", lambda folder, name, seed: next((run for run in runs if run.arm == name == "token"), None))
    monkeypatch.setattr(module.Study, "finished", lambda study: [RunRecord(run, {}, "", "", "") for run in runs])
    drawn = []
    monkeypatch.setattr(module, "plot_study", lambda *args: drawn.extend(args[-1]))
    cli.study.main([*flags, "--arms", "mine"], more_arms=[arm])
    assert "$ python mine.py --config" in capsys.readouterr().out and drawn[-1] == "mine"
    assert "'--optimizer', 'mine', '--train-tokens', '20000000'" in (tmp_path / "study" / "logs" / "mine-seed1.log").read_text()


RUN = """
    import signal, sys, time
    from pathlib import Path

    def stop(number, frame):
        time.sleep(0.3)
        Path("saved").touch()
        sys.exit(75)

    signal.signal(signal.SIGTERM, stop)
    Path("ready").touch()
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_makes_a_study_wait_for_its_runs_and_start_no_other(tmp_path, monkeypatch, capsys, number):
    module = megatron_patch.replication.study
    (tmp_path / "run.py").write_text(textwrap.dedent(RUN))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module.Study, "prepare", lambda study: None)
    monkeypatch.setattr(module.Study, "run_command", lambda study, arm, seed: ["run.py"])

    def send():
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    words = ["--text", "a.txt", "--output", tmp_path / "study", "--config", FOLDER / "study_cpu.yaml", "--arms", "token", "--seeds", "3"]
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end:
        cli.study.main([str(word) for word in words])
    sender.join()
    shown = capsys.readouterr().out
    assert end.value.code == 75 and (tmp_path / "saved").exists() and signal.getsignal(number) is before
    assert (
        shown.count("$ python run.py") == 1
        and f"3 runs not finished (stopped by {number.name}); run the same command again to resume" in shown
    )
