"""Finds blocks of which few experts are used.

In: `StepRecord`, which has the same loads on all ranks. Out: `Collapse`, which the trainer reports as an event. Nothing is computed on a
device, and no rank waits for another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_patch.model.expert_shape import ExpertShape
from megatron_patch.stages import Stage
from megatron_patch.training.callbacks.base import StepRecord

WINDOW = 100
"""Number of steps that are averaged; the first ones of a run, in which routers may still change quickly, do not count."""
LARGEST_IMBALANCE = 0.9
"""A block has collapsed if the load above the mean reaches this share of the largest that is possible."""
_FEWEST = 4
"""Positions of a step that choose an expert, and those that do not, on average: with fewer, all or none may choose it by chance."""

_LARGE_BIAS_RATE = 0.05  # with larger ones, biases outweigh the scores, and all positions choose the same experts in turn


@dataclass(frozen=True)
class Collapse:
    """A block of which few experts are used.

    Args:
        message: a sentence with the numbers, and what to do.
        details: block, mean of the largest load, mean number of dead experts, experts, stage, as plain JSON values.
    """

    message: str
    details: dict[str, Any]


@dataclass
class _Sums:
    """Sums over the window, for one block."""

    load: float = 0.0
    dead: int = 0


class ExpertLoadMonitor:
    """Finds blocks that have collapsed, each at most once in a stage.

    It compares means over windows of `WINDOW` steps. A switch begins a new window, and so does a resumption. A stage whose steps have so
    few positions that chance looks like a collapse is not watched.

    Args:
        experts: the experts of the model; None: it has none.
        stages: the stages of the run.
    """

    def __init__(self, experts: ExpertShape | None, stages: Sequence[Stage]) -> None:
        self._experts, self._stages = experts, stages
        self._stage_index = -1
        self._steps = 0
        self._sums: dict[int, _Sums] = {}
        self._found: set[int] = set()

    def add(self, record: StepRecord) -> list[Collapse]:
        """Adds a step, and returns the blocks that have collapsed, at the end of a window."""
        if record.stage_index != self._stage_index:
            self._stage_index, self._steps, self._sums, self._found = record.stage_index, 0, {}, set()
        if not self._watches(record):
            return []
        self._steps += 1
        for block, load, dead in zip(record.expert_blocks, record.expert_load, record.dead_experts, strict=True):
            sums = self._sums.setdefault(block, _Sums())
            sums.load += load
            sums.dead += dead
        if self._steps < WINDOW:
            return []
        means = {block: (sums.load / WINDOW, sums.dead / WINDOW) for block, sums in self._sums.items() if block not in self._found}
        self._steps, self._sums = 0, {}
        collapses = [self._collapse(block, load, dead) for block, (load, dead) in means.items() if self._has_collapsed(load, dead)]
        self._found |= {collapse.details["block"] for collapse in collapses}
        return collapses

    def _watches(self, record: StepRecord) -> bool:
        experts = self._experts
        if experts is None or not record.expert_blocks or record.step <= WINDOW:
            return False
        choosing = self._stages[record.stage_index].positions_per_step * experts.top_k / experts.count
        not_choosing = self._stages[record.stage_index].positions_per_step - choosing
        return min(choosing, not_choosing) >= _FEWEST

    @property
    def _largest_load(self) -> float:
        """Load over the mean of an expert that every position chooses."""
        assert self._experts is not None
        return self._experts.count / self._experts.top_k

    def _has_collapsed(self, load: float, dead: float) -> bool:
        assert self._experts is not None
        return load - 1.0 >= LARGEST_IMBALANCE * (self._largest_load - 1.0) or dead >= self._experts.count / 2

    def _collapse(self, block: int, load: float, dead: float) -> Collapse:
        assert self._experts is not None
        count, stage = self._experts.count, self._stages[self._stage_index]
        found = f"the most used expert gets {load:.1f} times the mean load (possible: {self._largest_load:.1f})"
        message = (
            f"the experts of block {block} have collapsed: on average over the last {WINDOW} steps, {found}, and no position uses "
            f"{dead:.1f} of {count} experts; {self._advice(stage)}"
        )
        details = {"block": block, "expert_load": round(load, 3), "dead_experts": round(dead, 2), "experts": count, "stage": stage.name}
        return Collapse(message, details)

    def _advice(self, stage: Stage) -> str:
        """Returns what to do, by how the stage balances the load. All but the last can change when a run resumes."""
        assert self._experts is not None
        balance = stage.expert_balance
        if balance.aux_loss_coeff > 0:
            first = f"raise --moe-aux-loss-coeff (now {balance.aux_loss_coeff:g})"
        else:
            first = "turn on the auxiliary loss (--moe-router-load-balancing-type global_aux_loss, --moe-aux-loss-coeff 0.01)"
        if self._experts.bias:
            change = "raise" if balance.bias_update_rate < _LARGE_BIAS_RATE else "lower"
            last = f"{change} --moe-router-bias-update-rate (now {balance.bias_update_rate:g})"
        else:
            last = "start a new run with --moe-router-enable-expert-bias"
        own = [f"moe_aux_loss_coeff of {stage.name!r} in stages:"] if len(self._stages) > 1 else []
        return ", or ".join([first, *own, last])
