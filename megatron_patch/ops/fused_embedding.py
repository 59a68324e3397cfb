"""Patch embedding in one kernel: the compiled operator, its autograd formulas, and its shapes for tracing."""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_patch.ops import native
from megatron_patch.ops.accumulation import check_accumulator


def patch_embedding(
    weight: torch.Tensor, token_ids: torch.Tensor, vocab_start: int | None = None, weight_grad_accumulator: torch.Tensor | None = None
) -> torch.Tensor:
    """Computes `plain.patch_embedding` in one kernel, without the intermediate tensor [..., T·K, H].

    Args:
        weight: [V or a shard of it, H].
        token_ids: int64 [..., T, K].
        vocab_start: the token id of the shard's first row; ids of other shards add nothing, and the divisor stays K, so that the results
            of all shards sum to the full result. None: the weight has the full vocabulary.
        weight_grad_accumulator: contiguous [V or a shard of it, H], float32 (float64 for a float64 weight). The backward pass adds the
            weight's gradient to it, unrounded, reading and writing only the rows of `token_ids`, and gives the weight no gradient: its
            `.grad` does not change, and its hooks receive None. None: the weight gets a gradient of its dtype.

    Returns:
        [..., T, H] in the weight's dtype; averaged in float32 (float64 stays float64). The gradient is summed in a fixed order, so that
        every run gives the same bits.

    Raises:
        ValueError: `token_ids` out of range (checked only without `vocab_start`), an argument of the wrong shape or dtype, or an
            accumulator that shares memory with the weight. On a GPU, where the check would have to wait, the kernel prints ids out of range
            and ends the process's CUDA work.
        TypeError: an accumulator that is not a tensor.
    """
    if weight_grad_accumulator is None:
        return torch.ops.megatron_patch.patch_embedding(weight, token_ids, vocab_start)
    check_accumulator(weight_grad_accumulator, weight)
    return torch.ops.megatron_patch.patch_embedding_accumulating(weight, token_ids, weight_grad_accumulator, vocab_start)


def _accumulating(weight: torch.Tensor, token_ids: torch.Tensor, accumulator: torch.Tensor, vocab_start: int | None = None) -> torch.Tensor:
    return torch.ops.megatron_patch.patch_embedding(weight, token_ids, vocab_start)


def _register() -> None:
    """Registers shapes for tracing and autograd formulas: both operators are linear, and each one's backward pass is the other."""

    @torch.library.register_fake("megatron_patch::patch_embedding")
    def _(weight: torch.Tensor, token_ids: torch.Tensor, vocab_start: int | None = None) -> torch.Tensor:
        return weight.new_empty((*token_ids.shape[:-1], weight.shape[1]))

    @torch.library.register_fake("megatron_patch::patch_embedding_backward")
    def _(grad: torch.Tensor, token_ids: torch.Tensor, num_rows: int, vocab_start: int | None = None) -> torch.Tensor:
        return grad.new_empty((num_rows, grad.shape[-1]))

    def setup_forward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        weight, token_ids, ctx.vocab_start = inputs
        ctx.num_rows = weight.shape[0]
        ctx.save_for_backward(token_ids)

    def backward_of_forward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (token_ids,) = ctx.saved_tensors
        return torch.ops.megatron_patch.patch_embedding_backward(grad, token_ids, ctx.num_rows, ctx.vocab_start), None, None

    def setup_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, token_ids, _, ctx.vocab_start = inputs
        ctx.save_for_backward(token_ids)

    def backward_of_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (token_ids,) = ctx.saved_tensors
        return torch.ops.megatron_patch.patch_embedding(grad, token_ids, ctx.vocab_start), None, None, None

    torch.library.register_autograd("megatron_patch::patch_embedding", backward_of_forward, setup_context=setup_forward)
    torch.library.register_autograd("megatron_patch::patch_embedding_backward", backward_of_backward, setup_context=setup_backward)
    _register_accumulating()


def _register_accumulating() -> None:
    """Registers the operator whose backward pass adds to an accumulator."""
    library = "megatron_patch::patch_embedding_accumulating"
    torch.library.define(library, "(Tensor weight, Tensor token_ids, Tensor accumulator, int? vocab_start=None) -> Tensor")
    torch.library.impl(library, ("CPU", "CUDA"))(_accumulating)

    @torch.library.register_fake(library)
    def _(weight: torch.Tensor, token_ids: torch.Tensor, accumulator: torch.Tensor, vocab_start: int | None = None) -> torch.Tensor:
        return weight.new_empty((*token_ids.shape[:-1], weight.shape[1]))

    @torch.library.register_fake("megatron_patch::patch_embedding_backward_add_")
    def _(accumulator: torch.Tensor, grad: torch.Tensor, token_ids: torch.Tensor, vocab_start: int | None = None) -> None:
        return None

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        # Not a saved tensor, because other backward passes may add to it before this one.
        _, token_ids, ctx.accumulator, ctx.vocab_start = inputs
        ctx.save_for_backward(token_ids)

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, None, None]:
        (token_ids,) = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            torch.ops.megatron_patch.patch_embedding_backward_add_(ctx.accumulator, grad, token_ids, ctx.vocab_start)
        return None, None, None, None

    torch.library.register_autograd(library, backward, setup_context=setup_context)


def _sorted_occurrences(
    grad: torch.Tensor, token_ids: torch.Tensor, num_rows: int, vocab_start: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """What the kernels take: gradients [patches, H]; the table's row of each id, sorted, int32; where each came from, int64; and K."""
    rows, order = torch.ops.megatron_patch.patch_embedding_rows(token_ids, num_rows, vocab_start).sort(stable=True)
    # Not -1, which no number of patches is where H is 0.
    return grad.reshape(math.prod(grad.shape[:-1]), grad.shape[-1]), rows, order, token_ids.shape[-1]


def _backward_on_cuda(grad: torch.Tensor, token_ids: torch.Tensor, num_rows: int, vocab_start: int | None = None) -> torch.Tensor:
    """Sorts the occurrences by row with torch's stable sort; the kernel sums those of each row in order."""
    occurrences = _sorted_occurrences(grad, token_ids, num_rows, vocab_start)
    return torch.ops.megatron_patch.patch_embedding_sorted_backward(*occurrences, num_rows)


def _backward_add_on_cuda(accumulator: torch.Tensor, grad: torch.Tensor, token_ids: torch.Tensor, vocab_start: int | None = None) -> None:
    occurrences = _sorted_occurrences(grad, token_ids, accumulator.shape[0], vocab_start)
    torch.ops.megatron_patch.patch_embedding_sorted_backward_add_(accumulator, *occurrences)


if native.load_error() is None:
    _register()
if native.load_error("cuda") is None:
    torch.library.impl("megatron_patch::patch_embedding_backward", "CUDA")(_backward_on_cuda)
    torch.library.impl("megatron_patch::patch_embedding_backward_add_", "CUDA")(_backward_add_on_cuda)
