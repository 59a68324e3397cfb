"""Normalisation over the last dimension, computed in float32 (float64 stays float64)."""

from __future__ import annotations

import torch
from torch import nn

from megatron_patch.model.shape import ModelShape


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) · weight (Zhang & Sennrich, arXiv 1910.07467)."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalises [..., size]."""
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.epsilon)
        return self.weight * wide.to(hidden.dtype)


def make_norm(shape: ModelShape) -> nn.Module:
    """The norm of the residual stream that the shape asks for."""
    if shape.normalization == "LayerNorm":
        return nn.LayerNorm(shape.hidden_size, eps=shape.norm_epsilon)
    return RMSNorm(shape.hidden_size, shape.norm_epsilon)
