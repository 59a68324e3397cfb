"""The training benchmarks run without a GPU and record results at once; a run that stops or fails affects no other."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Imports a file of the benchmarks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def run(tmp_path, script, *words):
    """Runs a benchmark; returns its exit code, its figures, and its output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"FIGURES": str(tmp_path / "figures.jsonl"), "RESULTS": str(tmp_path), "STEP": "here"}
    command = [sys.executable, str(BENCHMARKS / script), *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=200)
    path = tmp_path / "figures.jsonl"
    figures = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return done.returncode, figures, done.stdout + done.stderr


def test_a_large_trace_is_shortened_to_the_limit(tmp_path, module):
    def profiled():
        profile = module("_profile").Profile(torch.device("cpu"))
        profile.start()
        for _ in range(200):
            torch.randn(8, 8) @ torch.randn(8, 8)
        profile.stop()
        return profile

    def size(limit):
        path = profiled().write_trace(tmp_path / "trace.json.gz", limit)
        return None if path is None else len(path.read_bytes())

    whole = profiled().figures()
    products = next(row for row in whole["rows"] if row["name"] == "aten::mm")
    assert products["calls"] == 200 and whole["kernel_ms"] >= sum(row["cuda_ms"] for row in whole["rows"]) * 0.999
    complete = size(1 << 30)
    assert 0 < size(complete // 2) <= complete // 2
    assert size(10) is None


def test_overlaps_are_busy_once(module):
    assert module("_profile").union([(5, 8), (0, 4), (2, 6), (10, 11)]) == 9
    assert module("_profile").union([]) == 0


def test_a_failed_run_on_text_affects_no_other(tmp_path):
    runs = tmp_path / "text" / "runs"
    runs.mkdir(parents=True)
    (runs / "patches-of-2-then-tokens").write_text("a file in the place of this run's folder")
    words = ("--tiny", "--output", tmp_path / "text", "--parallel", "3", "--patch-sizes", "4", "2")
    code, figures, output = run(tmp_path, "text_run.py", *words)
    assert code == 1 and "patches of 2, then tokens failed with exit code 4" in output, output
    runs = {figure["name"]: figure for figure in figures if figure["kind"] == "run"}
    patch, token = runs["patches of 4, then tokens"], runs["token level"]
    assert len(runs) == 2 and (patch["patch_sizes"], token["patch_sizes"]) == ([4, 1], [1])
    assert patch["cost"] == pytest.approx(token["cost"], rel=0.1) and patch["tokens"] == pytest.approx(2 * token["tokens"], rel=0.1)
    assert patch["held_out_loss"] == patch["curve"][-1][2] < patch["curve"][0][2] and len(token["curve"]) > 8
    assert {patch["ended"], token["ended"]} == {"done"}
    assert (tmp_path / "text_run.png").stat().st_size > 10_000


def test_a_stage_that_was_not_measured_is_named(module):
    missing = module("step").incomplete_reason
    patch, token = {"stage": "patch", "losses": [2.0, 1.0]}, {"stage": "token", "losses": [2.0, None]}
    assert missing(["patch", "token"], []).startswith("no stage was measured")
    assert missing(["patch", "token"], [patch]).endswith(": token")
    assert missing(["patch", "token"], [patch, token]) == "a loss is not finite: token"
    assert missing(["patch"], [patch]) is None


@pytest.mark.parametrize("script", ["text_run", "study_run"])
def test_a_missing_text_is_reported_at_once(script, module, capsys):
    with pytest.raises(SystemExit) as end:
        module(script).parse(["--text", "nowhere.txt"])
    assert end.value.code == 2 and "argument --text: 'nowhere.txt': no such file" in capsys.readouterr().err


@pytest.mark.parametrize("script, flag", [("step", "--steps"), ("study_run", "--seeds"), ("text_run", "--parallel")])
def test_counts_begin_at_one(script, flag, module, capsys):
    with pytest.raises(SystemExit) as end:
        module(script).parse([flag, "0"])
    assert end.value.code == 2 and f"argument {flag}: '0' (allowed: whole numbers from 1)" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["step", "study_run", "text_run", "attention", "documents", "kernels"])
def test_every_option_has_a_help_text(script, module, monkeypatch):
    added = []
    add = module("argparse").ArgumentParser.add_argument

    def remember(parser, *names, **options):
        added.append((names, options.get("help")))
        return add(parser, *names, **options)

    monkeypatch.setattr("argparse.ArgumentParser.add_argument", remember)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        module(script).parse()
    assert len(added) > 5 and [names for names, text in added if not text] == []


RUN = """
    import signal, sys, time
    from pathlib import Path

    def stop(number, frame):
        time.sleep(0.3)
        Path("saved").touch()
        sys.exit(75)

    signal.signal(signal.SIGTERM, signal.SIG_IGN if "--deaf" in sys.argv else stop)
    Path("ready").touch()
    time.sleep(60)
"""


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("words, code", [([], 75), (["--deaf"], -9)], ids=["saves", "deaf"])
def test_a_signal_waits_for_runs_on_text_and_starts_no_other(tmp_path, module, monkeypatch, words, code):
    text_run = module("text_run")
    (tmp_path / "pretrain_gpt_patch.py").write_text(textwrap.dedent(RUN))
    for name, value in {"ROOT": tmp_path, "GRACE_SECONDS": 0.6, "STOP_SIGNALS": [], "RUNNING": []}.items():
        monkeypatch.setattr(text_run, name, value)
    args = text_run.parse([])
    codes = []
    thread = threading.Thread(target=lambda: codes.append(text_run.run_arm(args, words, tmp_path / "log", None)))
    thread.start()
    wait_for(tmp_path / "ready")
    text_run.stop_runs(signal.SIGTERM, None)
    thread.join(timeout=30)
    assert codes == [code] and (tmp_path / "saved").exists() == (code == 75)
    assert text_run.run_arm(args, words, tmp_path / "another", None) is None and not (tmp_path / "another").exists()


STUDY = """
    import subprocess, sys
    from pathlib import Path

    child = subprocess.Popen([sys.executable, "-c", Path("run.py").read_text()])
    child.wait()
"""
SAVING_RUN = """
    import json, os, signal, sys, time
    from pathlib import Path

    def stop(number, frame):
        time.sleep(0.5)
        step = {"type": "step", "step": 1, "tokens": 7, "cost_tokens": 7.0, "patch_size": 1, "loss": 2.0, "grad_norm": 1.0}
        step |= {"step_seconds": 0.1, "tokens_per_second": 70.0}
        (Path(HOME) / "runs" / "token-seed1").mkdir(parents=True)
        (Path(HOME) / "runs" / "token-seed1" / "metrics.jsonl").write_text(json.dumps(step) + chr(10))
        sys.exit(75)

    signal.signal(signal.SIGTERM, stop)
    Path("child").write_text(str(os.getpid()))
    Path("ready").touch()
    time.sleep(60)
"""
MAIN = """
    import sys
    from pathlib import Path
    import study_run
    study_run.ROOT = Path(".").resolve()
    study_run.text_run.main = lambda words: 0
    sys.exit(study_run.main(["--output", "home"]))
"""


def is_alive(process):
    """Whether a process runs; one that nobody has waited for does not."""
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_stopped_study_leaves_no_run_behind_and_records_results_if_it_can(tmp_path, number):
    (tmp_path / "examples" / "replicate").mkdir(parents=True)
    # It ends at once, unlike its run.
    (tmp_path / "examples" / "replicate" / "study.py").write_text(textwrap.dedent(STUDY))
    (tmp_path / "run.py").write_text(textwrap.dedent(SAVING_RUN).replace("HOME", repr(str(tmp_path / "home"))))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{BENCHMARKS}", "FIGURES": str(tmp_path / "figures.jsonl")}
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(MAIN)], cwd=tmp_path, env=environment)
    wait_for(tmp_path / "ready")
    child = int((tmp_path / "child").read_text())
    assert is_alive(child)
    process.send_signal(number)
    code = process.wait(timeout=60)
    if number == signal.SIGKILL:
        deadline = time.monotonic() + 10
        while is_alive(child) and time.monotonic() < deadline:
            time.sleep(0.02)
    assert not is_alive(child)
    if number == signal.SIGTERM:
        (figure,) = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
        assert code == 143 and (figure["kind"], figure["name"], figure["seed"], figure["tokens"]) == ("run", "token", 1, 7)


def test_a_group_that_does_not_end_is_killed(module):
    study_run = module("study_run")
    leader = subprocess.Popen(
        ["bash", "-c", "trap '' TERM; sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    child = int(leader.stdout.readline())
    began = time.monotonic()
    study_run.end_group(leader, 0.3, lambda: False)
    assert leader.returncode == -signal.SIGKILL and 0.3 < time.monotonic() - began < 6
    assert not is_alive(child)
    leader.stdout.close()
