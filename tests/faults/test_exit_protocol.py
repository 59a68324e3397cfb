"""Every failed run reports once: exit code, advice and a line in events.jsonl, whichever rank fails and however many follow."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import signal
import socket

import pytest
import torch

from megatron_patch.errors import ConfigError
from megatron_patch.exit_codes import ExitCode
from megatron_patch.training.faults import exit_protocol
from megatron_patch.utils.files import append_line
from tests.distributed.ranks import run_ranks, start_ranks
from tests.distributed.runs import DATA, MODEL, ROOT, command, printed, start_process, start_program, train
from tests.faults.test_stops import PLAN, finish, wait_for_steps


def ends(folder):
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["type"] == "end"]


def _failing(argv, victim, error):
    """The program, in which one rank gets an error when it reads the data of step 5."""
    from megatron_patch.data.loader import PatchLoader
    from megatron_patch.errors import DataError

    next_step = PatchLoader.next_step

    def broken(self):
        if self.step == 4 and torch.distributed.get_rank() == victim:
            raise DataError("a hole in the file") if error == "data" else ZeroDivisionError("a bug")
        return next_step(self)

    PatchLoader.next_step = broken
    return start_program(argv)


@pytest.mark.parametrize(("victim", "error", "code"), [(1, "data", 3), (0, "data", 3), (2, "bug", 1)])
def test_an_error_on_one_rank_ends_all_ranks_with_its_code(tmp_path, corpus, victim, error, code):
    folder = tmp_path / "run"
    argv = command(MODEL, DATA, PLAN, "--save-interval 3 --data-path", corpus, ["--save", str(folder)])
    assert run_ranks(functools.partial(_failing, victim=victim, error=error), 3, tmp_path / "run-logs", argv) == [code] * 3
    (end,) = ends(folder)
    assert (end["rank"], end["code"]) == (victim, code)
    assert end["reason"] == {"data": "DataError", "bug": "ZeroDivisionError"}[error]
    text = printed(folder)
    assert text.count("exit code") == 1 and ExitCode(code).advice in text
    assert text.count(f"exits after rank {victim}: ") == 2
    assert ("Traceback" in text) == (error == "bug") and "broken" in text if error == "bug" else "a hole in the file" in text


def _failing_on_a_full_disk(argv):
    """Rank 0 gets an error that it cannot write to events.jsonl."""

    def refuse(path, line):
        raise OSError(errno.ENOSPC, "No space left on device")

    exit_protocol.append_line = refuse
    return _failing(argv, 0, "data")


def test_the_error_of_rank_0_reaches_the_others_though_the_disk_is_full(tmp_path, corpus):
    """Rank 0 also keeps the store: it ends once the others have read its report there."""
    argv = command(MODEL, DATA, PLAN, "--data-path", corpus, ["--save", str(tmp_path / "run")])
    assert run_ranks(_failing_on_a_full_disk, 3, tmp_path / "run-logs", argv) == [3] * 3
    assert "No space left on device" in printed(tmp_path / "run") and printed(tmp_path / "run").count("exit code") == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_reported_by_one_of_the_others(tmp_path, corpus, victim):
    """kill -9 leaves no report; the rank that notices first reports for all."""
    folder = tmp_path / "run"
    argv = command(MODEL, DATA, PLAN, "--train-tokens 3M --data-path", corpus, ["--save", str(folder)])
    processes, results = start_ranks(start_program, 3, tmp_path / "run-logs", argv)
    wait_for_steps(folder, 3)
    os.kill(processes[victim].pid, signal.SIGKILL)
    left = [rank for rank in range(3) if rank != victim]
    assert finish([processes[rank] for rank in left], results) == dict.fromkeys(left, 1)
    (end,) = ends(folder)
    assert end["code"] == 1 and end["rank"] in left and printed(folder).count("exit code 1") == 1


def _failing_while_a_peer_waits(argv, failing):
    """One rank gets an error; the other waits in something that does not notice, like a collective on GPUs."""
    import time

    from megatron_patch.data.loader import PatchLoader
    from megatron_patch.errors import DataError
    from megatron_patch.training.faults import watchdog

    watchdog._POLL_SECONDS, watchdog._NOTICE_SECONDS = 0.3, 0.5
    next_step = PatchLoader.next_step

    def broken(self):
        if self.step == 4:
            if torch.distributed.get_rank() == failing:
                raise DataError("a hole in the file")
            time.sleep(600)
        return next_step(self)

    PatchLoader.next_step = broken
    return start_program(argv)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_waits_for_a_failed_peer_exits_with_the_peer_s_code(tmp_path, corpus, failing):
    """It exits long before --hang-timeout, so that no launcher has to kill it, whose code would hide the error's."""
    folder = tmp_path / "run"
    argv = command(MODEL, DATA, PLAN, "--data-path", corpus, ["--save", str(folder)])
    processes, _ = start_ranks(functools.partial(_failing_while_a_peer_waits, failing=failing), 2, tmp_path / "run-logs", argv)
    waiting = processes[1 - failing]
    waiting.join(timeout=90)
    assert waiting.exitcode == ExitCode.DATA, printed(folder)
    assert f"rank {1 - failing} exits after rank {failing}: it waited for that rank while" in printed(folder)
    assert "in broken" in (folder / "stacks" / f"rank-{1 - failing:05d}.txt").read_text()
    (end,) = ends(folder)
    assert (end["rank"], end["code"]) == (failing, ExitCode.DATA)
    processes[failing].join(timeout=30)


def test_configuration_errors_and_missing_data_leave_no_run_behind(tmp_path, corpus):
    log, folder = tmp_path / "log", tmp_path / "run"
    (tmp_path / "stop").touch()
    words = ["--save", str(folder), "--kill-switch", str(tmp_path / "stop")]
    assert start_process(PLAN, "--data-path", corpus, words, log=log).wait(60) == ExitCode.CONFIG
    assert "the file exists already" in log.read_text() and log.read_text().splitlines()[-1].startswith("exit code 2: ")
    assert not folder.exists(), "a requeued job does not start forever"
    assert start_process(PLAN, "--data-path", str(tmp_path / "nothing"), words[:2], log=log).wait(60) == ExitCode.DATA
    assert log.read_text().splitlines()[-1].startswith("exit code 3: ")
    assert [(end["code"], end["reason"]) for end in ends(folder)] == [(3, "DataError")]


def test_a_second_interrupt_ends_at_once_with_its_own_code(tmp_path, corpus):
    folder, log = tmp_path / "run", tmp_path / "log"
    words = "--split 50,50,0 --eval-tokens 100M --eval-interval 3 --micro-batch-size 1"
    process = start_process(PLAN, words, "--hang-timeout 0 --data-path", corpus, ["--save", str(folder)], log=log)
    wait_for_steps(folder, 3)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    assert process.wait(60) in (ExitCode.INTERRUPTED, ExitCode.PREEMPTED), "two signals at once may arrive as one"
    assert ends(folder)[-1]["code"] == process.returncode and "exit code" in log.read_text().splitlines()[-1]


def test_the_documented_exit_codes_are_those_of_the_program():
    """docs/operations.md lists each code once, with the program's advice."""
    text = (ROOT / "docs" / "operations.md").read_text()
    table = dict(re.findall(r"^\| (\d+) \| (.+) \|$", text.split("## Exit codes")[1].split("\n## ")[0], flags=re.MULTILINE))
    assert table == {str(code.value): code.advice for code in ExitCode}


def test_a_line_after_an_incomplete_one_is_complete(tmp_path):
    path = tmp_path / "new" / "lines"
    append_line(path, "1")
    with path.open("a") as file:
        file.write('{"torn')
    append_line(path, "2")
    append_line(path, "3")
    assert path.read_text() == '1\n{"torn\n2\n3\n'


def test_a_wrong_flag_that_only_rank_0_notices_ends_all_ranks_with_one_message(tmp_path, corpus):
    """MLflow's address may be in the environment of rank 0 alone, which is the only one that needs it."""
    pytest.importorskip("mlflow")
    argv = command(MODEL, DATA, PLAN, ["--data-path", corpus, "--save", str(tmp_path / "run"), "--mlflow-experiment", "x"])
    assert run_ranks(start_program, 2, tmp_path / "run-logs", argv) == [2, 2]
    text = printed(tmp_path / "run")
    assert "rank 0 on " in text and text.count("without the address of a tracking server") == text.count("exit code 2") == 1
    assert "Traceback" not in text


def test_services_that_cannot_be_used_end_no_run(tmp_path, corpus):
    flags = ["--tensorboard-dir", "/dev/null/x", "--prometheus-file", "/dev/null/x/run.prom"]
    train(tmp_path / "run", 2, PLAN, "--train-tokens 3072", ["--data-path", corpus, *flags])
    text = printed(tmp_path / "run")
    assert text.count("training continues") == text.count("may lack the last values") == 2 and "Traceback" not in text


@pytest.mark.parametrize(
    ("rank", "local_rank", "printed_text"),
    [
        (0, 0, "ConfigError: no such file\n  Allowed: one"),
        (1, 1, ""),
        (8, 0, f"rank 8 on {socket.gethostname()}: ConfigError: no such file\n"),
    ],
)
def test_a_wrong_flag_is_printed_in_full_by_rank_0_and_in_one_line_by_other_nodes(capsys, rank, local_rank, printed_text):
    assert exit_protocol.report_error(ConfigError("no such file", "one"), rank, local_rank, None) == ExitCode.CONFIG
    text = capsys.readouterr().err
    assert text.startswith(printed_text) and text.count("\n") == (3 if rank == 0 else printed_text.count("\n"))
