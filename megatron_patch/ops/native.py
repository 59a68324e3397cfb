"""The compiled operators: loading the libraries that were built at install, and their autograd and shapes for tracing.

In: megatron_patch/_C.so, where it was built. Out: `torch.ops.megatron_patch.*` and Python faces with the signatures of the plain
formulas. Where nothing was built, or it does not load into this torch, the plain formulas serve, with one warning.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import torch

_LIBRARY = Path(__file__).parent.parent / "_C.so"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def load_error() -> str | None:
    """Why the compiled operators are not to be had, or None where they are."""
    if not _LIBRARY.is_file():
        return "they were not built at install"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"{_LIBRARY.name} does not load: {error}"
    _register()
    return None


def available() -> bool:
    """Whether the compiled operators can be used; the first time they cannot, a warning says why."""
    error = load_error()
    if error is not None:
        _warn_once(error)
    return error is None


@functools.cache
def _warn_once(error: str) -> None:
    warnings.warn(
        f"megatron_patch runs on its plain formulas, as its compiled operators are missing: {error}. Reinstall with a C++ compiler: "
        "pip install --no-build-isolation -e .",
        stacklevel=3,
    )


def _register() -> None:
    """Shapes for tracing, and the derivative."""

    @torch.library.register_fake("megatron_patch::patch_embedding")
    def _(weight: torch.Tensor, token_ids: torch.Tensor, vocab_start: int) -> torch.Tensor:
        return weight.new_empty((*token_ids.shape[:-1], weight.shape[1]))

    @torch.library.register_fake("megatron_patch::patch_embedding_backward")
    def _(grad: torch.Tensor, token_ids: torch.Tensor, num_rows: int, vocab_start: int) -> torch.Tensor:
        return grad.new_empty((num_rows, grad.shape[-1]))

    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor, int], output: torch.Tensor) -> None:
        weight, token_ids, ctx.vocab_start = inputs
        ctx.num_rows = weight.shape[0]
        ctx.save_for_backward(token_ids)

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (token_ids,) = ctx.saved_tensors
        return torch.ops.megatron_patch.patch_embedding_backward(grad, token_ids, ctx.num_rows, ctx.vocab_start), None, None

    torch.library.register_autograd("megatron_patch::patch_embedding", backward, setup_context=setup_context)


def supports(weight: torch.Tensor) -> bool:
    """Whether a compiled kernel exists for this tensor's device and dtype."""
    return weight.device.type == "cpu" and weight.dtype in DTYPES and available()


def patch_embedding(weight: torch.Tensor, token_ids: torch.Tensor, vocab_start: int | None = None) -> torch.Tensor:
    """As `plain.patch_embedding`, in one kernel and without the [..., T·K, H] in between.

    Args:
        weight: [V or a shard of it, H].
        token_ids: int64 [..., T, K].
        vocab_start: first id of the shard, whose ids outside add nothing (the divisor stays K); None: the whole vocabulary is here.

    Raises:
        ValueError: without a shard, ids that are not in the vocabulary.
    """
    if vocab_start is None and not torch.compiler.is_compiling() and token_ids.numel():
        lowest, highest = (int(bound) for bound in token_ids.aminmax())
        if lowest < 0 or highest >= weight.shape[0]:
            raise ValueError(f"token_ids from {lowest} to {highest}; allowed: 0 to {weight.shape[0] - 1}, the rows of weight")
    return torch.ops.megatron_patch.patch_embedding(weight, token_ids, vocab_start or 0)
