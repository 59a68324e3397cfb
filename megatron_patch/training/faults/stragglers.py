"""Finds ranks that compute more slowly than others, by the time of their first forward pass in each step.

In that pass only ranks that share a layer or a sample wait for each other, so that they are slow together.
"""

from __future__ import annotations

import socket
import statistics
from typing import cast

from megatron_patch.engine.distributed import gather_objects
from megatron_patch.parallel.grid import Grid

_SLOW = 1.5  # times the median of the peers


class StragglerDetector:
    """Compares the ranks once in each interval of steps.

    Args:
        interval: number of steps between two comparisons; 0: never.
        grid: coordinates of this rank; only ranks with the same pipeline rank do the same work.
    """

    def __init__(self, interval: int, grid: Grid) -> None:
        self._interval, self._grid = interval, grid
        self._seconds: list[float] = []

    def add(self, seconds: float) -> list[str]:
        """Adds a step; every rank must call it after each step.

        Args:
            seconds: duration of this rank's first forward pass.

        Returns:
            At the end of an interval a sentence about each slow rank, otherwise nothing.
        """
        if not self._interval or self._grid.world_size == 1:
            return []
        self._seconds.append(seconds)
        if len(self._seconds) < self._interval:
            return []
        local = (self._grid.pipeline_parallel_rank, statistics.median(self._seconds), socket.gethostname())
        self._seconds = []
        gathered = [cast("tuple[int, float, str]", part) for part in gather_objects(local)]
        slow = []
        for rank, (pipeline_rank, median, host) in enumerate(gathered):
            peers = [other for other_rank, (row, other, _) in enumerate(gathered) if row == pipeline_rank and other_rank != rank]
            if not peers:
                continue
            usual = statistics.median(peers)
            if median > _SLOW * usual:
                slow.append(f"rank {rank} on {host} is slow: a forward pass takes {median:.3g} s, on its peers {usual:.3g} s")
        return slow
