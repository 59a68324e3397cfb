"""Normalisation over the last dimension, computed in float32 (float64 stays float64)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_patch.model.shape import ModelShape
from megatron_patch.parallel.tensor import UNSHARDED, TensorParallel, all_reduce_gradient


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) · weight (Zhang & Sennrich, arXiv 1910.07467).

    Args:
        size: of the last dimension.
        epsilon: added to the mean square.
        parallel: ranks that each see a part of what is normalised, so that the weight's gradients are summed over them.
    """

    def __init__(self, size: int, epsilon: float, parallel: TensorParallel = UNSHARDED) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon, self.parallel = epsilon, parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalises [..., size]."""
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.epsilon)
        return all_reduce_gradient(self.weight, self.parallel) * wide.to(hidden.dtype)


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(variance + ε) · weight + bias (arXiv 1607.06450); `parallel` as in `RMSNorm`."""

    def __init__(self, size: int, epsilon: float, parallel: TensorParallel = UNSHARDED) -> None:
        super().__init__(size, eps=epsilon)
        self.parallel = parallel

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalises [..., size]."""
        weight, bias = all_reduce_gradient(self.weight, self.parallel), all_reduce_gradient(self.bias, self.parallel)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


def make_norm(shape: ModelShape, parallel: TensorParallel = UNSHARDED) -> nn.Module:
    """The norm of the residual stream that the shape asks for; with sequence parallelism each rank normalises its positions."""
    seen_in_parts = parallel if parallel.sequence else UNSHARDED
    if shape.normalization == "LayerNorm":
        return LayerNorm(shape.hidden_size, shape.norm_epsilon, seen_in_parts)
    return RMSNorm(shape.hidden_size, shape.norm_epsilon, seen_in_parts)
