"""A mixture of experts in place of a block's feed-forward layer: a router chooses `top_k` of E smaller feed-forward layers per position.

In: hidden states. Out: the weighted sum of what the chosen experts return. No position is dropped, and no expert has a capacity: the pairs
of positions and experts are sorted by expert, and each expert computes its pairs in one matrix product (as in MegaBlocks, arXiv
2211.15841). Scores and weights are computed in float32: in 16 bits another expert would be chosen for some positions.

Tensor-parallel ranks hold different experts. Each of them has all positions, chooses the same experts for them, and computes the pairs of
the experts that it holds; the sum over the ranks that completes a row-parallel layer adds up the results. Data-parallel ranks that divide
these experts further exchange pairs (`parallel.experts`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_patch.model.expert_balance import RouterBalance
from megatron_patch.model.expert_shape import ExpertShape
from megatron_patch.model.feed_forward import FeedForward
from megatron_patch.model.shape import ModelShape
from megatron_patch.parallel.experts import UNDIVIDED, ExpertExchange, ExpertParallel
from megatron_patch.parallel.tensor import (
    UNSHARDED,
    TensorParallel,
    all_reduce_gradient,
    copy_to_tensor_parallel,
    reduce_from_tensor_parallel,
)


class Router(nn.Module):
    """Chooses the experts of each position, and their weights.

    Args:
        shape: the model's shape.
        experts: the experts.
        parallel: the ranks that hold different experts; each of them chooses for all positions.
    """

    def __init__(self, shape: ModelShape, experts: ExpertShape, parallel: TensorParallel = UNSHARDED) -> None:
        super().__init__()
        self.experts, self.parallel = experts, parallel
        self.weight = nn.Parameter(torch.empty(experts.count, shape.hidden_size))
        self.balance = RouterBalance(experts, parallel)

    def forward(self, rows: torch.Tensor, counted: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Chooses the experts of positions.

        Args:
            rows: hidden states [N, H].
            counted: number of the first positions that count for the balance.

        Returns:
            (experts int64 [N, top_k], the best first; weights float32 [N, top_k]).
        """
        shape, balance = self.experts, self.balance
        wide = torch.promote_types(rows.dtype, torch.float32)
        logits = F.linear(rows.to(wide), all_reduce_gradient(self.weight, self.parallel).to(wide))
        if self.training and torch.is_grad_enabled():
            logits = balance.with_gradient(logits, counted)
        scores = logits.softmax(-1) if shape.score == "softmax" else logits.sigmoid()
        biased = scores if balance.bias is None else scores + balance.bias
        chosen = biased.detach().topk(shape.top_k, dim=-1).indices
        if self.training:
            balance.count_choices(chosen[:counted], scores[:counted].detach())
        weights = scores.gather(1, chosen)
        if shape.renormalized:
            total = weights.sum(-1, keepdim=True)
            weights = weights / (total if shape.score == "softmax" else total + 1e-20)  # all sigmoids may be 0
        return chosen, weights if shape.scaling == 1.0 else weights * shape.scaling


class GroupedLinear(nn.Module):
    """Computes x Wᵉᵀ, where W [experts, outputs, inputs] has a matrix for each expert e.

    Args:
        count: number of experts of this rank.
        inputs: input features.
        outputs: output features.
    """

    def __init__(self, count: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, outputs, inputs))

    def forward(self, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Multiplies rows by the matrices of their experts.

        Args:
            rows: [pairs, inputs], sorted by expert.
            ends: int32 [experts], the number of rows of each expert and those before it.

        Returns:
            [pairs, outputs].
        """
        if not len(rows):  # a rank whose experts no position chose
            return F.linear(rows, self.weight[0])
        if _has_grouped_products(rows, self.weight):
            result: torch.Tensor = F.grouped_mm(rows, self.weight.transpose(1, 2), offs=ends)
            return result
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        return torch.cat([F.linear(part, weight) for part, weight in zip(rows.split(sizes), self.weight, strict=True)])


def _has_grouped_products(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    # Rows must be of multiples of 16 bytes. On CPUs torch's kernel takes each dtype but float64, on GPUs bfloat16 alone.
    if any(size * rows.element_size() % 16 for size in weight.shape[1:]):
        return False
    return rows.dtype == torch.bfloat16 or (rows.device.type == "cpu" and rows.dtype != torch.float64)


class Experts(nn.Module):
    """The gated feed-forward layers of this rank's experts.

    Args:
        shape: the model's shape.
        experts: the experts.
        count: number of experts of this rank.
    """

    def __init__(self, shape: ModelShape, experts: ExpertShape, count: int) -> None:
        super().__init__()
        hidden, inner = shape.hidden_size, experts.ffn_hidden_size
        self.silu = shape.activation == "swiglu"
        self.gate = GroupedLinear(count, hidden, inner)
        self.up = GroupedLinear(count, hidden, inner)
        self.down = GroupedLinear(count, inner, hidden)

    def forward(self, rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Applies each expert to its rows.

        Args:
            rows: [pairs, H], sorted by expert.
            weights: float32 [pairs], factors of the results. They scale the inner activations, so that no further [pairs, H] is saved.
            ends: int32 [experts], the number of rows of each expert and those before it.

        Returns:
            [pairs, H].
        """
        gate = self.gate(rows, ends)
        inner = (F.silu(gate) if self.silu else F.gelu(gate, approximate="tanh")) * self.up(rows, ends)
        return self.down((inner * weights[:, None]).to(rows.dtype), ends)


class MixtureOfExperts(nn.Module):
    """The feed-forward layer of a block with experts: routed experts, and a shared one if the shape has it.

    Args:
        shape: the model's shape.
        experts: the experts.
        parallel: the ranks that share the layer.
        divided: the data-parallel ranks that divide the experts of a tensor-parallel rank.
    """

    def __init__(
        self, shape: ModelShape, experts: ExpertShape, parallel: TensorParallel = UNSHARDED, divided: ExpertParallel = UNDIVIDED
    ) -> None:
        super().__init__()
        self.top_k, self.parallel, self.divided = experts.top_k, parallel, divided
        self.count = parallel.shard_size(experts.count)
        self.router = Router(shape, experts, parallel)
        self.experts = Experts(shape, experts, self.count // divided.size)
        self.shared = FeedForward(shape, parallel, experts.shared_ffn_hidden_size) if experts.shared_ffn_hidden_size else None

    def forward(self, hidden: torch.Tensor, real_samples: int | None = None) -> torch.Tensor:
        """Computes the layer.

        Args:
            hidden: [B, T, H]; with sequence parallelism this rank's positions only.
            real_samples: number of samples, the first ones, that are no padding; None: all.

        Returns:
            Like `hidden`.
        """
        hidden = copy_to_tensor_parallel(hidden, self.parallel)
        rows = hidden.flatten(0, 1)
        counted = len(rows) if real_samples is None else real_samples * hidden.shape[1]
        chosen, weights = self.router(rows, counted)
        # A rank's number of pairs is different in each step, which torch.compile would compile anew; and its model of grouped products
        # knows bfloat16 only.
        compiles = self.parallel.size * self.divided.size == 1 and rows.dtype == torch.bfloat16
        compiles = compiles and _has_grouped_products(rows, self.experts.gate.weight)
        routed = self._routed if compiles or not torch.compiler.is_compiling() else _outside_graph(self._routed)
        partial: torch.Tensor = routed(rows, chosen, weights).view_as(hidden)
        if self.shared is not None:
            partial = partial + self.shared.partial(hidden)
        return reduce_from_tensor_parallel(partial, self.parallel)

    def _routed(self, rows: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Returns the weighted sum of the results of the experts of this tensor-parallel rank, [N, H]."""
        flat = chosen.flatten()
        order = flat.argsort(stable=True)  # pairs by expert
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        counts = torch.zeros(self.parallel.size * self.count, dtype=torch.int64, device=rows.device)
        counts = counts.scatter_add(0, flat, torch.ones_like(flat))
        ends = counts.cumsum(0)
        if self.parallel.size > 1:
            first = self.parallel.rank * self.count
            before, ends = (ends[first - 1] if first else ends.new_zeros(())), ends[first : first + self.count]
            begin, end = torch.stack([before, ends[-1]]).tolist()
            order, ends, counts = order[begin:end], ends - before, counts[first : first + self.count]
            # Pairs of experts of other ranks get the place after all own pairs.
            place = torch.where((place >= begin) & (place < end), place - begin, end - begin)
        pairs, factors = _Dispatch.apply(rows, order, place, self.top_k), weights.flatten()[order]
        if self.divided.size == 1:
            results = self.experts(pairs, factors, ends.to(torch.int32))
        else:
            exchange = ExpertExchange(counts, self.divided)
            results = self.experts(exchange.send(pairs), exchange.send(factors), exchange.ends.to(torch.int32))
            results = exchange.send_back(results)
        combined: torch.Tensor = _Combine.apply(results, order, place, self.top_k)
        return combined


def _outside_graph(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Returns a function that torch.compile leaves as it is."""
    eager: Callable[..., torch.Tensor] = torch.compiler.disable(function)
    return eager


def _sum_of_pairs(pairs: torch.Tensor, place: torch.Tensor, top_k: int) -> torch.Tensor:
    """Returns for each position the sum of its pairs, in the order of its choices, [N, H]; pairs of other ranks are zero."""
    if len(pairs) < len(place):
        pairs = F.pad(pairs, (0, 0, 0, 1))
    return pairs[place].unflatten(0, (-1, top_k)).sum(1)


class _Dispatch(torch.autograd.Function):
    """Forward, the row of each pair's position; backward, the sum over the pairs of each position, in a fixed order."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, place: torch.Tensor, top_k: int) -> torch.Tensor:
        ctx.save_for_backward(place)
        ctx.top_k = top_k
        return rows[order // top_k]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        (place,) = ctx.saved_tensors
        return _sum_of_pairs(grad, place, ctx.top_k), None, None, None


class _Combine(torch.autograd.Function):
    """Forward, the sum over the pairs of each position, in a fixed order; backward, the gradient of each pair's position."""

    @staticmethod
    def forward(ctx: Any, pairs: torch.Tensor, order: torch.Tensor, place: torch.Tensor, top_k: int) -> torch.Tensor:
        ctx.save_for_backward(order)
        ctx.top_k = top_k
        return _sum_of_pairs(pairs, place, top_k)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        (order,) = ctx.saved_tensors
        return grad[order // ctx.top_k], None, None, None
