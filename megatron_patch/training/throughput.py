"""How fast a run is, and whether it waits for its data.

In: times and amounts of each step. Out: tokens/s, positions/s, TFLOP/s, MFU, memory, and a warning where loading data slows training down.
"""

from __future__ import annotations

import resource
from collections import deque
from dataclasses import dataclass

import torch

from megatron_patch.data.loader import LoadingTimes
from megatron_patch.model.flops import peak_flops


@dataclass(frozen=True)
class Rates:
    """Rates over a window of steps.

    Args:
        tokens_per_second: of all ranks.
        positions_per_second: of all ranks.
        tflops: model TFLOP/s of one device.
        mfu: model FLOPs over the device's peak, or None where the peak is not known.
        data_share: share of the time spent waiting for data.
    """

    tokens_per_second: float
    positions_per_second: float
    tflops: float
    mfu: float | None
    data_share: float


class Throughput:
    """A meter over a window of steps.

    Args:
        devices: how many share the work.
        device_name: decides the peak.
        peak_tflops: the peak of one device, where the table does not know it or should not decide.
        window: steps to look back.
    """

    def __init__(self, devices: int, device_name: str, peak_tflops: float | None = None, window: int = 20) -> None:
        known = peak_flops(device_name)
        self._devices = devices
        self._peak = peak_tflops * 1e12 if peak_tflops is not None else known
        self._steps: deque[tuple[float, float, int, int, float]] = deque(maxlen=window)

    def reset(self) -> None:
        """Forgets the window: after a switch, other steps are measured."""
        self._steps.clear()

    def update(self, seconds: float, data_seconds: float, tokens: int, positions: int, flops: float) -> Rates:
        """Adds a step and returns the rates of the window."""
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


class DataWaitMonitor:
    """Watches one stage; its first step, for which nothing could be prepared, does not count.

    Args:
        loading: of the stage's loader.
        window: steps that are looked at together.
    """

    def __init__(self, loading: LoadingTimes, window: int = 20) -> None:
        self._loading = loading
        self._steps: deque[tuple[float, float]] = deque(maxlen=window)
        self._first, self._told = True, False

    def update(self, seconds: float, data_seconds: float) -> str | None:
        """Adds a step: its seconds, and those of it that were spent waiting for data. Returns what to tell, if anything."""
        if self._first or self._told:
            self._first = False
            return None
        self._steps.append((seconds, data_seconds))
        whole, waited = (sum(column) for column in zip(*self._steps, strict=True))
        if len(self._steps) < (self._steps.maxlen or 0) or waited <= LARGEST_SHARE * whole:
            return None
        self._told = True
        return f"waiting for data takes {waited / whole:.1%} of the time (more than {LARGEST_SHARE:.0%}): {self._loading.cause()}"


def device_name(device: torch.device) -> str:
    """What the device is called: the GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def memory_gib(device: torch.device) -> float:
    """Highest memory of this rank so far: the allocator's on a GPU, the process' resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
