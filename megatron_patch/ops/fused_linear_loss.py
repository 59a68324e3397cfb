"""The output head and its loss in one operator, in chunks of rows, so that the logits of a full batch are never in memory.

In: hidden states, the head's weight (or a vocabulary shard of it) and K labels for each row. Out: the summed loss. The forward pass
computes both gradients while it has a chunk's logits; the backward pass scales them. Matrix products use cuBLAS or the CPU's BLAS, the rest
the kernels of `fused_loss`. The weight's gradient is summed in float32 for every dtype. With an accumulator, the backward pass adds it
there; where the loss' gradient is known to be 1, the forward pass adds each product directly, without a temporary table.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import register_flop_formula

from megatron_patch.ops import native
from megatron_patch.ops.accumulation import check_accumulator, check_unit_gradient
from megatron_patch.ops.fused_loss import losses_from_statistics
from megatron_patch.ops.plain import IGNORE_INDEX, accumulation_dtype, weight_of_labels

# Each chunk reads and writes the weight's gradient once: with C rows, this takes about 333/C of the time of the matrix products.
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
    weight_grad_accumulator: torch.Tensor | None = None,
    unit_gradient: bool = False,
    logit_softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes `plain.linear_multi_token_loss` with the logits of at most `chunk_rows` rows in memory.

    Args:
        hidden: [N, H].
        weight: [V or a shard of it, H].
        labels: int64 [N, K]; IGNORE_INDEX is not scored.
        label_weights: [K], or None for 1.
        z_loss: z_loss · lse² is added to each scored label's loss (arXiv 2204.02311, section 5).
        vocab_start: the token id of the shard's first row; None: the weight has the full vocabulary.
        group: the ranks that hold the shards; they exchange [rows, 2 + K] floats once for each chunk. The gradient of `hidden` is this
            shard's part; the parts of all shards sum to the full gradient.
        chunk_rows: the most rows of a chunk, at least 1; chunks have the same size up to rounding.
        weight_grad_accumulator: tensor to which the weight's gradient is added (see `ops.accumulation`). None: the weight gets a gradient
            of its dtype.
        unit_gradient: True promises that the backward pass starts from this loss (see `ops.accumulation`). The forward pass then adds the
            weight's gradient to the accumulator.
        logit_softcap: the cap of the logits; see `plain.softcapped`. It takes one more chunk of logits in memory. None: no cap.

    Returns:
        (sum of weighted losses in nats, sum of the weights of scored labels), float32 (float64 stays float64).

    Raises:
        ValueError: `labels` out of range (checked only without `vocab_start`; on a GPU see `multi_token_loss`), an argument of the wrong
            shape or dtype, an accumulator that shares memory with the weight, or `unit_gradient` without an accumulator. With
            `unit_gradient`, the chunks before the one that raises have been added.
        TypeError: an accumulator that is not a tensor.
    """
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; allowed: 1 or more")
    dtype = accumulation_dtype(hidden.dtype)
    if label_weights is not None:
        label_weights = label_weights.to(dtype)
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    check_unit_gradient(unit_gradient, weight_grad_accumulator)
    if weight_grad_accumulator is not None:
        check_accumulator(weight_grad_accumulator, weight)
    name = None if group is None else group.group_name
    operators = torch.ops.megatron_patch
    arguments = (labels, label_weights, z_loss, vocab_start, name, chunk_rows)
    cap = 0.0 if logit_softcap is None else logit_softcap
    if unit_gradient and torch.is_grad_enabled() and weight.requires_grad:
        total, by_hidden = operators.linear_multi_token_loss_add_(
            weight_grad_accumulator, hidden.detach(), weight.detach(), *arguments, cap
        )
        loss = operators.with_gradient(hidden, weight, total, by_hidden)
    else:
        loss, _, _ = operators.linear_multi_token_loss(hidden, weight, *arguments, differentiable, weight_grad_accumulator, cap)
    return loss, weight_of_labels(labels, label_weights, dtype)


def _add_product(total: torch.Tensor, first: torch.Tensor, second: torch.Tensor, beta: float) -> None:
    """Sets total = beta · total + firstᵀ @ second, in the dtype of total; with beta 0, total may be uninitialized."""
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
    """Returns the loss of each row; if `differentiable`, overwrites the logits with its gradient."""
    if differentiable and group is None and vocab_start is None:
        return torch.ops.megatron_patch.multi_token_loss_and_gradient_(logits, labels, label_weights, z_loss)
    only_padding = logits.shape[1] == 0
    if only_padding:
        statistics = logits.new_zeros((labels.shape[0], 2 + labels.shape[1]), dtype=accumulation_dtype(logits.dtype))
        statistics[:, 0] = float("-inf")
    else:
        statistics = torch.ops.megatron_patch.multi_token_loss_statistics(logits, labels, vocab_start)
    normalizer, nll, lse = losses_from_statistics(statistics, labels, group)
    scored = (labels != IGNORE_INDEX).to(nll.dtype)
    weights = scored if label_weights is None else scored * label_weights
    totals = weights.sum(dim=1)
    if differentiable and not only_padding:
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
    weight_grad_accumulator: torch.Tensor | None = None,
    logit_softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (loss, gradient of hidden, gradient of weight); only the backward pass uses the accumulator."""
    grad_hidden, grad_weight = _gradients(hidden, weight, differentiable)
    arguments = (labels, label_weights, z_loss, vocab_start, group, chunk_rows, logit_softcap)
    loss = _sum_of_chunks(hidden, weight, *arguments, (grad_hidden, grad_weight) if differentiable else None, first_beta=0.0)
    return loss, grad_hidden, grad_weight


def _linear_loss_add(
    accumulator: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    label_weights: torch.Tensor | None,
    z_loss: float,
    vocab_start: int | None,
    group: str | None,
    chunk_rows: int,
    logit_softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (loss, gradient of hidden), and adds the weight's gradient to the accumulator."""
    by_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    arguments = (labels, label_weights, z_loss, vocab_start, group, chunk_rows, logit_softcap)
    return _sum_of_chunks(hidden, weight, *arguments, (by_hidden, accumulator), first_beta=1.0), by_hidden


def _sum_of_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    label_weights: torch.Tensor | None,
    z_loss: float,
    vocab_start: int | None,
    group: str | None,
    chunk_rows: int,
    logit_softcap: float,
    gradients: tuple[torch.Tensor, torch.Tensor] | None,
    first_beta: float,
) -> torch.Tensor:
    """Returns the loss, and writes the gradients of hidden and weight into the given tensors.

    Args:
        logit_softcap: the cap of the logits; 0: none.
        gradients: [N, H] in the dtype of hidden, and [V, H] in `accumulation_dtype`; or None.
        first_beta: factor of the second one's previous content: 1 adds to it, 0 overwrites it, so that it may be uninitialized.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} {list(hidden.shape)}, weight {weight.dtype} {list(weight.shape)}; "
            "allowed: [N, H] and [V, H] of one dtype"
        )
    rows, dtype = hidden.shape[0], accumulation_dtype(hidden.dtype)
    size = math.ceil(rows / max(1, math.ceil(rows / chunk_rows)))
    buffer = hidden.new_empty((size, weight.shape[0]))
    tanh = torch.empty_like(buffer) if logit_softcap else None
    losses = hidden.new_empty(rows, dtype=dtype)
    for start in range(0, rows, max(1, size)):
        part = hidden[start : start + size]
        chunk = slice(start, start + len(part))
        logits = torch.mm(part, weight.t(), out=buffer[: len(part)])
        if tanh is not None:
            capped = torch.div(logits, logit_softcap, out=tanh[: len(part)]).tanh_()
            torch.mul(capped, logit_softcap, out=logits)
        losses[chunk] = _chunk_loss(logits, labels[chunk], label_weights, z_loss, vocab_start, group, gradients is not None)
        if gradients is not None:
            if tanh is not None:
                torch.ops.aten.tanh_backward.grad_input(logits, capped, grad_input=logits)
            torch.mm(logits, weight, out=gradients[0][chunk])
            _add_product(gradients[1], logits, part, beta=first_beta if start == 0 else 1.0)
    return losses.sum(dtype=torch.float64).to(dtype)


def _scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns gradient · factor, rounded once; the factor keeps its dtype, and a GPU needs no wider temporary copy."""
    return torch.mul(gradient, factor.reshape(1, 1), out=gradient.new_empty(gradient.shape, dtype=dtype))


def _gradients(hidden: torch.Tensor, weight: torch.Tensor, differentiable: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns uninitialized tensors for both gradients; empty ones if not `differentiable`."""
    dtype = accumulation_dtype(weight.dtype)
    if not differentiable:
        return hidden.new_empty(0), weight.new_empty(0, dtype=dtype)
    # Without rows, nothing would be written to the weight's gradient.
    make = torch.empty if hidden.shape[0] else torch.zeros
    return torch.empty_like(hidden, memory_format=torch.contiguous_format), make(weight.shape, dtype=dtype, device=weight.device)


def _register() -> None:
    library = "megatron_patch::linear_multi_token_loss"
    torch.library.define(
        library,
        "(Tensor hidden, Tensor weight, Tensor labels, Tensor? label_weights, float z_loss, int? vocab_start, str? group, int chunk_rows, "
        "bool differentiable, Tensor? weight_grad_accumulator=None, float logit_softcap=0.0) -> (Tensor, Tensor, Tensor)",
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
        weight_grad_accumulator: torch.Tensor | None = None,
        logit_softcap: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return hidden.new_empty((), dtype=accumulation_dtype(hidden.dtype)), *_gradients(hidden, weight, differentiable)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        _, grad_hidden, grad_weight = output
        ctx.dtype = inputs[1].dtype
        # Not a saved tensor, because other backward passes may add to it before this one.
        ctx.accumulator = inputs[9]
        ctx.mark_non_differentiable(grad_hidden, grad_weight)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_hidden, grad_weight)

    def backward(ctx: Any, grad: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * 11
        grad_hidden, grad_weight = ctx.saved_tensors
        by_hidden = _scaled(grad_hidden, grad, ctx.dtype) if ctx.needs_input_grad[0] else None
        by_weight = None
        if ctx.needs_input_grad[1] and ctx.accumulator is not None:
            ctx.accumulator.addcmul_(grad_weight, grad.reshape(1, 1))
        elif ctx.needs_input_grad[1]:
            by_weight = _scaled(grad_weight, grad, ctx.dtype)
        return by_hidden, by_weight, *(None,) * 9

    torch.library.register_autograd(library, backward, setup_context=setup_context)

    @register_flop_formula(torch.ops.megatron_patch.linear_multi_token_loss)  # type: ignore[untyped-decorator]
    def _(hidden: list[int], weight: list[int], *others: Any, **shapes: Any) -> int:
        """The FLOPs of the logits' product, and of one product for each gradient."""
        return (3 if others[6] else 1) * 2 * hidden[0] * hidden[1] * weight[0]

    _register_addition()


def _register_addition() -> None:
    """Registers the operator that adds in its forward pass, and the one that connects its gradient to autograd."""
    library = "megatron_patch::linear_multi_token_loss_add_"
    torch.library.define(
        library,
        "(Tensor(a!) accumulator, Tensor hidden, Tensor weight, Tensor labels, Tensor? label_weights, float z_loss, int? vocab_start, "
        "str? group, int chunk_rows, float logit_softcap=0.0) -> (Tensor, Tensor)",
    )
    torch.library.impl(library, ("CPU", "CUDA"))(_linear_loss_add)

    @torch.library.register_fake(library)
    def _(accumulator: torch.Tensor, hidden: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss = hidden.new_empty((), dtype=accumulation_dtype(hidden.dtype))
        return loss, torch.empty_like(hidden, memory_format=torch.contiguous_format)

    @register_flop_formula(torch.ops.megatron_patch.linear_multi_token_loss_add_)  # type: ignore[untyped-decorator]
    def _(accumulator: list[int], hidden: list[int], weight: list[int], *others: Any, **shapes: Any) -> int:
        return 6 * hidden[0] * hidden[1] * weight[0]

    attach_gradient = "megatron_patch::with_gradient"
    torch.library.define(attach_gradient, "(Tensor hidden, Tensor weight, Tensor loss, Tensor by_hidden) -> Tensor")

    @torch.library.impl(attach_gradient, ("CPU", "CUDA"))
    def _(hidden: torch.Tensor, weight: torch.Tensor, loss: torch.Tensor, by_hidden: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @torch.library.register_fake(attach_gradient)
    def _(hidden: torch.Tensor, weight: torch.Tensor, loss: torch.Tensor, by_hidden: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(loss)

    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[3])

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (by_hidden,) = ctx.saved_tensors
        # The forward pass added the weight's gradient for a factor of 1. NaN reports another factor without waiting for the GPU.
        factor = grad.masked_fill(grad != 1, float("nan"))
        return (_scaled(by_hidden, factor, by_hidden.dtype) if ctx.needs_input_grad[0] else None), None, None, None

    torch.library.register_autograd(attach_gradient, backward, setup_context=setup_context)


if native.load_error() is None:
    _register()
