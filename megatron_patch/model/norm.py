"""Normalization over the last dimension, computed in float32 (float64 stays float64)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_patch.model.shape import ModelShape
from megatron_patch.parallel.tensor import UNSHARDED, TensorParallel, all_reduce_gradient


class RMSNorm(nn.Module):
    """Computes x / sqrt(mean(x²) + ε) · weight (Zhang & Sennrich, arXiv 1910.07467).

    Args:
        size: size of the last dimension.
        epsilon: added to the mean square.
        parallel: ranks that each normalize a part of the activations; the weight's gradient is summed over them.
    """

    def __init__(self, size: int, epsilon: float, parallel: TensorParallel = UNSHARDED) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon, self.parallel = epsilon, parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalizes [..., size]."""
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.epsilon)
        return all_reduce_gradient(self.weight, self.parallel) * wide.to(hidden.dtype)


class LayerNorm(nn.LayerNorm):
    """Computes (x - mean) / sqrt(variance + ε) · weight + bias (arXiv 1607.06450).

    Args:
        size: size of the last dimension.
        epsilon: added to the variance.
        parallel: ranks that each normalize a part of the activations; the gradients of weight and bias are summed over them.
    """

    def __init__(self, size: int, epsilon: float, parallel: TensorParallel = UNSHARDED) -> None:
        super().__init__(size, eps=epsilon)
        self.parallel = parallel

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalizes [..., size]."""
        weight, bias = all_reduce_gradient(self.weight, self.parallel), all_reduce_gradient(self.bias, self.parallel)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


def make_norm(shape: ModelShape, parallel: TensorParallel = UNSHARDED) -> nn.Module:
    """Returns a norm of the residual stream, of the shape's kind; with sequence parallelism each rank normalizes its positions."""
    sharded = parallel if parallel.sequence else UNSHARDED
    if shape.normalization == "LayerNorm":
        return LayerNorm(shape.hidden_size, shape.norm_epsilon, sharded)
    return RMSNorm(shape.hidden_size, shape.norm_epsilon, sharded)
