"""Tensor and sequence parallelism: the collectives at the edges of a sharded layer (Megatron-LM, arXiv 1909.08053; 2205.05198).

In: activations. Out: the same activations, reduced, gathered or scattered over the tensor-parallel ranks, with the matching gradient.
The first half of a layer is column-parallel and needs whole inputs (`copy_to_tensor_parallel`); the second half is row-parallel and
gives partial sums (`reduce_from_tensor_parallel`). With sequence parallelism the residual stream between layers is sharded along
positions: the first function gathers positions and the second reduce-scatters them, which moves the same bytes as the all-reduce that
they replace.
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
    """How each layer is shared.

    Args:
        rank: which part is mine.
        size: how many parts there are.
        group: the ranks; None for one part, or where nothing is computed (meta tensors).
        sequence: between layers, positions are sharded too.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    sequence: bool = False

    def part(self, size: int) -> int:
        """My share of something that divides."""
        return size // self.size


UNSHARDED = TensorParallel()
"""A model that is not shared."""


# Collectives as operators of the dispatcher: torch.compile keeps them in its graph, and NCCL reduces and gathers without copies.
_collectives = torch.ops._c10d_functional


def _name(parallel: TensorParallel) -> str:
    assert parallel.group is not None
    return parallel.group.group_name


def _all_reduce(tensor: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
    total: torch.Tensor = _collectives.wait_tensor(_collectives.all_reduce(tensor.contiguous(), "sum", _name(parallel)))
    return total


def _gather(tensor: torch.Tensor, parallel: TensorParallel, dim: int) -> torch.Tensor:
    """[..., n, ...] of each rank to [..., size·n, ...] on all."""
    gathered = _collectives.all_gather_into_tensor(tensor.contiguous(), parallel.size, _name(parallel))
    parts = _collectives.wait_tensor(gathered).view(parallel.size, *tensor.shape)
    dim %= tensor.ndim
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def _reduce_scatter(tensor: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
    """The sum over ranks, of which each keeps its positions."""
    parts = tensor.unflatten(_POSITIONS, (parallel.size, -1)).movedim(_POSITIONS, 0).contiguous()
    own = _collectives.reduce_scatter_tensor(parts.flatten(0, 1), "sum", parallel.size, _name(parallel))
    result: torch.Tensor = _collectives.wait_tensor(own)
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
        return _all_reduce(grad, ctx.parallel), None


def copy_to_tensor_parallel(hidden: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
    """Into a layer that is sharded by columns: whole positions forward; backward the sum of what the ranks' columns ask for.

    Args:
        hidden: [B, T, H], or with sequence parallelism this rank's positions, [B, T / size, H].
        parallel: the ranks that share the layer.

    Returns:
        [B, T, H].
    """
    return hidden if parallel.size == 1 else _CopyTo.apply(hidden, parallel)


def reduce_from_tensor_parallel(partial: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
    """Out of a layer that is sharded by rows: the sum of the ranks' parts, with sequence parallelism for this rank's positions alone.

    Args:
        partial: [B, T, H], this rank's part of a sum.
        parallel: the ranks that share the layer.

    Returns:
        [B, T, H], or [B, T / size, H].
    """
    return partial if parallel.size == 1 else _ReduceFrom.apply(partial, parallel)


def all_reduce_gradient(tensor: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
    """A parameter that all ranks hold, where each sees a part of the positions or heads: its gradients are summed over the ranks."""
    return tensor if parallel.size == 1 else _SumGradient.apply(tensor, parallel)


def gather_last_dim(tensor: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
    """[..., n] of each rank to [..., size·n] on all; without a gradient."""
    return tensor if parallel.size == 1 else _gather(tensor.detach(), parallel, -1)


def local_positions(tensor: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
    """[B or 1, T] to this rank's positions of it, where positions are sharded."""
    return tensor.chunk(parallel.size, dim=_POSITIONS)[parallel.rank] if parallel.sequence else tensor


class RowParallelLinear(nn.Linear):
    """y = x Wᵀ + b where this rank holds some columns of W, and its part of x.

    Args:
        inputs: of the whole layer, a multiple of the ranks.
        outputs: of the layer.
        bias: added once, behind the sum.
        parallel: the ranks that share it.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, parallel: TensorParallel) -> None:
        super().__init__(parallel.part(inputs), outputs, bias=bias)
        self.parallel = parallel

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[B, T, inputs / size] to [B, T, outputs], or with sequence parallelism to this rank's positions of it."""
        if self.parallel.size == 1:
            return super().forward(input)
        total = reduce_from_tensor_parallel(nn.functional.linear(input, self.weight), self.parallel)
        if self.bias is None:
            return total
        return total + (all_reduce_gradient(self.bias, self.parallel) if self.parallel.sequence else self.bias)
