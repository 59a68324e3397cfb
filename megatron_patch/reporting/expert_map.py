"""The load of experts by block over a run of any length, as columns of a heat map.

In: the steps of a run in order, each with its place before and after. Out: `ExpertMap.as_record()`, plain JSON values for the page.

How it works. Consecutive steps of a stage form columns of equal length, at first of one step each. When there are too many cells, each
pair of neighbors in a stage becomes one column. A column has, for each block, the largest load, the most dead experts and the lowest
entropy of its steps, so that no spike disappears. Memory does not grow with the length of the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_COLUMNS = 600
MOST_CELLS = 40_000
"""Largest numbers of columns, and of columns times blocks, apart from those that the edges of stages add."""

Place = tuple[int, int, float, float]
"""Step, tokens, cost tokens and elapsed seconds."""


@dataclass(slots=True)
class _Column:
    """Steps that are shown together.

    Args:
        stage: number of their stage.
        patch_size: K of their stage.
        count: how many there are.
        begin: the place before the first of them.
        end: the place after the last of them.
        worst: float64 [3, blocks]: largest load, most dead experts, and the lowest entropy with its sign changed; NaN where unknown.
    """

    stage: int
    patch_size: int
    count: int
    begin: Place
    end: Place
    worst: np.ndarray[Any, np.dtype[np.float64]]


class ExpertMap:
    """The columns of one run.

    Args:
        most_columns: the largest number of columns, apart from the edges of stages.
        most_cells: the largest number of columns times blocks, likewise.
    """

    def __init__(self, most_columns: int = MOST_COLUMNS, most_cells: int = MOST_CELLS) -> None:
        self.steps_per_column = 1
        self._most_columns, self._most_cells = most_columns, most_cells
        self._blocks: dict[int, int] = {}
        self._columns: list[_Column] = []
        self._next_merge = 0

    def add(self, stage: int, patch_size: int, begin: Place, end: Place, experts: Sequence[Sequence[Any]]) -> None:
        """Takes the next step.

        Args:
            stage: number of its stage.
            patch_size: K of its stage.
            begin: the place before it.
            end: the place after it.
            experts: numbers of the blocks, and for each its load, dead experts and entropy, which may be None.
        """
        blocks, load, dead, entropy = experts
        worst = np.array([load, dead, [None if value is None else -value for value in entropy]], dtype=np.float64)
        worst = self._in_order(blocks, worst)
        current = self._columns[-1] if self._columns else None
        if current is not None and current.stage == stage and current.count < self.steps_per_column:
            current.count += 1
            current.end = end
            current.worst = np.fmax(_widened(current.worst, worst.shape[1]), worst)
            return
        self._columns.append(_Column(stage, patch_size, 1, begin, end, worst))
        many = len(self._columns) > max(1, min(self._most_columns, self._most_cells // len(self._blocks)))
        if many and len(self._columns) > self._next_merge:
            self._merge()

    def _in_order(self, blocks: Sequence[int], worst: Any) -> Any:
        """Returns the values of a step by the positions that blocks got when they first appeared."""
        at = [self._blocks.setdefault(block, len(self._blocks)) for block in blocks]
        result = np.full((3, len(self._blocks)), math.nan)
        result[:, at] = worst
        return result

    def _merge(self) -> None:
        merged: list[_Column] = []
        for one in self._columns:
            before = merged[-1] if merged else None
            if before is not None and before.stage == one.stage and before.count <= self.steps_per_column:
                before.count += one.count
                before.end = one.end
                before.worst = np.fmax(_widened(before.worst, one.worst.shape[1]), one.worst)
            else:
                merged.append(one)
        self._columns = merged
        self.steps_per_column *= 2
        # Columns of different stages are never merged, so many short stages may leave many columns.
        self._next_merge = len(merged) * 5 // 4

    def as_record(self, experts: int | None, top_k: int | None) -> dict[str, Any] | None:
        """Returns the map as plain JSON values; None of a run without experts.

        Its lists have one value for each column, or one list for each block in ascending order: `load`, `dead`, `entropy`. `most` is the
        largest load that is possible.

        Args:
            experts: number of experts of a block, if it is known.
            top_k: how many of them each position uses, if it is known.
        """
        if not self._columns:
            return None
        blocks = sorted(self._blocks)
        cells = np.stack([_widened(column.worst, len(blocks)) for column in self._columns])[:, :, [self._blocks[block] for block in blocks]]
        cells[:, 2] *= -1.0
        load, dead, entropy = ([[_number(value) for value in row] for row in cells[:, kind].T.tolist()] for kind in range(3))
        ends = [dict(zip(("step", "tokens", "cost_tokens", "seconds"), column.end, strict=True)) for column in self._columns]
        begins = [dict(zip(("step", "tokens", "cost_tokens", "seconds"), column.begin, strict=True)) for column in self._columns]
        return {
            "blocks": blocks,
            "experts": experts,
            "most": experts / top_k if experts is not None and top_k is not None else None,
            "steps_per_column": self.steps_per_column,
            "patch_size": [column.patch_size for column in self._columns],
            "begin": {name: [place[name] for place in begins] for name in begins[0]},
            "end": {name: [place[name] for place in ends] for name in ends[0]},
            "load": load,
            "dead": dead,
            "entropy": entropy,
        }


def _widened(values: Any, blocks: int) -> Any:
    """Returns [3, blocks], with NaN for blocks that `values` lacks."""
    missing = blocks - values.shape[1]
    return values if missing <= 0 else np.pad(values, ((0, 0), (0, missing)), constant_values=math.nan)


def _number(value: float) -> float | None:
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() else round(value, 3)
