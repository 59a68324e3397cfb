"""Which optimizers there are (no torch, so that a dry run and the planner can ask).

In: a name. Out: an `OptimizerType`: how the optimizer is made, and what a plan must know of it.

A user's own script adds an optimizer before it calls `megatron_patch.training.pretrain.main`:

    from megatron_patch.optimizers.registry import OPTIMIZERS

    OPTIMIZERS["adam"] = lambda groups, options, offloaded: torch.optim.Adam(groups, lr=options.lr)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_patch.config.options import ScheduleOptions
from megatron_patch.utils.registry import lookup

if TYPE_CHECKING:
    import torch

MakeOptimizer = Callable[[Sequence[dict[str, Any]], ScheduleOptions, bool], "torch.optim.Optimizer"]
"""A function of (parameter groups, schedule options, whether the optimizer steps in host memory)."""


@dataclass(frozen=True)
class OptimizerType:
    """An optimizer before it is made.

    Args:
        make: makes the optimizer.
        full_matrices: whether its update of a hidden matrix (`is_hidden_matrix`) needs the full matrix. These matrices then have a
            parameter group of their own, and the engine attaches the optimizer to the ranks that hold parts of them.
        hidden_states: number of float32 values that it keeps for each element of a hidden matrix; a plan counts them.
        other_states: the same for all other parameters.
    """

    make: MakeOptimizer
    full_matrices: bool = False
    hidden_states: int = 2
    other_states: int = 2


def _adamw(groups: Sequence[dict[str, Any]], options: ScheduleOptions, offloaded: bool) -> torch.optim.Optimizer:
    from megatron_patch.optimizers.adamw import make_adamw

    return make_adamw(groups, options, offloaded)


def _muon(groups: Sequence[dict[str, Any]], options: ScheduleOptions, offloaded: bool) -> torch.optim.Optimizer:
    from megatron_patch.optimizers.muon import make_muon

    return make_muon(groups, options, offloaded)


OPTIMIZERS: dict[str, OptimizerType | MakeOptimizer] = {
    "adamw": OptimizerType(_adamw),
    "muon": OptimizerType(_muon, full_matrices=True, hidden_states=1),
}
"""What `--optimizer NAME` accepts. An entry that is only a function stands for an `OptimizerType` with defaults."""


def optimizer_type(name: str) -> OptimizerType:
    """Returns the registered optimizer of a name.

    Raises:
        ConfigError: no optimizer has this name; the error lists the registered names and suggests the nearest one.
    """
    entry = lookup(OPTIMIZERS, name, "--optimizer", home="megatron_patch.optimizers.registry.OPTIMIZERS")
    return entry if isinstance(entry, OptimizerType) else OptimizerType(entry)
