"""The compiled operators: loading the libraries that were built at install, and their autograd and shapes for tracing.

In: the libraries beside this package, where they were built. Out: `torch.ops.megatron_patch.*`, and Python faces with the signatures of
the plain formulas. Where nothing was built, or it does not load into this torch, the plain formulas serve, with one warning.

The libraries are loaded when this module is: what asks later is a comparison, which `torch.compile` traces through.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).parent.parent / "_C.so"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_warned = False


def _load() -> str | None:
    if not LIBRARY.is_file():
        return "they were not built at install"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} does not load: {error}"
    _register()
    return None


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


_load_error = _load()


def load_error() -> str | None:
    """Why the compiled operators are not to be had, or None where they are."""
    return _load_error


def available() -> bool:
    """Whether the compiled operators can be used; the first time they cannot, a warning says why."""
    global _warned
    if _load_error is not None and not _warned:
        _warned = True
        warnings.warn(
            f"megatron_patch runs on its plain formulas (the same results, slower), as its compiled operators are missing: {_load_error}. "
            "To have them, reinstall where there is a C++ compiler: pip install --no-build-isolation -e .",
            stacklevel=3,
        )
    return _load_error is None


def supports(weight: torch.Tensor) -> bool:
    """Whether a compiled kernel serves this tensor's device and dtype."""
    return weight.device.type == "cpu" and weight.dtype in DTYPES and available()


def patch_embedding(weight: torch.Tensor, token_ids: torch.Tensor, vocab_start: int | None = None) -> torch.Tensor:
    """As `plain.patch_embedding`, in one kernel and without the [..., T·K, H] in between.

    Args:
        weight: [V or a shard of it, H].
        token_ids: int64 [..., T, K].
        vocab_start: the first id of the shard; ids of other shards add nothing, and the divisor stays K, so that the results of all
            shards sum to the whole. None: all of the vocabulary is here.

    Returns:
        [..., T, H] in the weight's dtype; averaged in float32 (float64 stays float64).

    Raises:
        ValueError: `token_ids` out of range (only where all of the vocabulary is here), or an argument of another shape or dtype.
    """
    return torch.ops.megatron_patch.patch_embedding(weight, token_ids, vocab_start)
