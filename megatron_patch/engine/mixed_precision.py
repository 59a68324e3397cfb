"""Lower precision for the forward pass of a module whose parameters stay float32. In: a module and a dtype. Out: a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class MixedPrecision(nn.Module):
    """Runs a float32 module with weights that are rounded to a lower precision in each forward pass.

    DeepSpeed's ZeRO 0 keeps no float32 master weights of a bfloat16 model and would accumulate gradients in bfloat16. With this wrapper
    weights and gradients stay float32.

    Args:
        module: the module, with float32 parameters.
        dtype: dtype of the rounded weights.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's forward pass with rounded weights."""
        rounded = {name: parameter.to(self.dtype) for name, parameter in self.module.named_parameters()}
        return torch.func.functional_call(self.module, rounded, args, kwargs, tie_weights=True)
