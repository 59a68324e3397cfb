"""The optimizer: which AdamW, how its steps are counted, and what a switch of stages does to it.

In: parameter groups. Out: an optimizer whose state is `exp_avg` and `exp_avg_sq` for each tensor and one count of steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from megatron_patch.config.options import ScheduleOptions

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(groups: Sequence[dict[str, Any]], options: ScheduleOptions, offloaded: bool = False) -> torch.optim.Optimizer:
    """NVIDIA Apex' fused AdamW where it is installed and steps on a GPU, else torch's fused one; neither compiles anything.

    Args:
        groups: of parameters.
        options: the optimizer's settings.
        offloaded: it steps in the host's memory, which Apex' kernels cannot reach.
    """
    settings: dict[str, Any] = {
        "lr": options.lr,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_eps,
        "weight_decay": options.weight_decay,
    }
    if torch.cuda.is_available() and not offloaded:
        try:
            # The package named apex on PyPI is another one: only the class tells.
            from apex.optimizers import FusedAdam
        except (ImportError, AttributeError):
            pass
        else:
            return FusedAdam(groups, adam_w_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


def base_optimizer(wrapped: Any) -> torch.optim.Optimizer:
    """The optimizer inside DeepSpeed's wrappers."""
    while hasattr(wrapped, "optimizer"):
        wrapped = wrapped.optimizer
    return wrapped


def ensure_moments(optimizer: torch.optim.Optimizer, tensor: torch.Tensor) -> dict[str, Any]:
    """The state of a tensor, made (zero moments, no steps) where the optimizer has not stepped yet."""
    state = optimizer.state[tensor]
    if MOMENTS[0] not in state:
        if isinstance(optimizer, torch.optim.AdamW):
            state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        for name in MOMENTS:
            state[name] = torch.zeros_like(tensor)
    return state


def _counts_in_groups(optimizer: torch.optim.Optimizer) -> bool:
    return not isinstance(optimizer, torch.optim.AdamW)


def step_count(optimizer: torch.optim.Optimizer) -> int:
    """Optimizer steps since its state was made or reset (they decide the bias correction)."""
    if _counts_in_groups(optimizer):
        return int(max((group.get("step", 0) for group in optimizer.param_groups), default=0))
    return int(max((state["step"] for state in optimizer.state.values() if "step" in state), default=0))


def set_step_count(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Sets that number."""
    if _counts_in_groups(optimizer):
        for group in optimizer.param_groups:
            group["step"] = count
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"].fill_(count)
        elif "step" in state:
            state["step"] = count


def zero_moments(states: Iterable[dict[str, Any]]) -> None:
    """Zeroes both moments of each state."""
    for state in states:
        for name in MOMENTS:
            if name in state:
                state[name].zero_()
