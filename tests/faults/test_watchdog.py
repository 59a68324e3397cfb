"""A rank that hangs ends the job: the others notice, write their stacks and exit with code 76."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from megatron_patch.exit_codes import ExitCode
from tests.distributed.ranks import start_ranks
from tests.distributed.runs import DATA, MODEL, Run, command, printed, start_program, train
from tests.faults.test_stops import PLAN, wait_for_steps


@pytest.mark.parametrize(("ranks", "layout"), [(3, "--zero-stage 1"), (2, "--pipeline-model-parallel-size 2")])
def test_a_stopped_rank_ends_the_job(tmp_path, corpus, ranks, layout):
    folder = tmp_path / "run"
    argv = command(MODEL, DATA, PLAN, layout, "--train-tokens 3M --save-interval 5 --data-path", corpus, ["--hang-timeout", "4s"])
    processes, results = start_ranks(start_program, ranks, tmp_path / "run-logs", [*argv, "--save", str(folder)])
    wait_for_steps(folder, 8)
    os.kill(processes[1].pid, signal.SIGSTOP)
    others = [number for number in range(ranks) if number != 1]
    hanging = 0
    for number in others:
        processes[number].join(timeout=60)
        stacks = (folder / "stacks" / f"rank-{number:05d}.txt").read_text()
        assert "trainer.py" in stacks
        if processes[number].exitcode == 76:
            hanging += 1
            assert "no progress" in stacks and "Thread" in stacks
        else:  # a slow rank finds the connection of the first broken before its own timeout
            assert processes[number].exitcode == 0 and results.get(timeout=10) == (number, True, 76)
    assert hanging, "the first exits by itself"
    assert printed(folder).count("exit code 76") == 1, "one rank reports for all"
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [(event["reason"], event["code"]) for event in events if event["type"] == "end"] == [("hang", 76)]
    # The stopped rank, once continued, has also waited too long or finds its peer gone.
    os.kill(processes[1].pid, signal.SIGCONT)
    processes[1].join(timeout=60)
    assert processes[1].exitcode is not None
    assert Run(folder).losses and (folder / "latest").exists()


def _one_fails_and_the_others_do_not_notice(argv, first):
    """In step 5 a rank gets an error or is killed, while the others wait outside of Python, as in a collective on GPUs."""
    import ctypes

    from megatron_patch.engine.data_parallel import DataParallelEngine
    from megatron_patch.errors import DataError

    steps, train_step = [], DataParallelEngine.train_step

    def step(self, *arguments):
        steps.append(1)
        if len(steps) == 5:
            if self.grid.rank == 0 and first == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.grid.rank == 1 and first == 1:
                raise DataError("rank 1 cannot read", "a working disk", "replace it")
            ctypes.CDLL(None).poll(None, 0, 600_000)
        return train_step(self, *arguments)

    DataParallelEngine.train_step = step
    return start_program(argv)


@pytest.mark.parametrize(
    ("first", "code", "message"), [(1, ExitCode.DATA, "rank 1 cannot read"), (0, ExitCode.INTERNAL, "rank 0, which keeps")]
)
def test_ranks_that_cannot_notice_a_peer_s_exit_follow_it(tmp_path, corpus, first, code, message):
    argv = command(MODEL, DATA, PLAN, "--train-tokens 3M --data-path", corpus, ["--save", str(tmp_path / "run")])
    processes, _ = start_ranks(_one_fails_and_the_others_do_not_notice, 3, tmp_path / "run-logs", argv, first)
    for number in {0, 1, 2} - {first}:
        processes[number].join(timeout=120)
        assert processes[number].exitcode == code, "the code of the rank that failed first"
    text = printed(tmp_path / "run")
    assert text.count(message) == 1 and "it waited for that rank while" in text
    assert [json.loads(line)["code"] for line in (tmp_path / "run/events.jsonl").read_text().splitlines() if '"end"' in line] == [code]


def _stuck_while_starting(argv):
    from megatron_patch.training import trainer

    def never(*arguments, **more):
        time.sleep(600)

    trainer.open_data = never
    return start_program(argv)


def test_a_hang_while_data_is_opened_ends_the_run(tmp_path, corpus):
    argv = command(MODEL, DATA, PLAN, "--hang-timeout 3s --data-path", corpus, ["--save", str(tmp_path / "run")])
    (process,), _ = start_ranks(_stuck_while_starting, 1, tmp_path / "run-logs", argv)
    process.join(timeout=60)
    assert process.exitcode == 76
    assert "while the run starts" in printed(tmp_path / "run") and "in never" in (tmp_path / "run/stacks/rank-00000.txt").read_text()


def test_a_run_that_makes_progress_is_not_ended(tmp_path, corpus):
    run = train(tmp_path / "run", 1, PLAN, "--hang-timeout 3s --data-path", corpus)
    assert len(run.losses) == 80


def _slow_rank(argv):
    from megatron_patch.model.gpt import GPTModel

    forward = GPTModel.forward

    def slow(self, *arguments):
        if os.environ["RANK"] == "1":
            time.sleep(0.05)
        return forward(self, *arguments)

    GPTModel.forward = slow
    return start_program(argv)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_slow_rank_is_named(tmp_path, corpus, ranks):
    folder = tmp_path / "run"
    argv = command(MODEL, DATA, PLAN, "--train-tokens 4608 --straggler-interval 8 --data-path", corpus, ["--save", str(folder)])
    processes, results = start_ranks(_slow_rank, ranks, tmp_path / "run-logs", argv)
    for _ in processes:
        assert results.get(timeout=120)[1]
    found = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    named = [event["message"] for event in found if event["type"] == "straggler"]
    assert named and any("rank 1 on " in text for text in named)
