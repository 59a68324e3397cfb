"""The output head and its loss in one operator, in chunks of rows: the logits of a whole batch never stand in memory.

In: hidden states, the head's weight (or a vocabulary shard of it) and K labels a row. Out: the summed loss; both gradients are made in the
forward pass, while a chunk's logits are at hand, and are scaled in the backward pass. The products are the vendor's (cuBLAS, the CPU's
BLAS), the rest is `fused_loss`' kernels. The weight's gradient is summed in float32 whatever the dtype.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import register_flop_formula

from megatron_patch.ops import native
from megatron_patch.ops.fused_loss import normalize
from megatron_patch.ops.plain import IGNORE_INDEX, accumulation_dtype, weight_of_labels

# Smaller chunks pay for reading and writing the weight's gradient once a chunk: about 333/C of the products' time for C rows.
CHUNK_ROWS = 4096


def linear_multi_token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    label_weights: torch.Tensor | None = None,
    z_loss: float = 0.0,
    vocab_start: int | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `plain.linear_multi_token_loss`, with the logits of at most `chunk_rows` rows in memory.

    Args:
        hidden: [N, H].
        weight: [V or a shard of it, H].
        labels: int64 [N, K]; IGNORE_INDEX is not scored.
        label_weights: [K], or None for 1.
        z_loss: each scored label's loss grows by z_loss · lse² (arXiv 2204.02311, section 5).
        vocab_start: the id of the shard's first row; None: all of the vocabulary is here.
        group: the ranks that hold the shards; they exchange [rows, 2 + K] floats once a chunk. The gradient for `hidden` is this shard's
            part; the parts of all shards sum to the whole.
        chunk_rows: rows at a time, from 1; chunks are of one size but for rounding.

    Returns:
        (sum of weighted losses, sum of weights of scored labels), float32 (float64 stays float64).

    Raises:
        ValueError: `labels` out of range (only where all of the vocabulary is here; on a GPU as `multi_token_loss` says), or an argument of
            another shape or dtype.
    """
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; allowed: 1 and more")
    dtype = accumulation_dtype(hidden.dtype)
    if label_weights is not None:
        label_weights = label_weights.to(dtype)
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    name = None if group is None else group.group_name
    operator = torch.ops.megatron_patch.linear_multi_token_loss
    loss, _, _ = operator(hidden, weight, labels, label_weights, z_loss, vocab_start, name, chunk_rows, differentiable)
    return loss, weight_of_labels(labels, label_weights, dtype)


def _add_product(total: torch.Tensor, first: torch.Tensor, second: torch.Tensor, beta: float) -> None:
    """Makes total = beta · total + firstᵀ @ second, in the dtype of total; with a beta of 0 what total held does not matter."""
    if first.dtype != total.dtype and total.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, first.t(), second, total.dtype, beta=beta, out=total)
    else:
        total.addmm_(first.t().to(total.dtype), second.to(total.dtype), beta=beta)


def _chunk_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_weights: torch.Tensor | None,
    z_loss: float,
    vocab_start: int | None,
    group: str | None,
    differentiable: bool,
) -> torch.Tensor:
    """The loss of each row; where asked for, its gradient replaces the logits."""
    if differentiable and group is None and vocab_start is None:
        return torch.ops.megatron_patch.multi_token_loss_and_gradient_(logits, labels, label_weights, z_loss)
    padding_alone = logits.shape[1] == 0
    if padding_alone:
        statistics = logits.new_zeros((labels.shape[0], 2 + labels.shape[1]), dtype=accumulation_dtype(logits.dtype))
        statistics[:, 0] = float("-inf")
    else:
        statistics = torch.ops.megatron_patch.multi_token_loss_statistics(logits, labels, vocab_start)
    normalizer, nll, lse = normalize(statistics, labels, group)
    scored = (labels != IGNORE_INDEX).to(nll.dtype)
    weights = scored if label_weights is None else scored * label_weights
    totals = weights.sum(dim=1)
    if differentiable and not padding_alone:
        grad_lse = (2 * z_loss) * lse * totals
        torch.ops.megatron_patch.multi_token_loss_gradient_(logits, labels, normalizer, weights, grad_lse, vocab_start)
    return (nll * weights).sum(dim=1) + z_loss * lse.square() * totals


def _linear_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    label_weights: torch.Tensor | None,
    z_loss: float,
    vocab_start: int | None,
    group: str | None,
    chunk_rows: int,
    differentiable: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} {list(hidden.shape)}, weight {weight.dtype} {list(weight.shape)}; "
            "allowed: [N, H] and [V, H] of one dtype"
        )
    rows, dtype = hidden.shape[0], accumulation_dtype(hidden.dtype)
    grad_hidden, grad_weight = _gradients(hidden, weight, differentiable)
    size = math.ceil(rows / max(1, math.ceil(rows / chunk_rows)))
    buffer = hidden.new_empty((size, weight.shape[0]))
    losses = hidden.new_empty(rows, dtype=dtype)
    for start in range(0, rows, max(1, size)):
        part = hidden[start : start + size]
        chunk = slice(start, start + len(part))
        logits = torch.mm(part, weight.t(), out=buffer[: len(part)])
        losses[chunk] = _chunk_loss(logits, labels[chunk], label_weights, z_loss, vocab_start, group, differentiable)
        if differentiable:
            torch.mm(logits, weight, out=grad_hidden[chunk])
            _add_product(grad_weight, logits, part, beta=0.0 if start == 0 else 1.0)
    return losses.sum(dtype=torch.float64).to(dtype), grad_hidden, grad_weight


def _scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The product, rounded once; the factor keeps its own dtype, and a GPU writes the result without a wider copy in between."""
    return torch.mul(gradient, factor.reshape(1, 1), out=gradient.new_empty(gradient.shape, dtype=dtype))


def _gradients(hidden: torch.Tensor, weight: torch.Tensor, differentiable: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for both gradients; none where they are not asked for."""
    dtype = accumulation_dtype(weight.dtype)
    if not differentiable:
        return hidden.new_empty(0), weight.new_empty(0, dtype=dtype)
    # Without rows nothing will be written into the weight's.
    make = torch.empty if hidden.shape[0] else torch.zeros
    return torch.empty_like(hidden, memory_format=torch.contiguous_format), make(weight.shape, dtype=dtype, device=weight.device)


def _register() -> None:
    library = "megatron_patch::linear_multi_token_loss"
    torch.library.define(
        library,
        "(Tensor hidden, Tensor weight, Tensor labels, Tensor? label_weights, float z_loss, int? vocab_start, str? group, int chunk_rows, "
        "bool differentiable) -> (Tensor, Tensor, Tensor)",
    )
    torch.library.impl(library, ("CPU", "CUDA"))(_linear_loss)

    @torch.library.register_fake(library)
    def _(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        label_weights: torch.Tensor | None,
        z_loss: float,
        vocab_start: int | None,
        group: str | None,
        chunk_rows: int,
        differentiable: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return hidden.new_empty((), dtype=accumulation_dtype(hidden.dtype)), *_gradients(hidden, weight, differentiable)

    def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        _, grad_hidden, grad_weight = output
        ctx.dtype = inputs[1].dtype
        ctx.mark_non_differentiable(grad_hidden, grad_weight)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_hidden, grad_weight)

    def derivative(ctx: Any, grad: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        grad_hidden, grad_weight = ctx.saved_tensors
        by_hidden = _scaled(grad_hidden, grad, ctx.dtype) if ctx.needs_input_grad[0] else None
        by_weight = _scaled(grad_weight, grad, ctx.dtype) if ctx.needs_input_grad[1] else None
        return by_hidden, by_weight, None, None, None, None, None, None, None

    torch.library.register_autograd(library, derivative, setup_context=remember)

    @register_flop_formula(torch.ops.megatron_patch.linear_multi_token_loss)  # type: ignore[untyped-decorator]
    def _(hidden: list[int], weight: list[int], *others: Any, **shapes: Any) -> int:
        """The logits' product, and one for each gradient."""
        return (3 if others[-1] else 1) * 2 * hidden[0] * hidden[1] * weight[0]


if native.load_error() is None:
    _register()
