"""Does the training wait for data, and why? In: times of each step and of the loader. Out: a sentence, at most once a stage."""

from __future__ import annotations

from collections import deque

from megatron_patch.data.loader import LoadingTimes

LARGEST_SHARE = 0.02


class DataWait:
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
