"""How long work took on the device, without making the host wait for it."""

from __future__ import annotations

import time
from types import TracebackType

import torch


class Stopwatch:
    """Times what happens inside of `with`.

    Args:
        device: where the work is done.
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
        """The time between; on a GPU to be asked for when the device has come past it."""
        return self._events[0].elapsed_time(self._events[1]) / 1000 if self._events else self._seconds
