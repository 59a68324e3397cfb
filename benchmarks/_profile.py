"""Profiles steps: time by kernel, the share of the time in which the GPU works, and a trace of limited size."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

LARGEST_TRACE = 4_000_000
# Suppresses the messages of the profiler's library.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
_LAUNCHES = {"cuda_runtime", "cuda_driver", "ac2g"}


def union(intervals: Iterable[tuple[int, int]]) -> int:
    """Returns the total length of (start, end) intervals; overlaps count once."""
    covered, reached = 0, None
    for start, end in sorted(intervals):
        begin = start if reached is None else max(start, reached)
        covered += max(0, end - begin)
        reached = end if reached is None else max(reached, end)
    return covered


class Profile:
    """torch's profiler between `start` and `stop`. On a GPU it records kernels only, because recording host events slows the steps."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._profiler = torch.profiler.profile(activities=[ProfilerActivity.CUDA if self._cuda else ProfilerActivity.CPU])

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def start(self) -> None:
        """Starts the profiler after earlier work has finished."""
        self._synchronize()
        self._profiler.start()
        self._began = time.perf_counter()

    def stop(self) -> None:
        """Stops the profiler after all work has finished."""
        self._synchronize()
        self.seconds = time.perf_counter() - self._began
        self._profiler.stop()

    def _events(self) -> list[Any]:
        wanted = torch.autograd.DeviceType.CUDA if self._cuda else torch.autograd.DeviceType.CPU
        events = self._profiler.profiler.kineto_results.events()
        return [event for event in events if event.device_type() == wanted and not event.is_user_annotation()]

    def figures(self, top: int = 30) -> dict[str, Any]:
        """Returns kernels by time; on a CPU, operators including the operators that they call.

        Returns:
            `wall_ms`, `busy_share` (time in which any kernel runs over wall time), `kernel_ms` (summed), and `rows`, each with `name`,
            `cuda_ms`, `share` (of `kernel_ms`) and `calls`.
        """
        events = self._events()
        times: dict[str, list[int]] = defaultdict(list)
        for event in events:
            times[event.name()].append(event.duration_ns())
        total = sum(map(sum, times.values()))
        order = sorted(times, key=lambda name: -sum(times[name]))[:top]
        rows = [
            {"name": name[:200], "cuda_ms": sum(times[name]) / 1e6, "share": sum(times[name]) / total, "calls": len(times[name])}
            for name in order
        ]
        busy = union((event.start_ns(), event.end_ns()) for event in events)
        return {"wall_ms": self.seconds * 1e3, "kernel_ms": total / 1e6, "busy_share": busy / (self.seconds * 1e9), "rows": rows}

    def write_trace(self, path: Path, limit: int = LARGEST_TRACE) -> Path | None:
        """Writes a compressed trace for https://ui.perfetto.dev.

        If it is too large, kernel launches are removed, and then the later half of the events, at most twice.

        Args:
            path: file to write, with the suffix .json.gz.
            limit: largest size in bytes.

        Returns:
            The path, or None if a quarter of the trace is still too large.
        """
        # The profiler can export its events only once.
        with tempfile.TemporaryDirectory() as folder:
            self._profiler.export_chrome_trace(f"{folder}/trace.json")
            trace = json.loads(Path(f"{folder}/trace.json").read_bytes())
        for attempt in range(4):
            if attempt == 1:
                trace["traceEvents"] = [event for event in trace["traceEvents"] if event.get("cat") not in _LAUNCHES]
            elif attempt:
                ordered = sorted(trace["traceEvents"], key=lambda event: float(event.get("ts", 0)))
                trace["traceEvents"] = ordered[: len(ordered) // 2]
            packed = gzip.compress(json.dumps(trace).encode(), 6)
            if len(packed) <= limit:
                path.write_bytes(packed)
                return path
        return None
