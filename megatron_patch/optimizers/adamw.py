"""AdamW. In: parameter groups and options. Out: the fastest AdamW that is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_patch.config.options import ScheduleOptions


def make_adamw(groups: Sequence[dict[str, Any]], options: ScheduleOptions, offloaded: bool) -> torch.optim.Optimizer:
    """Returns NVIDIA Apex's fused AdamW if it is installed and the optimizer steps on a GPU, else the fused AdamW of torch.

    Args:
        groups: parameter groups, each with its own `weight_decay`.
        options: learning rate, both decay rates, epsilon.
        offloaded: whether the optimizer steps in host memory, where the kernels of Apex cannot run.
    """
    settings: dict[str, Any] = {
        "lr": options.lr,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_eps,
        "weight_decay": options.weight_decay,
    }
    if torch.cuda.is_available() and not offloaded:
        try:
            # The package named apex on PyPI is a different one, which lacks this class.
            from apex.optimizers import FusedAdam
        except (ImportError, AttributeError):
            pass
        else:
            return FusedAdam(groups, adam_w_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)
