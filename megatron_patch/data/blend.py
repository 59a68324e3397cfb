"""Which corpus the next block comes from: weights turned into a periodic table in which every beginning keeps the proportions.

In: weights. Out: block ordinal -> (corpus, ordinal in the corpus), in constant time. The table is made by Tijdeman's rule for the
chairman assignment problem (1980): of the corpora that have fallen behind far enough take the one whose next turn is due first; then no
corpus is ever a whole block ahead of or behind its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

PERIOD = 1 << 14


def _counts(weights: Sequence[float], period: int) -> list[int]:
    """Turns of each corpus in a period: largest remainders, each at least one."""
    total = sum(weights)
    shares = [Fraction(weight) / Fraction(total) * period for weight in weights]
    counts = [max(1, int(share)) for share in shares]
    order = sorted(range(len(shares)), key=lambda index: int(shares[index]) - shares[index])
    for turn in range(max(0, period - sum(counts))):
        counts[order[turn % len(order)]] += 1
    while sum(counts) > period:
        counts[counts.index(max(counts))] -= 1
    return counts


class Blend:
    """A periodic table of corpora.

    Args:
        weights: one for each corpus, above zero.
        period: length of the table; weights are exact to one part in it.
    """

    def __init__(self, weights: Sequence[float], period: int = PERIOD) -> None:
        self.size = len(weights)
        if self.size == 1:
            period = 1
        while period < 64 * self.size and self.size > 1:
            period *= 2
        self.period = period
        self.counts = np.array(_counts(weights, period), dtype=np.int64)
        self.table = self._make()
        self.ordinals = np.zeros(period, dtype=np.int64)
        for corpus in range(self.size):
            mine = self.table == corpus
            self.ordinals[mine] = np.arange(int(mine.sum()))

    def _make(self) -> npt.NDArray[np.int64]:
        if self.size == 1:
            return np.zeros(self.period, dtype=np.int64)
        shares = self.counts / self.period
        slack = 1.0 / (2 * self.size - 2)
        taken = np.zeros(self.size, dtype=np.int64)
        table = np.empty(self.period, dtype=np.int64)
        for turn in range(self.period):
            behind = shares * (turn + 1) - taken
            deadlines = np.where(behind >= slack - 1e-9, (taken + 1 - slack) / shares, np.inf)
            chosen = int(deadlines.argmin())
            table[turn] = chosen
            taken[chosen] += 1
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
