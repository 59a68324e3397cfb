"""Which ranks compute slower than the others, by what no rank waits in: its first forward pass of each step."""

from __future__ import annotations

import socket
import statistics
from typing import cast

from megatron_patch.engine.distributed import gather_objects
from megatron_patch.parallel.grid import Grid

_SLOW = 1.5


class StragglerDetector:
    """Watches over an interval.

    Args:
        interval: steps between two looks; 0: none.
        grid: only ranks of the same pipeline stage do the same work.
    """

    def __init__(self, interval: int, grid: Grid) -> None:
        self._interval, self._grid = interval, grid
        self._seconds: list[float] = []

    def add(self, seconds: float) -> list[str]:
        """After each step, on every rank.

        Args:
            seconds: of this rank's first forward pass.

        Returns:
            At the end of an interval, whoever is slow, in words.
        """
        if not self._interval or self._grid.world_size == 1:
            return []
        self._seconds.append(seconds)
        if len(self._seconds) < self._interval:
            return []
        mine = (self._grid.pipeline_parallel_rank, statistics.median(self._seconds), socket.gethostname())
        self._seconds = []
        parts = [cast("tuple[int, float, str]", part) for part in gather_objects(mine)]
        slow = []
        for rank, (stage, median, host) in enumerate(parts):
            others = [other for number, (place, other, _) in enumerate(parts) if place == stage and number != rank]
            if not others:
                continue
            usual = statistics.median(others)
            if median > _SLOW * usual:
                slow.append(f"rank {rank} on {host}: {median:.3g} s for a forward pass, the others {usual:.3g} s")
        return slow
