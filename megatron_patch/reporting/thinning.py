"""Keeps a limited number of points of a curve, in one pass over a run of any length.

In: rows in the order of the run. Out: the rows that a chart needs.

How it works. Consecutive rows of a stage form bins of equal length, at first of one row each. When there are too many bins, each pair of
neighbors in a stage becomes one bin, so that the bins always cover the whole run evenly. A bin keeps its last row, the rows with the lowest
and the highest value of the charted loss, and the row with the highest gradient norm, so that no spike disappears. The first bin of a stage
also keeps its first row. All values of a row that is kept are exact: nothing is averaged. A short run is kept completely.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Row = tuple[Any, ...]
_KEPT = 4  # rows of a bin


@dataclass(slots=True)
class _Bin:
    stage: int
    count: int
    first: Row | None
    last: Row
    low: Row
    high: Row
    peak: Row


class Thinning:
    """The rows of one curve.

    Args:
        most_points: the largest number of rows to keep, apart from the edges of stages.
        stage: index of the value in a row that is the number of its stage.
        extremes: index of the value whose lowest and highest rows are kept.
        peak: index of the value whose highest row is kept.
    """

    def __init__(self, most_points: int, stage: int, extremes: int, peak: int) -> None:
        self.rows_per_bin = 1
        self._most, self._stage, self._extremes, self._peak = max(1, most_points), stage, extremes, peak
        self._bins: list[_Bin] = []
        self._next_merge = 0

    def add(self, row: Row) -> None:
        """Takes the next row."""
        stage, bins = row[self._stage], self._bins
        current = bins[-1] if bins else None
        if current is None or current.stage != stage:
            bins.append(_Bin(stage, 1, row, row, row, row, row))
        elif current.count >= self.rows_per_bin:
            bins.append(_Bin(stage, 1, None, row, row, row, row))
        else:
            current.count += 1
            current.last = row
            value, peak = row[self._extremes], row[self._peak]
            if value is not None:
                low, high = current.low[self._extremes], current.high[self._extremes]
                if low is None or value < low:
                    current.low = row
                if high is None or value > high:
                    current.high = row
            if peak is not None:
                highest = current.peak[self._peak]
                if highest is None or peak > highest:
                    current.peak = row
            return
        if len(bins) > self._next_merge and len(bins) * min(self.rows_per_bin, _KEPT) > self._most:
            self._merge()

    def _merge(self) -> None:
        merged: list[_Bin] = []
        for one in self._bins:
            before = merged[-1] if merged else None
            if before is not None and before.stage == one.stage and before.count <= self.rows_per_bin:
                before.count += one.count
                before.last = one.last
                before.low = _better(before.low, one.low, self._extremes, -1)
                before.high = _better(before.high, one.high, self._extremes, 1)
                before.peak = _better(before.peak, one.peak, self._peak, 1)
            else:
                merged.append(one)
        self._bins = merged
        self.rows_per_bin *= 2
        # Bins of different stages are never merged, so many short stages may leave many bins.
        self._next_merge = len(merged) * 5 // 4

    def rows(self) -> list[Row]:
        """Returns the rows that are kept, in order."""
        found: list[Row] = []
        for one in self._bins:
            kept = {id(row): row for row in (one.first, one.low, one.high, one.peak, one.last) if row is not None}
            found += sorted(kept.values(), key=lambda row: row[0])
        return found


def _better(first: Row, second: Row, index: int, sign: int) -> Row:
    """Returns the row with the larger value (`sign` 1) or the smaller one (-1); None is worst."""
    one, other = first[index], second[index]
    if one is None or other is None:
        return second if one is None else first
    return second if sign * other > sign * one else first
