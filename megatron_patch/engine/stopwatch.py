"""Measures how long work takes on the device, without making the host wait for it."""

from __future__ import annotations

import time
from types import TracebackType

import torch


class Stopwatch:
    """Measures the duration of a `with` block on the device.

    Args:
        device: the device that does the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._began = self._seconds = 0.0

    def __enter__(self) -> None:
        if self._events:
            self._events[0].record()
        self._began = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._seconds = time.perf_counter() - self._began
        if self._events:
            self._events[1].record()

    def seconds(self) -> float:
        """Returns the duration of the last block in seconds; on a GPU, call it only after the device has finished the block."""
        return self._events[0].elapsed_time(self._events[1]) / 1000 if self._events else self._seconds
