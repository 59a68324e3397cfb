"""Says on standard error what an evaluation will read, and how far it is, so that standard output has only its result.

In: the amount that it will read, and each batch. Out: a line at the start, one with an estimate of its time after the first seconds, and
further lines.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from megatron_patch.utils.console import print_line
from megatron_patch.utils.units import format_count, format_duration

_FIRST, _NEXT = 2.0, 10.0  # seconds


class EvaluationProgress:
    """The progress of one evaluation.

    Args:
        total: how much it will read, in the unit of `add`; None if that is not known.
        shown: whether this rank prints.
        clock: returns the time in seconds.
    """

    def __init__(self, total: int | None, shown: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._shown, self._clock = total, shown, clock
        self._done = self._tokens = 0
        self._start: float | None = None
        self._next = 0.0

    def begin(self, sentence: str) -> None:
        """Prints what is evaluated, before the first batch."""
        self._start = self._clock()
        self._next = self._start + _FIRST
        self._print(sentence)

    def add(self, tokens: int, amount: int | None = None) -> None:
        """Adds a batch, and prints a line if one is due.

        Args:
            tokens: its tokens.
            amount: what it adds to the total, if that is not tokens.
        """
        self._tokens += tokens
        self._done += tokens if amount is None else amount
        now = self._clock()
        if self._start is None or now < self._next:
            return
        seconds = now - self._start
        self._next = now + max(_NEXT, seconds / 20)  # an hour has few lines, too
        line = f"{format_count(self._tokens)} tokens in {format_duration(seconds)}, {format_count(self._tokens / seconds)} tokens/s"
        if self._total and self._done:
            share = min(1.0, self._done / self._total)
            line = f"{share:.1%}: {line}, about {format_duration(seconds / share - seconds)} left"
        self._print(line)

    def _print(self, line: str) -> None:
        if self._shown:
            print_line(line, stderr=True)
