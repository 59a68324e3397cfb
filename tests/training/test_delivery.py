"""A service that fails or hangs neither ends nor delays a run, and gets its values later."""

from __future__ import annotations

import errno
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_patch.training.callbacks import delivery
from megatron_patch.training.callbacks.base import StepRecord
from megatron_patch.training.callbacks.charts import Charts
from megatron_patch.training.callbacks.delivery import Delivery
from megatron_patch.training.callbacks.tensorboard import TensorBoard
from tests.training.records import END, EVALUATION, START, STEP

KEPT = Path("run/metrics.jsonl")


class Service:
    """Records what it receives; `error` is raised by every call while it is set."""

    name, records = "a service", (StepRecord,)

    def __init__(self, error=None):
        self.error, self.opened, self.got, self.ended, self.abandoned = error, [], [], [], 0

    def _fail(self):
        if self.error is not None:
            raise self.error

    def open(self, start):
        self.opened.append(start)
        self._fail()

    def add(self, records):
        self._fail()
        self.got += [timed.record.step for timed in records]

    def abandon(self):
        self.abandoned += 1
        self._fail()

    def close(self, end):
        self._fail()
        self.ended.append(end)


def deliver(service, clock=None):
    result = Delivery(service, KEPT, clock or (lambda: 0.0))
    result.begin(START)
    return result


def test_a_failure_is_printed_once_and_no_value_is_lost(capsys):
    now, service = 0.0, Service(OSError(errno.ENOSPC, "No space left on device"))
    waiting = deliver(service, lambda: now)
    for step in range(1, 4):
        waiting.put(replace(STEP, step=step))
    assert waiting.due() == 0.0
    waiting.attempt()
    assert waiting.due() == 60.0
    now = 60.0
    waiting.attempt()
    assert waiting.due() == 120.0, "the pause is doubled"
    (line,) = capsys.readouterr().err.splitlines()
    assert line == ("a service fails: No space left on device; training continues, its values wait in memory, and a retry follows")
    now, service.error = 180.0, None
    waiting.attempt()
    assert service.got == [1, 2, 3] and service.opened == [START] * 3 and waiting.due() is None
    assert capsys.readouterr().err == "a service works again; no value was lost\n"
    service.error = RuntimeError("gone")
    waiting.put(STEP)
    waiting.attempt()
    assert waiting.due() == 60.0
    service.error = None
    waiting.attempt()
    assert service.opened[3:] == [None], "only the first opening drops values of previous starts"


def test_only_the_newest_values_wait_for_a_service_that_stays_away(capsys, monkeypatch):
    monkeypatch.setattr(delivery, "_MOST_WAITING", 3)
    service = Service(RuntimeError("x"))
    waiting = deliver(service)
    for step in range(1, 6):
        waiting.put(replace(STEP, step=step))
        waiting.attempt()
    service.error = None
    waiting.attempt()
    assert service.got == [3, 4, 5]
    assert "works again, but lacks 2 records; run/metrics.jsonl has all values" in capsys.readouterr().err


@pytest.mark.parametrize("end", [END, None])
def test_the_end_of_a_run_reaches_the_service_or_is_reported(capsys, end):
    service = Service()
    waiting = deliver(service)
    waiting.put(STEP)
    waiting.finish(end)
    assert service.got == [1] and service.ended == [end] and capsys.readouterr().err == ""
    service = Service(RuntimeError("no answer from http://user:secret@host/x?sig=abc\nmore"))
    waiting = deliver(service)
    waiting.put(STEP)
    waiting.finish(end)
    assert (
        capsys.readouterr().err
        == "a service may lack the last values: no answer from http://host/x?sig=…; run/metrics.jsonl has all values\n"
    )


def test_a_service_that_does_not_answer_delays_neither_steps_nor_the_end(capsys):
    answer = threading.Event()
    service = Service()
    service.open = lambda start: answer.wait()
    charts = Charts(service, KEPT, longest_end=0.01)
    charts.on_start(START)
    for step in range(1, 100):
        charts.on_step(replace(STEP, step=step))
        charts.on_evaluation(EVALUATION)
    charts.on_end(END)
    charts.close()
    assert "a service did not take the last values within 0 s; the run ends without it" in capsys.readouterr().err
    answer.set()
    charts._thread.join()
    assert service.got == list(range(1, 100)) and service.ended == [END], "it gets the records that it asked for"


def test_a_chart_folder_that_cannot_be_written_does_not_end_a_new_run(tmp_path, capsys):
    (tmp_path / "events").write_text("a file")
    board = Charts(TensorBoard(str(tmp_path / "events")), None)
    board.on_start(START)
    board.on_step(STEP)
    board.close()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "last values" in line]
    assert f"--tensorboard-dir {tmp_path}/events may lack the last values: " in line and "without --save no file has them" in line


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_gets_all_values_after_its_folder_was_missing(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    now, folder, away = 0.0, tmp_path / "events", tmp_path / "away"
    board = Delivery(TensorBoard(str(folder)), KEPT, clock=lambda: now)
    board.begin(START)
    board.put(STEP)
    board.attempt()
    folder.rename(away)
    folder.write_text("in its place")
    for step in range(2, 2000):
        board.put(replace(STEP, step=step, tokens=100 * step))
        board.attempt()
        if "fails" in (error := capsys.readouterr().err):
            break
    assert f"--tensorboard-dir {folder} fails: " in error
    now = 60.0
    board.attempt()
    assert capsys.readouterr().err == ""
    folder.unlink()
    away.rename(folder)
    board.put(replace(STEP, step=step + 1, tokens=100 * (step + 1)))
    board.attempt()
    assert "works again; no value was lost" in capsys.readouterr().err
    board.finish(END)
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("train/lr")] == [100 * number for number in range(1, step + 2)]
