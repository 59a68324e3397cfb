"""Records some steps with torch's profiler (`--profile 10-12`), or marks them for Nsight Systems.

In: the steps of a run. Out: SAVE/profile/rank-R-step-A-B.json.gz, a trace for https://ui.perfetto.dev, and a table of the operators that
take longest. Neither changes what the steps compute, and a failure does not end the run.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from megatron_patch.engine.ranges import PREFIX
from megatron_patch.training.callbacks.base import Callback, RunEnd, RunStart, StepRecord
from megatron_patch.training.callbacks.servers import why
from megatron_patch.training.faults.exit_protocol import print_stderr
from megatron_patch.utils.console import print_line, shortened
from megatron_patch.utils.units import plural

_OPERATORS = 8
_MOST_EVENTS = 500_000  # with more, the table would take a minute


class TorchTrace:
    """Records steps with torch's profiler.

    Args:
        folder: folder of the traces.
        rank: this rank.
        device: the device of this rank.
        shapes: whether to record the shapes of tensors.
    """

    def __init__(self, folder: Path, rank: int, device: torch.device, shapes: bool) -> None:
        self._folder, self._rank, self._device, self._shapes = folder, rank, device, shapes
        self._profile: Any = None
        self._first = 0

    def begin(self, first: int, last: int, warm_up: int) -> None:
        """Starts the profiler, which records steps `first` to `last` after `warm_up` steps that it drops."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._first = first
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise its states are printed
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # without a warm-up, where the run starts with the first of the steps
            schedule = torch.profiler.schedule(wait=0, warmup=warm_up, active=last - first + 1, repeat=1)
            self._profile = torch.profiler.profile(activities=activities, schedule=schedule, record_shapes=self._shapes)
            self._profile.start()

    def next_step(self) -> None:
        """Marks that another step begins."""
        self._profile.step()

    def end(self, last: int) -> None:
        """Stops the profiler after step `last`, writes the trace and prints where it is; rank 0 prints the table too."""
        profile, self._profile = self._profile, None
        profile.stop()
        if last < self._first:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank-{self._rank}-step-{self._first}-{last}.json.gz"
        temporary = path.with_name(f".partial-{path.name}")
        temporary.unlink(missing_ok=True)
        try:
            profile.export_chrome_trace(str(temporary))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        size = path.stat().st_size / 2**20
        print_line(f"the profile of rank {self._rank} is in {path} ({size:.1f} MiB); open it at https://ui.perfetto.dev")
        if self._rank == 0 and len(profile.profiler.kineto_results.events()) <= _MOST_EVENTS:
            for line in _table(profile, self._device.type == "cuda"):
                print_line(line)


def _table(profile: Any, cuda: bool) -> list[str]:
    """Returns the lines of a table of the operators that take longest, on the GPU or else on the CPU, without what they call."""
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = [row for row in profile.key_averages() if not row.key.startswith((PREFIX, "ProfilerStep"))]
    if cuda:
        rows = [row for row in rows if row.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(getattr(row, field) for row in rows) or 1
    rows.sort(key=lambda row: -getattr(row, field))
    lines = [f"{'share':>7} {'time':>10} {'calls':>8}  operator on the {'GPU' if cuda else 'CPU'}, without what it calls"]
    for row in rows[:_OPERATORS]:
        time = getattr(row, field)
        lines.append(f"{time / total:>7.1%} {time / 1000:>7.1f} ms {row.count:>8,}  {shortened(row.key, 48)}")
    return lines


class NsightRange:
    """Marks steps for `nsys profile --capture-range=cudaProfilerApi`, which records them with an NVTX range for each part and operator.

    Args:
        shapes: whether the ranges have the shapes of tensors.
    """

    def __init__(self, shapes: bool) -> None:
        self._shapes = shapes
        self._ranges: Any = None

    def begin(self, first: int, last: int, warm_up: int) -> None:
        """Does nothing: the recording begins with `next_step` or, without a warm-up, at once."""
        if warm_up == 0:
            self.next_step()

    def next_step(self) -> None:
        """Starts the recording, if it has not started."""
        if self._ranges is None:
            torch.cuda.profiler.start()
            self._ranges = torch.autograd.profiler.emit_nvtx(record_shapes=self._shapes)
            self._ranges.__enter__()

    def end(self, last: int) -> None:
        """Stops the recording."""
        if self._ranges is not None:
            self._ranges.__exit__(None, None, None)
            torch.cuda.profiler.stop()


class Profiler(Callback):
    """Records steps `first` to `last` of a run; the step before them, if there is one, warms the profiler up.

    Args:
        tool: what records them.
        first: the first step.
        last: the last step.
        speaks: whether this rank prints that there was nothing to record.
    """

    def __init__(self, tool: TorchTrace | NsightRange, first: int, last: int, speaks: bool) -> None:
        self._tool, self._first, self._last, self._speaks = tool, first, last, speaks
        self._step = 0
        self._recording = self._done = False

    def on_start(self, record: RunStart) -> None:
        """Prints a line if the steps are over or never come."""
        self._step = record.step
        if self._last <= record.step or self._first > record.total_steps:
            self._done = True
            if self._speaks:
                steps = f"{record.step:,} of {plural(record.total_steps, 'step')} are done"
                print_line(f"--profile {self._first}-{self._last} records nothing: {steps}")

    def on_step_begin(self, step: int) -> None:
        """Starts the recording before its first step, or one step earlier."""
        if self._done or step < self._first - 1:
            return
        self._guarded(self._begin_step, step)

    def _begin_step(self, step: int) -> None:
        if self._recording:
            self._tool.next_step()
        else:
            self._recording = True
            self._tool.begin(max(step, self._first), self._last, warm_up=int(step < self._first))

    def on_step(self, record: StepRecord) -> None:
        """Ends the recording after its last step."""
        self._step = record.step
        if record.step >= self._last:
            self._end()

    def on_end(self, record: RunEnd) -> None:
        """Ends the recording if the run ends earlier."""
        self._end()

    def close(self) -> None:
        """Ends the recording if an error ends the run."""
        self._end()

    def _end(self) -> None:
        if self._recording and not self._done:
            self._done = True
            self._guarded(self._tool.end, self._step)

    def _guarded(self, action: Any, step: int) -> None:
        try:
            action(step)
        except Exception as error:
            self._done = True
            print_stderr(f"--profile {self._first}-{self._last} records nothing: {why(error)}; training continues")
