"""Patch embedding in one kernel: the compiled operator's derivative, its shapes for tracing, and its face."""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_patch.ops import native


def patch_embedding(weight: torch.Tensor, token_ids: torch.Tensor, vocab_start: int | None = None) -> torch.Tensor:
    """As `plain.patch_embedding`, in one kernel and without the [..., T·K, H] in between.

    Args:
        weight: [V or a shard of it, H].
        token_ids: int64 [..., T, K].
        vocab_start: the first id of the shard; ids of other shards add nothing, and the divisor stays K, so that the results of all
            shards sum to the whole. None: all of the vocabulary is here.

    Returns:
        [..., T, H] in the weight's dtype; averaged in float32 (float64 stays float64). The gradient is a sum in a fixed order: the same
        bits on every run.

    Raises:
        ValueError: `token_ids` out of range (only where all of the vocabulary is here), or an argument of another shape or dtype. On a GPU,
            where looking would mean waiting, ids out of range end the process's CUDA work with a printed line that names them.
    """
    return torch.ops.megatron_patch.patch_embedding(weight, token_ids, vocab_start)


def _register() -> None:
    """Shapes for tracing, and derivatives: each operator is linear, and each is the other's derivative."""

    @torch.library.register_fake("megatron_patch::patch_embedding")
    def _(weight: torch.Tensor, token_ids: torch.Tensor, vocab_start: int | None = None) -> torch.Tensor:
        return weight.new_empty((*token_ids.shape[:-1], weight.shape[1]))

    @torch.library.register_fake("megatron_patch::patch_embedding_backward")
    def _(grad: torch.Tensor, token_ids: torch.Tensor, num_rows: int, vocab_start: int | None = None) -> torch.Tensor:
        return grad.new_empty((num_rows, grad.shape[-1]))

    def remember_forward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        weight, token_ids, ctx.vocab_start = inputs
        ctx.num_rows = weight.shape[0]
        ctx.save_for_backward(token_ids)

    def forward_derivative(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (token_ids,) = ctx.saved_tensors
        return torch.ops.megatron_patch.patch_embedding_backward(grad, token_ids, ctx.num_rows, ctx.vocab_start), None, None

    def remember_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, token_ids, _, ctx.vocab_start = inputs
        ctx.save_for_backward(token_ids)

    def backward_derivative(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (token_ids,) = ctx.saved_tensors
        return torch.ops.megatron_patch.patch_embedding(grad, token_ids, ctx.vocab_start), None, None, None

    torch.library.register_autograd("megatron_patch::patch_embedding", forward_derivative, setup_context=remember_forward)
    torch.library.register_autograd("megatron_patch::patch_embedding_backward", backward_derivative, setup_context=remember_backward)


def _backward_on_cuda(grad: torch.Tensor, token_ids: torch.Tensor, num_rows: int, vocab_start: int | None = None) -> torch.Tensor:
    """Sorts the occurrences of each id, in order, by torch; the kernel sums them."""
    sorted_ids, order = token_ids.reshape(-1).long().sort(stable=True)
    # Not -1, which no number of rows is where H is 0.
    rows = grad.reshape(math.prod(grad.shape[:-1]), grad.shape[-1])
    sums = torch.ops.megatron_patch.patch_embedding_sorted_backward
    return sums(rows, sorted_ids, order, token_ids.shape[-1], num_rows, vocab_start)


if native.load_error() is None:
    _register()
if native.load_error("cuda") is None:
    torch.library.impl("megatron_patch::patch_embedding_backward", "CUDA")(_backward_on_cuda)
