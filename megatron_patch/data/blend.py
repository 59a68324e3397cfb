"""Maps each block to its corpus: a periodic table, made from weights, that keeps the proportions at every point.

In: weights. Out: block number -> (corpus, block number in the corpus), in constant time. The table solves the chairman assignment problem
of Tijdeman (1980): of k corpora, none ever differs by more than 1 - 1/(2k - 2) blocks from its share. The theorem bounds the positions at
which each turn of each corpus may stand. Scheduling unit jobs by earliest deadline first meets all bounds.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

LARGEST_PERIOD = 1 << 18
# Decimal weights are recovered exactly from normalized floats within this distance; other weights are not that close to a small fraction.
_SAME = 1e-14


def _counts(weights: Sequence[float], largest: int) -> list[int]:
    """Returns the turns of each corpus in a period.

    The period is the common denominator of the weights where that is small enough, so that the proportions are exact. Otherwise it is
    `largest`, divided by the method of largest remainders, with at least one turn for each corpus.
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
    # Rounding, and corpora of tiny weight, leave too few or too many turns: correct the counts that differ most from their shares.
    owed = [share * period - count for share, count in zip(shares, counts, strict=True)]
    while sum(counts) != period:
        up = sum(counts) < period
        candidates = [index for index, count in enumerate(counts) if up or count > 1]
        chosen = max(candidates, key=lambda index: owed[index] if up else -owed[index])
        counts[chosen] += 1 if up else -1
        owed[chosen] -= 1 if up else -1
    return counts


class Blend:
    """The periodic table of a blend.

    Args:
        weights: one for each corpus, above zero, with any sum.
        largest_period: weights whose common denominator is larger are rounded to fractions of this number.

    Raises:
        ValueError: there are no weights, or one is not a finite number above zero.
    """

    def __init__(self, weights: Sequence[float], largest_period: int = LARGEST_PERIOD) -> None:
        if not weights or not all(weight > 0 and math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights {list(weights)}; allowed: finite numbers above zero")
        self.size = len(weights)
        self.counts = np.array(_counts(weights, largest_period), dtype=np.int64)
        self.period = int(self.counts.sum())
        self.table = self._make_table()
        self.ordinals = np.zeros(self.period, dtype=np.int64)
        for corpus in range(self.size):
            self.ordinals[self.table == corpus] = np.arange(self.counts[corpus])

    def _make_table(self) -> npt.NDArray[np.int64]:
        """Returns the corpus of each block of a period."""
        if self.size == 1:
            return np.zeros(self.period, dtype=np.int64)
        corpora = np.repeat(np.arange(self.size), self.counts)
        turns = np.concatenate([np.arange(count) for count in self.counts])
        # A turn is due at turns * period / counts; Tijdeman's theorem allows 1/(2k - 2) of a turn on both sides.
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
        for entry, until in enumerate(begins):
            for number in range(arrived, until):
                heapq.heappush(waiting, urgent[number])
            arrived = until
            table[entry] = heapq.heappop(waiting) % self.size
        return table

    def locate(self, blocks: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Returns the corpus of each block, and the block's number among the blocks of this corpus, from 0."""
        periods, entries = np.divmod(blocks, self.period)
        corpora = self.table[entries]
        return corpora, periods * self.counts[corpora] + self.ordinals[entries]

    def consumed(self, blocks: int) -> npt.NDArray[np.int64]:
        """Returns how many of the first `blocks` blocks come from each corpus."""
        periods, rest = divmod(blocks, self.period)
        return periods * self.counts + np.bincount(self.table[:rest], minlength=self.size).astype(np.int64)
