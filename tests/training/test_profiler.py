"""When a profile begins and ends, and what is said if it cannot be made."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_patch.training.callbacks.profiler import NsightRange, Profiler, TorchTrace
from tests.training.records import END, START, STEP


class Tool:
    def __init__(self):
        self.calls = []

    def begin(self, first, last, warm_up):
        self.calls.append(f"begin {first}-{last} after {warm_up}")

    def next_step(self):
        self.calls.append("next")

    def end(self, last):
        self.calls.append(f"end {last}")


def run(tool, start, total, first, last):
    """Runs steps `start` + 1 to `total` with a profile of steps `first` to `last`."""
    profiler = Profiler(tool, first, last, speaks=True)
    profiler.on_start(replace(START, step=start))
    for step in range(start + 1, total + 1):
        profiler.on_step_begin(step)
        profiler.on_step(replace(STEP, step=step))
    profiler.on_end(END)
    profiler.close()
    return tool


@pytest.mark.parametrize(
    ("start", "total", "first", "last", "calls"),
    [
        (0, 20, 3, 5, ["begin 3-5 after 1", "next", "next", "next", "end 5"]),
        (0, 20, 1, 2, ["begin 1-2 after 0", "next", "end 2"]),
        (3, 20, 3, 5, ["begin 4-5 after 0", "next", "end 5"]),
        (0, 4, 3, 5, ["begin 3-5 after 1", "next", "next", "end 4"]),
        (0, 2, 3, 5, ["begin 3-5 after 1", "end 2"]),
    ],
)
def test_the_step_before_the_first_warms_up(start, total, first, last, calls):
    assert run(Tool(), start, total, first, last).calls == calls


@pytest.mark.parametrize(
    ("start", "first", "line"),
    [(5, 3, "--profile 3-5 records nothing: 5 of 20 steps are done"), (0, 21, "--profile 21-23 records nothing: 0 of 20 steps are done")],
)
def test_steps_that_are_over_or_never_come_are_one_line(capsys, start, first, line):
    assert run(Tool(), start, 20, first, first + 2).calls == []
    assert capsys.readouterr().out == line + "\n"


def test_a_profile_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
    (tmp_path / "profile").write_text("a file")
    run(TorchTrace(tmp_path / "profile", 0, torch.device("cpu"), shapes=False), 0, 3, 2, 2)
    printed = capsys.readouterr().err
    assert printed.startswith("--profile 2-2 records nothing: File exists") and printed.endswith("; training continues\n")


def test_marks_for_nsight_need_cuda(capsys):
    if torch.cuda.is_available():
        pytest.skip("without a GPU only")
    run(NsightRange(shapes=False), 0, 3, 2, 2)
    assert "--profile 2-2 records nothing: " in capsys.readouterr().err
