"""Requests to stop, by real signals to real processes: the run saves, exits with code 75, and resumes bit for bit."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.checkpoint import commit as files
from megatron_patch.checkpoint.lock import LOCK
from megatron_patch.config.options import SafetyOptions
from megatron_patch.engine import deepspeed_engine
from megatron_patch.errors import ConfigError
from megatron_patch.training.faults.stop_requests import StopRequests, _stop_time
from megatron_patch.utils.units import format_duration, parse_duration
from tests.distributed.ranks import start_ranks
from tests.distributed.runs import DATA, MODEL, Run, command, start_process, start_program, train

PLAN = "--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --patch-size 4 --train-tokens 15360 --lr 3e-3 --eval-interval 4"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, corpus):
    return train(tmp_path_factory.mktemp("unbroken") / "run", 2, PLAN, "--zero-stage 1 --data-path", corpus)


def _in_a_job(argv, seconds):
    os.environ["SLURM_JOB_END_TIME"] = str(int(time.time()) + seconds)
    return start_program(argv)


def start(folder, corpus, *more, main=start_program):
    argv = command(MODEL, DATA, PLAN, "--zero-stage 1 --data-path", corpus, *more, ["--save", str(folder)])
    return start_ranks(main, 2, folder.parent / f"{folder.name}-logs", argv)


def finish(processes, results, timeout=120):
    codes = {}
    try:
        for _ in processes:
            rank, ok, value = results.get(timeout=timeout)
            assert ok, value
            codes[rank] = int(value)
        for process in processes:
            process.join(timeout=30)
    finally:
        for process in processes:
            process.kill()
    return codes


def wait_for_steps(folder, steps):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        path = folder / "metrics.jsonl"
        if path.exists() and path.read_text().count('"type": "step"') >= steps:
            return
        time.sleep(0.02)
    raise AssertionError("no steps")


def test_a_signal_to_any_rank_stops_all_and_nothing_is_lost(tmp_path, corpus, unbroken):
    """One start after another, each stopped by another signal at another rank and moment; together they are one run."""
    folder, draw, done = tmp_path / "run", random.Random(1), 0
    for victim, sent in [(1, signal.SIGTERM), (0, signal.SIGUSR1), (1, signal.SIGUSR2), (0, signal.SIGINT)]:
        processes, results = start(folder, corpus)
        wait_for_steps(folder, done + 2)
        time.sleep(draw.random() * 0.2)
        os.kill(processes[victim].pid, sent)
        assert set(finish(processes, results).values()) == {75}
        end = Run(folder).records("end")[-1]
        assert end["reason"] == sent.name
        done = end["step"]
        assert (folder / "latest").read_text().strip() == f"step-{end['step']:08d}"
        log = "".join(path.read_text() for path in (tmp_path / "run-logs").glob("*.log"))
        assert "exit code 75" in log and "the same command resumes" in log
    resumed = train(folder, 2, PLAN, "--zero-stage 1 --data-path", corpus)
    assert resumed.losses == unbroken.losses


def test_a_signal_before_the_first_step_stops_at_once(tmp_path, corpus):
    log = tmp_path / "log"
    process = start_process(PLAN, "--data-path", corpus, ["--save", str(tmp_path / "run")], log=log)
    while b"SigCgt" not in (status := Path(f"/proc/{process.pid}/status").read_bytes()) or not (
        int(status.split(b"SigCgt:")[1].split()[0], 16) >> (signal.SIGUSR1 - 1) & 1
    ):
        time.sleep(0.002)
        assert process.poll() is None, log.read_text()
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 75, log.read_text()
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or len(Run(tmp_path / "run").losses) <= 1


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stop_ends_the_wait_for_the_lock_of_another_job(tmp_path, corpus, victim):
    """Nothing is trained, and the other job's lock stays; its time is in the future, so that its age says nothing."""
    folder, content = tmp_path / "run", json.dumps({"pid": 1, "machine": "another", "host": "far"})
    folder.mkdir()
    (folder / LOCK).write_text(content)
    os.utime(folder / LOCK, (time.time() + 10**6,) * 2)
    processes, results = start(folder, corpus)
    deadline, log = time.monotonic() + 120, tmp_path / "run-logs" / "rank-0.log"
    while not log.exists() or "is taken over in" not in log.read_text():
        assert time.monotonic() < deadline and all(process.is_alive() for process in processes), log.read_text()
        time.sleep(0.02)
    os.kill(processes[victim].pid, signal.SIGTERM)
    assert finish(processes, results, timeout=25) == {0: 75, 1: 75}
    text = log.read_text()
    assert "process 1 on far, last touched 11 d 13 h in the future" in text and "SIGTERM" in text and "exit code 75" in text
    assert os.listdir(folder) == [LOCK] and (folder / LOCK).read_text() == content


def test_a_stop_does_not_wait_for_an_evaluation_to_end(tmp_path, corpus):
    """A long evaluation is abandoned; the checkpoint holds the step before it."""
    folder, log = tmp_path / "run", tmp_path / "log"
    words = "--split 50,50,0 --eval-tokens 100M --eval-interval 3 --micro-batch-size 1"
    process = start_process(PLAN, words, "--data-path", corpus, ["--save", str(folder)], log=log)
    wait_for_steps(folder, 3)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75, log.read_text()
    assert (folder / "latest").read_text().strip() == "step-00000003" and not Run(folder).records("evaluation")


def _signal_at(argv, step, in_evaluation):
    """Runs a rank that gets a signal at the end of a step, before its evaluation, or in the evaluation."""
    from megatron_patch.training import trainer

    losses, account = trainer.held_out_losses, trainer.Trainer._account

    def signal_in_evaluation(engine, data, stage, seq_length, tokens, stop_reason):
        if int(os.environ["RANK"]) == 0 and current[-1] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(engine, data, stage, seq_length, tokens, stop_reason)

    current = [0]

    def note(self, *args):
        account(self, *args)
        current.append(self.step)
        if self.step == step and not in_evaluation and self.grid.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.held_out_losses, trainer.Trainer._account = signal_in_evaluation, note
    return start_program(argv)


@pytest.mark.parametrize("in_evaluation", [False, True])
@pytest.mark.parametrize("last", [False, True], ids=["before the switch", "at the end of the run"])
def test_the_evaluation_of_a_stage_end_is_made_after_a_stop(tmp_path, corpus, unbroken, last, in_evaluation):
    ends = [record["step"] for record in unbroken.records("switch")] + [len(unbroken.losses)]
    folder, step = tmp_path / "run", ends[last]
    processes, results = start(folder, corpus, main=functools.partial(_signal_at, step=step, in_evaluation=in_evaluation))
    assert set(finish(processes, results).values()) == {75}
    stopped = Run(folder)
    assert len(stopped.losses) == step and step not in [record["step"] for record in stopped.records("evaluation")]
    resumed = train(folder, 2, PLAN, "--zero-stage 1 --data-path", corpus)
    assert resumed.losses == unbroken.losses
    for run in (resumed, unbroken):
        order = [(record["type"], record["step"]) for record in run.records("evaluation") + run.records("switch")]
        assert len(order) == len(set(order))
    expected = [(record["step"], record["token_loss"]) for record in unbroken.records("evaluation")]
    assert [(record["step"], record["token_loss"]) for record in resumed.records("evaluation")] == expected


def _on_a_slow_disk(argv):
    """Checkpoints take so long that a signal arrives in the middle."""
    write = deepspeed_engine.write_fragments

    def slow(*args):
        time.sleep(1.0)
        return write(*args)

    deepspeed_engine.write_fragments = slow
    return start_program(argv)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stop_during_an_asynchronous_save_commits_both_checkpoints(tmp_path, corpus, unbroken, victim):
    """The checkpoint that is being written when the signal arrives is committed, and then the one of the last step."""
    folder = tmp_path / "run"
    processes, results = start(folder, corpus, "--async-save --save-interval 5", main=_on_a_slow_disk)
    deadline = time.monotonic() + 120
    while not (partial := list(folder.glob(".partial*"))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(processes[victim].pid, signal.SIGTERM)
    assert partial[0].exists(), "still being written when the signal is sent"
    assert set(finish(processes, results).values()) == {75}
    end = Run(folder).records("end")[-1]
    assert end["reason"] == "SIGTERM" and not list(folder.glob(".partial*"))
    found = files.list_checkpoints(folder)
    assert [files.step_of(path) for path in found] == [end["step"], 5] and end["step"] > 5
    assert [files.verify(path) for path in found] == [[], []]
    assert train(folder, 2, PLAN, "--zero-stage 1 --data-path", corpus).losses == unbroken.losses


def _compiling(argv, caches):
    """The program with the compiler, which other tests disable, and an empty cache."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(caches / os.environ["RANK"])
    os.environ.pop("TORCHDYNAMO_DISABLE")
    return start_program(argv)


def descendants(pid):
    """Returns the ids of all descendants of a process."""
    children = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children += [int(word) for word in path.read_text().split()]
    return children + [below for child in children for below in descendants(child)]


@pytest.mark.parametrize("to_all", [pytest.param(False, marks=pytest.mark.slow, id="to the rank"), pytest.param(True, id="to all")])
def test_a_stop_during_compilation(tmp_path, corpus, to_all):
    """A signal in the middle of compilation; Slurm sends it also to the compilers, which end at once."""
    folder, caches = tmp_path / "run", tmp_path / "caches"
    processes, results = start(folder, corpus, "--compile", main=functools.partial(_compiling, caches=caches))
    deadline = time.monotonic() + 120
    while not (below := descendants(processes[1].pid)):
        assert time.monotonic() < deadline and processes[1].is_alive()
        time.sleep(0.005)
    os.kill(processes[1].pid, signal.SIGTERM)
    for pid in below if to_all else []:
        with contextlib.suppress(ProcessLookupError):  # a compiler may be done by now
            os.kill(pid, signal.SIGTERM)
    assert set(finish(processes, results).values()) == {75}
    log = "".join(path.read_text() for path in (tmp_path / "run-logs").glob("*.log"))
    assert "exit code 75" in log and "the same command resumes" in log
    assert len(Run(folder).losses) <= 2


@pytest.mark.parametrize("kind", ["duration", "file", "slurm"])
def test_durations_and_files_stop_a_run(tmp_path, corpus, kind):
    folder = tmp_path / "run"
    words = {"duration": ["--exit-duration", "2s"], "file": ["--kill-switch", str(tmp_path / "stop")], "slurm": ["--exit-margin", "100s"]}
    main = functools.partial(_in_a_job, seconds=104) if kind == "slurm" else start_program
    processes, results = start(folder, corpus, "--train-tokens 3M", words[kind], main=main)
    if kind == "file":
        wait_for_steps(folder, 3)
        (tmp_path / "stop").touch()
    assert set(finish(processes, results).values()) == {75}
    reason = Run(folder).records("end")[-1]["reason"]
    assert reason == {"duration": "--exit-duration", "file": "the kill switch", "slurm": "the end of the Slurm job is near"}[kind]
    assert (folder / "latest").read_text().strip() == f"step-{len(Run(folder).losses):08d}"


def test_events_are_in_order(unbroken):
    kinds = [json.loads(line)["type"] for line in (unbroken.folder / "events.jsonl").read_text().splitlines()]
    assert kinds[0] == "start" and kinds[-1] == "end" and "switch" in kinds and "save" in kinds


@pytest.mark.parametrize(
    ("minutes", "margin", "left"), [(60, 300, 300), (8, 300, 240), (2, 300, 60)], ids=["long", "short", "shorter than the margin"]
)
def test_a_short_job_trains_for_half_of_its_time(minutes, margin, left):
    """Stopped at once at each start, it would be requeued forever."""
    begin = 1_000_000
    environment = {"SLURM_JOB_START_TIME": str(begin), "SLURM_JOB_END_TIME": str(begin + 60 * minutes)}
    assert _stop_time(margin, environment) == begin + 60 * minutes - left
    assert _stop_time(margin, {"SLURM_JOB_END_TIME": "1000"}) == 1000 - margin and _stop_time(margin, {}) is None


def test_a_second_interrupt_raises_at_once():
    before = signal.getsignal(signal.SIGINT)
    stops = StopRequests(SafetyOptions())
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert stops.local_request() == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stops.close()
    assert signal.getsignal(signal.SIGINT) is before


@given(st.integers(0, 20), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_time_spans_as_people_write_them(days, hours, minutes, seconds):
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    assert parse_duration(f"{days}d{hours}h{minutes}min{seconds}s") == parse_duration(f"{days} d {hours} h {minutes}m {seconds}") == total
    assert parse_duration(total) == parse_duration(str(total)) == total
    if total >= 60:
        assert abs(parse_duration(format_duration(total)) - total) < 3600


@pytest.mark.parametrize("text", ["", " ", "h", "3x", "-1s", "1h-3", "3 h 5 q"])
def test_what_is_no_time_span(text):
    with pytest.raises(ConfigError, match="not a duration"):
        parse_duration(text)
