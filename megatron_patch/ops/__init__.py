"""The operators of the method, fastest form first: compiled kernels where they are built, plain formulas elsewhere or where asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from megatron_patch.ops import fused_embedding, fused_linear_loss, native, plain
from megatron_patch.ops.accumulation import check_unit_gradient, redirected
from megatron_patch.ops.plain import IGNORE_INDEX

__all__ = ["IGNORE_INDEX", "Operators", "VocabularyShard", "linear_multi_token_loss", "patch_embedding"]

Operators = Literal["fused", "plain"]
"""The compiled kernels where they are built; or the plain formulas everywhere, bit by bit an ordinary language model's at K = 1."""


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's part of the vocabulary.

    Args:
        start: the id of its first row.
        group: the ranks that hold the others.
    """

    start: int
    group: dist.ProcessGroup | None


def patch_embedding(
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    operators: Operators = "fused",
    vocab_start: int | None = None,
    weight_grad_accumulator: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean of the K token embeddings of each patch; see `plain.patch_embedding`.

    With an accumulator (float32, contiguous, of the weight's shape, with memory of its own) the backward pass adds the weight's gradient to
    it, and the weight gets none: the kernels add it unrounded, the plain formulas rounded to the weight's dtype. See `ops.accumulation`.
    """
    if operators == "fused" and native.supports(weight):
        return fused_embedding.patch_embedding(weight, token_ids, vocab_start, weight_grad_accumulator)
    return plain.patch_embedding(redirected(weight, weight_grad_accumulator), token_ids, vocab_start)


def linear_multi_token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    label_weights: torch.Tensor | None = None,
    operators: Operators = "fused",
    shard: VocabularyShard | None = None,
    weight_grad_accumulator: torch.Tensor | None = None,
    unit_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The head's logits scored against K labels a row; see `plain.linear_multi_token_loss`.

    With an accumulator (float32, contiguous, of the weight's shape, with memory of its own) the weight's gradient is added to it, and the
    weight gets none: the kernels add it unrounded, the plain formulas rounded to the weight's dtype. Where the backward pass is known to
    start from this loss, `unit_gradient` lets the kernels' products be added in the forward pass, without a table in between; the plain
    formulas ignore it and add in the backward pass. See `fused_linear_loss.linear_multi_token_loss` and `ops.accumulation`.
    """
    start, group = (None, None) if shard is None else (shard.start, shard.group)
    if operators == "fused" and native.supports(weight):
        return fused_linear_loss.linear_multi_token_loss(
            *(hidden, weight, labels, label_weights),
            vocab_start=start,
            group=group,
            weight_grad_accumulator=weight_grad_accumulator,
            unit_gradient=unit_gradient,
        )
    check_unit_gradient(unit_gradient, weight_grad_accumulator)
    weight = redirected(weight, weight_grad_accumulator)
    return plain.linear_multi_token_loss(hidden, weight, labels, label_weights, vocab_start=start, group=group)
