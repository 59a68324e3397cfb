"""Which corpus the next block comes from: weights turned into a periodic table in which every beginning keeps the proportions.

In: weights. Out: block ordinal -> (corpus, ordinal in the corpus), in constant time. The table solves the chairman assignment problem of
Tijdeman (1980): among k corpora none is ever more than 1 - 1/(2k - 2) blocks ahead of or behind its share. His theorem bounds for each
turn of each corpus the places where it may stand; giving each place to the turn that must be placed first meets all bounds (unit jobs,
earliest deadline first).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

LARGEST_PERIOD = 1 << 18
# Decimal weights of so many digits come back exactly from floats that were normalised; no other weights are that near a small fraction.
_SAME = 1e-14


def _counts(weights: Sequence[float], largest: int) -> list[int]:
    """Turns of each corpus in a period.

    The weights' own common denominator is the period where it is small enough, so that the proportions are exact; otherwise the largest
    period, by largest remainders, with at least one turn for each.
    """
    total = sum(Fraction(weight) for weight in weights)
    shares = [Fraction(weight) / total for weight in weights]
    simple = [share.limit_denominator(largest) for share in shares]
    period = math.lcm(*(share.denominator for share in simple))
    near = all(abs(share - given) <= _SAME for share, given in zip(simple, shares, strict=True))
    if near and sum(simple) == 1 and min(simple) > 0 and period <= largest:
        return [int(share * period) for share in simple]
    period = max(largest, 2 * len(weights))
    counts = [max(1, int(share * period)) for share in shares]
    # Turns that rounding left over, or that corpora of tiny weight took from the others, go where counts and shares differ most.
    owed = [share * period - count for share, count in zip(shares, counts, strict=True)]
    while sum(counts) != period:
        up = sum(counts) < period
        candidates = [index for index, count in enumerate(counts) if up or count > 1]
        chosen = max(candidates, key=lambda index: owed[index] if up else -owed[index])
        counts[chosen] += 1 if up else -1
        owed[chosen] -= 1 if up else -1
    return counts


class Blend:
    """A periodic table of corpora.

    Args:
        weights: one for each corpus, above zero; their sum does not matter.
        largest_period: weights without a common denominator up to this are rounded to parts in it.

    Raises:
        ValueError: no weights, or one that is not a finite number above zero.
    """

    def __init__(self, weights: Sequence[float], largest_period: int = LARGEST_PERIOD) -> None:
        if not weights or not all(weight > 0 and math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights {list(weights)}; allowed: finite numbers above zero")
        self.size = len(weights)
        self.counts = np.array(_counts(weights, largest_period), dtype=np.int64)
        self.period = int(self.counts.sum())
        self.table = self._make()
        self.ordinals = np.zeros(self.period, dtype=np.int64)
        for corpus in range(self.size):
            self.ordinals[self.table == corpus] = np.arange(self.counts[corpus])

    def _make(self) -> npt.NDArray[np.int64]:
        if self.size == 1:
            return np.zeros(self.period, dtype=np.int64)
        corpora = np.repeat(np.arange(self.size), self.counts)
        turns = np.concatenate([np.arange(count) for count in self.counts])
        # With n places filled, turns * period / counts is where a turn is due; Tijdeman's slack of 1/(2k - 2) of a turn on both sides.
        scale = 2 * self.size - 2
        divisor = self.counts[corpora] * scale
        first = -(-self.period * (turns * scale + 1) // divisor) - 1
        last = self.period * ((turns + 1) * scale - 1) // divisor
        order = np.argsort(first, kind="stable")
        begins = np.searchsorted(first[order], np.arange(self.period), side="right").tolist()
        urgent = (last * self.size + corpora)[order].tolist()
        waiting: list[int] = []
        table = np.empty(self.period, dtype=np.int64)
        arrived = 0
        for place, until in enumerate(begins):
            for number in range(arrived, until):
                heapq.heappush(waiting, urgent[number])
            arrived = until
            table[place] = heapq.heappop(waiting) % self.size
        return table

    def locate(self, blocks: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(corpus, ordinal in the corpus) of each block."""
        periods, places = np.divmod(blocks, self.period)
        corpora = self.table[places]
        return corpora, periods * self.counts[corpora] + self.ordinals[places]

    def consumed(self, blocks: int) -> npt.NDArray[np.int64]:
        """Blocks that each corpus gave among the first `blocks`."""
        periods, rest = divmod(blocks, self.period)
        return periods * self.counts + np.bincount(self.table[:rest], minlength=self.size).astype(np.int64)
