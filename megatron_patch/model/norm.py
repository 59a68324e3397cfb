"""Normalization over the last dimension, computed in float32 (float64 stays float64)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_patch.model.shape import ModelShape
from megatron_patch.parallel.tensor import UNSHARDED, TensorParallel, all_reduce_gradient, mean_over_tensor_parallel


class RMSNorm(nn.Module):
    """Computes x / sqrt(mean(x²) + ε) · weight (Zhang & Sennrich, arXiv 1910.07467).

    Args:
        size: size of the last dimension.
        epsilon: added to the mean square.
        parallel: ranks that each normalize a part of the activations; the weight's gradient is summed over them.
        zero_centered: whether the weight is stored minus 1; the product with it is then rounded once, as Gemma does.
    """

    def __init__(self, size: int, epsilon: float, parallel: TensorParallel = UNSHARDED, zero_centered: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if zero_centered else torch.ones(size))
        self.epsilon, self.parallel, self.zero_centered = epsilon, parallel, zero_centered

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalizes [..., size]."""
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.epsilon)
        weight = all_reduce_gradient(self.weight, self.parallel)
        if self.zero_centered:
            return (wide * (1.0 + weight.to(wide.dtype))).to(hidden.dtype)
        return weight * wide.to(hidden.dtype)


class AllHeadsNorm(nn.Module):
    """RMSNorm over the width of all heads of queries or keys together (OLMo 2, arXiv 2501.00656), of which each rank holds some.

    The ranks exchange the mean square of each position, one number, in both passes.

    Args:
        heads: number of heads of all ranks.
        head_size: width of a head.
        epsilon: added to the mean square.
        parallel: the ranks that share the heads.
        sharded: whether each rank holds heads of its own, and their weights; otherwise there are fewer heads than ranks, every rank holds
            all weights, and several ranks normalize copies of one head.
    """

    def __init__(self, heads: int, head_size: int, epsilon: float, parallel: TensorParallel = UNSHARDED, sharded: bool = True) -> None:
        super().__init__()
        width = heads * head_size
        self.weight = nn.Parameter(torch.ones(parallel.shard_size(width) if sharded else width))
        self.epsilon, self.parallel = epsilon, parallel
        self.elements: slice | None = None
        if not sharded:
            head = parallel.rank * heads // parallel.size
            self.elements = slice(head * head_size, (head + 1) * head_size)

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """Normalizes this rank's heads, [..., heads, head_size]."""
        wide = heads.flatten(-2).to(torch.promote_types(heads.dtype, torch.float32))
        # All ranks hold equally many heads, so the mean of their means is the mean over all.
        square = mean_over_tensor_parallel(wide.square().mean(dim=-1, keepdim=True), self.parallel)
        wide = wide * torch.rsqrt(square + self.epsilon)
        weight = self.weight if self.elements is None else all_reduce_gradient(self.weight, self.parallel)[self.elements]
        return (weight * wide.to(heads.dtype)).unflatten(-1, heads.shape[-2:])


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
    return RMSNorm(shape.hidden_size, shape.norm_epsilon, sharded, shape.zero_centered_norms)


def make_head_norm(shape: ModelShape, heads: int, parallel: TensorParallel = UNSHARDED) -> nn.Module | None:
    """Returns the norm of [..., heads of this rank, head_size] of queries or keys, or None in a model without such norms.

    Args:
        shape: the model's shape.
        heads: number of heads of all ranks: of query heads, or of query groups.
        parallel: the ranks that share the heads.
    """
    if not shape.qk_norm:
        return None
    if shape.qk_norm_scope == "all":
        return AllHeadsNorm(heads, shape.head_size, shape.norm_epsilon, parallel, sharded=heads % parallel.size == 0)
    # Each rank normalizes only its own heads, so the gradient of the weight is summed over the ranks.
    return RMSNorm(shape.head_size, shape.norm_epsilon, parallel, shape.zero_centered_norms)
