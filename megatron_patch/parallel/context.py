"""Context parallelism: ranks share the positions of each sample, and inside of attention its heads (DeepSpeed-Ulysses, arXiv 2309.14509).

In: this rank's positions of queries, keys and values, with all heads of its layer. Out: all positions of this rank's heads, for attention
as one process computes it; and the result back. All other parts of a model see only the positions of their rank.

Where the heads cannot be shared, ranks gather the keys and values of all positions, and each computes attention for its own queries. Of
causal attention the last rank then has most to do, up to 2 - 1/size times the mean.

The ranks are neighbors among those that hold the same part of the model, which ZeRO, gradients and checkpoints treat as before. So the
number of ranks that share a sample may change from stage to stage, and nothing else changes with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ContextParallel:
    """How the positions of a sample are shared.

    A dataclass, not a tuple: DeepSpeed rebuilds tuples that go through its engine. The group is its name, which torch.compile reads.

    Args:
        rank: which of `size` equal parts, neighboring positions, is this rank's.
        size: number of ranks.
        group: name of their process group; "" for one rank.
        gathers: whether they gather keys and values, in place of sharing the heads.
    """

    rank: int = 0
    size: int = 1
    group: str = ""
    gathers: bool = False


UNSHARED = ContextParallel()
"""All positions of a sample are on one rank."""


class _Exchange(torch.autograd.Function):
    """Sends part i of [size, ...] to rank i, and puts what rank i sent in its place; the gradient goes back the same way."""

    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, group: str) -> torch.Tensor:
        ctx.group = group
        return _all_to_all(parts, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return _all_to_all(grad, ctx.group), None


def _all_to_all(parts: torch.Tensor, group: str) -> torch.Tensor:
    one_each = [1] * parts.shape[0]
    # A functional collective, which torch.compile keeps in its graph.
    collectives = torch.ops._c10d_functional
    received: torch.Tensor = collectives.wait_tensor(collectives.all_to_all_single(parts.contiguous(), one_each, one_each, group))
    return received


def share_heads(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, context: ContextParallel
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns all positions of this rank's heads; one exchange of all three.

    Args:
        queries: [B, heads, T / size, head_size], this rank's positions of all heads.
        keys: [B, groups, T / size, head_size]. Groups fewer than ranks are repeated first, so that each rank gets the one of its heads.
        values: like `keys`.
        context: the ranks.

    Returns:
        Queries [B, heads / size, T, head_size], and keys and values [B, max(1, groups / size), T, head_size], stored as [B, T, heads of all
        three, head_size]. If the ranks gather: the queries as they are, and keys and values of all positions.
    """
    if context.size == 1:
        return queries, keys, values
    if context.gathers:
        return queries, *gather_positions(keys, values, context)
    times = max(1, context.size // keys.shape[1])
    by_rank = [_heads_by_rank(tensor, context.size) for tensor in (queries, _repeated(keys, times), _repeated(values, times))]
    received = _Exchange.apply(torch.cat(by_rank, dim=3), context.group)  # [size, B, T / size, heads of all three, head_size]
    whole = received.movedim(0, 1).flatten(1, 2).transpose(1, 2)
    own_queries, own_keys, own_values = whole.split([part.shape[3] for part in by_rank], dim=1)
    return own_queries, own_keys, own_values


class _Gather(torch.autograd.Function):
    """Puts what all ranks send together, [size, ...]; the gradients of all ranks are summed in float32 or wider, in the ranks' order."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, size: int, group: str) -> torch.Tensor:
        ctx.group = group
        collectives = torch.ops._c10d_functional
        gathered: torch.Tensor = collectives.wait_tensor(collectives.all_gather_into_tensor(part.contiguous(), size, group))
        return gathered.unflatten(0, (size, -1))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        # A reduce-scatter would send as much, and round each sum.
        received = _all_to_all(grad, ctx.group)
        return received.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(grad.dtype), None, None


def gather_positions(keys: torch.Tensor, values: torch.Tensor, context: ContextParallel) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns keys and values of all positions; one collective for both.

    Args:
        keys: [B, groups, T / size, head_size], this rank's positions.
        values: like `keys`.
        context: the ranks.

    Returns:
        Each [B, groups, T, head_size], stored as [B, T, keys and values, head_size].
    """
    both = torch.cat([keys, values], dim=1).transpose(1, 2)  # [B, T / size, 2 groups, head_size]
    gathered = _Gather.apply(both, context.size, context.group)  # [size, B, T / size, 2 groups, head_size]
    whole = gathered.movedim(0, 1).flatten(1, 2).transpose(1, 2)
    all_keys, all_values = whole.chunk(2, dim=1)
    return all_keys, all_values


def share_positions(attended: torch.Tensor, context: ContextParallel) -> torch.Tensor:
    """Returns this rank's positions of all heads, the inverse of `share_heads`.

    Args:
        attended: [B, heads / size, T, head_size], all positions of this rank's heads.
        context: the ranks.

    Returns:
        [B, heads, T / size, head_size], stored as [B, T / size, heads, head_size].
    """
    if context.size == 1 or context.gathers:
        return attended
    by_rank = attended.transpose(1, 2).unflatten(1, (context.size, -1)).movedim(1, 0)  # [size, B, T / size, heads / size, head_size]
    received = _Exchange.apply(by_rank, context.group)
    own: torch.Tensor = received.movedim(0, 2).flatten(2, 3).transpose(1, 2)
    return own


def _repeated(tensor: torch.Tensor, times: int) -> torch.Tensor:
    """Repeats key-value heads, copies of one next to each other."""
    return tensor if times == 1 else tensor[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)


def _heads_by_rank(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Divides the heads among the ranks: [B, heads, T / size, head_size] to a view [size, B, T / size, heads / size, head_size]."""
    return tensor.transpose(1, 2).unflatten(2, (size, -1)).movedim(2, 0)
