"""Measures the throughput of a run, and warns if training waits for data.

In: times and sizes of each step. Out: tokens/s, positions/s, TFLOP/s, MFU, memory, and a warning if loading data slows training down.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from megatron_patch.data.loader import LoadingTimes
from megatron_patch.model.flops import peak_flops


@dataclass(frozen=True)
class Rates:
    """Rates over a window of steps.

    Args:
        tokens_per_second: input tokens/s of all ranks together.
        positions_per_second: positions/s of all ranks together.
        tflops: model TFLOP/s of one device.
        mfu: model FLOP/s over the device's peak, or None if the peak is unknown.
        data_share: share of the time spent waiting for data.
    """

    tokens_per_second: float
    positions_per_second: float
    tflops: float
    mfu: float | None
    data_share: float


class Throughput:
    """Computes rates over a window of steps.

    Args:
        devices: number of devices of the run.
        device_name: name of the devices, from which their peak is known.
        peak_tflops: peak TFLOP/s of one device; None: from the table of known devices.
        window: number of steps in the window.
    """

    def __init__(self, devices: int, device_name: str, peak_tflops: float | None = None, window: int = 20) -> None:
        known = peak_flops(device_name)
        self._devices = devices
        self._peak = peak_tflops * 1e12 if peak_tflops is not None else known
        self._steps: deque[tuple[float, float, int, int, float]] = deque(maxlen=window)

    def reset(self) -> None:
        """Empties the window."""
        self._steps.clear()

    def update(self, seconds: float, data_seconds: float, tokens: int, positions: int, flops: float) -> Rates:
        """Adds a step and returns the rates of the window.

        Args:
            seconds: duration of the step.
            data_seconds: the part of it spent waiting for data.
            tokens: input tokens of the step over all ranks.
            positions: positions of the step over all ranks.
            flops: model FLOPs of the step over all ranks.
        """
        self._steps.append((seconds, data_seconds, tokens, positions, flops))
        time, waited, all_tokens, all_positions, all_flops = (sum(column) for column in zip(*self._steps, strict=True))
        time = max(time, 1e-9)
        per_device = all_flops / time / self._devices
        return Rates(
            tokens_per_second=all_tokens / time,
            positions_per_second=all_positions / time,
            tflops=per_device / 1e12,
            mfu=None if self._peak is None else per_device / self._peak,
            data_share=waited / time,
        )


LARGEST_SHARE = 0.02
"""Share of the time that training may wait for data without a warning."""


class DataWaitMonitor:
    """Warns once if training waits for data for more than `LARGEST_SHARE` of the time.

    The first step of a stage is ignored, because its data cannot be prepared in advance.

    Args:
        loading: times of the stage's loader.
        window: number of steps that are averaged.
    """

    def __init__(self, loading: LoadingTimes, window: int = 20) -> None:
        self._loading = loading
        self._steps: deque[tuple[float, float]] = deque(maxlen=window)
        self._is_first, self._has_warned = True, False

    def update(self, seconds: float, data_seconds: float) -> str | None:
        """Adds a step and returns a warning with the likely cause, or None.

        Args:
            seconds: duration of the step.
            data_seconds: the part of it spent waiting for data.
        """
        if self._is_first or self._has_warned:
            self._is_first = False
            return None
        self._steps.append((seconds, data_seconds))
        total, waited = (sum(column) for column in zip(*self._steps, strict=True))
        if len(self._steps) < (self._steps.maxlen or 0) or waited <= LARGEST_SHARE * total:
            return None
        self._has_warned = True
        return f"training waits for data {waited / total:.1%} of the time (more than {LARGEST_SHARE:.0%}): {self._loading.bottleneck()}"


def device_name(device: torch.device) -> str:
    """Returns the name of the GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def memory_gib(device: torch.device) -> float:
    """Returns the peak memory of this rank so far, in GiB: of torch's allocator on a GPU, of the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_resident_bytes() / 2**30


def peak_resident_bytes() -> int:
    """Returns the largest resident set of this process so far, in bytes.

    The kernel's `ru_maxrss` is not that number: it begins with the resident set of the process that started this one.
    """
    with open("/proc/self/status") as status:
        peak = next(line for line in status if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * 1024
