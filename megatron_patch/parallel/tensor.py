"""Tensor and sequence parallelism: the collectives around a sharded layer (Megatron-LM, arXiv 1909.08053; 2205.05198).

In: activations. Out: the same activations, reduced, gathered or scattered over the tensor-parallel ranks, with the matching gradient.
The first half of a layer is column-parallel and needs all of the input (`copy_to_tensor_parallel`); the second half is row-parallel and
computes a partial sum on each rank (`reduce_from_tensor_parallel`). With sequence parallelism the residual stream between layers is
sharded along positions: the first function gathers the positions and the second reduce-scatters them. Together they send as many bytes
as the all-reduce that they replace. Which part of a weight a rank holds is decided in model/sharding.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_POSITIONS = 1


@dataclass(frozen=True)
class TensorParallel:
    """How each layer is sharded.

    Args:
        rank: number of this rank's shard.
        size: number of shards.
        group: process group of the ranks; None for a single shard, or for a model that computes nothing (meta tensors).
        sequence: whether positions are sharded between the layers (sequence parallelism).
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    sequence: bool = False

    def shard_size(self, size: int) -> int:
        """Returns this rank's share of a dimension whose size is a multiple of the number of shards."""
        return size // self.size


UNSHARDED = TensorParallel()
"""Layers that are not sharded."""


# Functional collectives: torch.compile keeps them in its graph, and NCCL reduces and gathers without extra copies.
_collectives = torch.ops._c10d_functional


def _group_name(parallel: TensorParallel) -> str:
    assert parallel.group is not None
    return parallel.group.group_name


def _all_reduce(tensor: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
    total: torch.Tensor = _collectives.wait_tensor(_collectives.all_reduce(tensor.contiguous(), "sum", _group_name(parallel)))
    return total


def _gather(tensor: torch.Tensor, parallel: TensorParallel, dim: int) -> torch.Tensor:
    """Concatenates [..., n, ...] of each rank along `dim` to [..., size·n, ...] on all ranks."""
    gathered = _collectives.all_gather_into_tensor(tensor.contiguous(), parallel.size, _group_name(parallel))
    parts = _collectives.wait_tensor(gathered).view(parallel.size, *tensor.shape)
    dim %= tensor.ndim
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def _reduce_scatter(tensor: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
    """Sums [B, T, H] over the ranks and returns this rank's positions of the sum, [B, T / size, H]."""
    parts = tensor.unflatten(_POSITIONS, (parallel.size, -1)).movedim(_POSITIONS, 0).contiguous()
    scattered = _collectives.reduce_scatter_tensor(parts.flatten(0, 1), "sum", parallel.size, _group_name(parallel))
    result: torch.Tensor = _collectives.wait_tensor(scattered)
    return result


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
        ctx.parallel = parallel
        return _gather(hidden, parallel, _POSITIONS) if parallel.sequence else hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        parallel = ctx.parallel
        return (_reduce_scatter(grad, parallel) if parallel.sequence else _all_reduce(grad, parallel)), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
        ctx.parallel = parallel
        return _reduce_scatter(partial, parallel) if parallel.sequence else _all_reduce(partial, parallel)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return (_gather(grad, ctx.parallel, _POSITIONS) if ctx.parallel.sequence else grad), None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
        ctx.parallel = parallel
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        # In float32: a sum in 16 bits would be rounded on each rank on its way through the ring.
        return _all_reduce(grad.to(torch.promote_types(grad.dtype, torch.float32)), ctx.parallel).to(grad.dtype), None


def copy_to_tensor_parallel(hidden: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
    """Prepares the input of a column-parallel layer: forward, all positions on each rank; backward, the gradient summed over the ranks.

    Args:
        hidden: [B, T, H], or with sequence parallelism this rank's positions, [B, T / size, H].
        parallel: how the layer is sharded.

    Returns:
        [B, T, H].
    """
    return hidden if parallel.size == 1 else _CopyTo.apply(hidden, parallel)


def reduce_from_tensor_parallel(partial: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
    """Completes the output of a row-parallel layer: forward, the sum over the ranks; backward, the gradient on each rank.

    Args:
        partial: [B, T, H], this rank's partial sum.
        parallel: how the layer is sharded.

    Returns:
        [B, T, H], or with sequence parallelism this rank's positions, [B, T / size, H].
    """
    return partial if parallel.size == 1 else _ReduceFrom.apply(partial, parallel)


def all_reduce_gradient(tensor: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
    """Returns a parameter that every rank holds in full, such that its gradient is summed over the ranks.

    Needed where each rank applies the parameter to only some of the positions or heads.
    """
    return tensor if parallel.size == 1 else _SumGradient.apply(tensor, parallel)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
        ctx.parallel = parallel
        return _all_reduce(tensor, parallel) / parallel.size

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return _all_reduce(grad, ctx.parallel) / ctx.parallel.size, None


def mean_over_tensor_parallel(tensor: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
    """Returns the mean of a tensor over the ranks, on all of them.

    Each rank goes on to compute something else with the mean, so the backward pass sums the gradients of all ranks, too.
    """
    return tensor if parallel.size == 1 else _Mean.apply(tensor, parallel)


def gather_last_dim(tensor: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
    """Concatenates [..., n] of each rank to [..., size·n] on all ranks; no gradient flows back."""
    return tensor if parallel.size == 1 else _gather(tensor.detach(), parallel, -1)


def shard_positions(tensor: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
    """Returns this rank's positions of [B or 1, T]: all of them unless positions are sharded."""
    return tensor.chunk(parallel.size, dim=_POSITIONS)[parallel.rank] if parallel.sequence else tensor


class RowParallelLinear(nn.Linear):
    """The row-parallel layer y = x Wᵀ + b: this rank holds a shard of the inputs, that is of x and of the columns of W.

    Args:
        inputs: input features of the full layer, a multiple of the number of shards.
        outputs: output features.
        bias: whether there is a bias; it is added once, after the sum over the ranks.
        parallel: how the layer is sharded.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, parallel: TensorParallel) -> None:
        super().__init__(parallel.shard_size(inputs), outputs, bias=bias)
        self.parallel = parallel

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Maps [B, T, inputs / size] to [B, T, outputs], or with sequence parallelism to this rank's positions, [B, T / size, outputs]."""
        if self.parallel.size == 1:
            return super().forward(input)
        total = reduce_from_tensor_parallel(nn.functional.linear(input, self.weight), self.parallel)
        if self.bias is None:
            return total
        return total + (all_reduce_gradient(self.bias, self.parallel) if self.parallel.sequence else self.bias)
