"""The switch to a stage, for an optimizer of torch. In: the optimizer and the stage that begins. Out: its state kept, cleared or zeroed."""

from __future__ import annotations

import torch

from megatron_patch.errors import ConfigError
from megatron_patch.stages import Stage


def switch_optimizer(optimizer: torch.optim.Optimizer, stage: Stage) -> None:
    """Keeps, clears or zeroes an optimizer's state, as the stage that begins says (`Stage.optimizer`).

    "keep" leaves the state as it is. "reset" removes it, as if the optimizer was new; it must make its state in its first step, as AdamW,
    Muon and SGD do. "reset_moments" sets its tensors to zero and keeps `step`, so that there is no new bias correction.

    Args:
        optimizer: the optimizer, whose gradients are empty; tensors of its state may be sharded (FSDP2).
        stage: the stage that begins.

    Raises:
        ConfigError: a parameter has a gradient: the switch would be in the middle of an accumulation.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.AdamW([weight])
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
        >>> switch_optimizer(optimizer, Stage("token", 1, 16, 1, 1, 1, optimizer="reset"))
        >>> len(optimizer.state)
        0
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(parameter.grad is not None and bool((parameter.grad != 0).any()) for parameter in parameters):
        raise ConfigError(
            f"the switch to stage {stage.name!r} comes while parameters have gradients, in the middle of an accumulation",
            "a switch between two steps",
            "call optimizer.step() and optimizer.zero_grad() before the switch, and use as many micro-batches in a step as the plan has: "
            "Stage.gradient_accumulation(ranks)",
        )
    if stage.optimizer == "reset":
        optimizer.state.clear()
    elif stage.optimizer == "reset_moments":
        for state in optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and name != "step":
                    value.zero_()
