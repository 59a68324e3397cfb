"""Expert parallelism: data-parallel ranks hold different experts, and send the pairs of positions and experts to each other.

In: rows of pairs, sorted by expert. Out: the rows of all ranks' pairs with this rank's experts, sorted by expert; and the results back
(GShard, arXiv 2006.16668, without a capacity: messages have the sizes that the choices give them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class ExpertParallel:
    """How the experts of a tensor-parallel rank are divided among neighbors in the data-parallel dimension.

    Args:
        rank: which of `size` equal parts, neighboring experts, is this rank's.
        size: number of ranks.
        group: their process group; None for one rank, or for a model that computes nothing (meta tensors).
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None


UNDIVIDED = ExpertParallel()
"""Each data-parallel rank holds all experts of its tensor-parallel rank."""


class ExpertExchange:
    """One exchange of pairs: which rows go to which rank, and the order of the rows that arrive.

    Creating it sends the number of pairs of each expert, and waits for those of the other ranks.

    Args:
        counts: int64 [experts of all these ranks], this rank's pairs of each expert.
        parallel: the ranks.
    """

    def __init__(self, counts: torch.Tensor, parallel: ExpertParallel) -> None:
        self._group = parallel.group
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=parallel.group)
        by_source = theirs.view(parallel.size, -1)  # [rank that sends, expert of this rank]
        sizes = torch.stack([counts.view(parallel.size, -1).sum(1), by_source.sum(1)]).tolist()
        self._sent, self._received = sizes
        self.ends = by_source.sum(0).cumsum(0)
        """int64 [experts of this rank], the number of arrived pairs of each expert and those before it."""
        experts = torch.arange(by_source.shape[1], device=counts.device).repeat(parallel.size)
        self._order = experts.repeat_interleave(theirs).argsort(stable=True)
        self._place = torch.empty_like(self._order).scatter_(0, self._order, torch.arange(len(self._order), device=counts.device))

    def send(self, rows: torch.Tensor) -> torch.Tensor:
        """Sends rows, sorted by expert, to the ranks of their experts; returns what arrives, sorted by expert."""
        arrived: torch.Tensor = _AllToAll.apply(rows, self._sent, self._received, self._group)
        result: torch.Tensor = _Permute.apply(arrived, self._order, self._place)
        return result

    def send_back(self, results: torch.Tensor) -> torch.Tensor:
        """Sends results, in the order of what `send` returned, to the ranks of the pairs; returns those of this rank's pairs, in order."""
        back: torch.Tensor = _Permute.apply(results, self._place, self._order)
        result: torch.Tensor = _AllToAll.apply(back, self._received, self._sent, self._group)
        return result


class _AllToAll(torch.autograd.Function):
    """Sends consecutive rows to each rank; the gradient goes back the same way."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None) -> torch.Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        return _all_to_all(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(rows: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None) -> torch.Tensor:
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result


class _Permute(torch.autograd.Function):
    """Rows in another order, whose inverse is known: the gradient is gathered, too, and not added up."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None
