"""The operators of the method: compiled kernels where they are built, plain formulas elsewhere or on request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from megatron_patch.ops import fused_embedding, fused_linear_loss, fused_loss, native, plain
from megatron_patch.ops.accumulation import check_unit_gradient, redirect_gradient
from megatron_patch.ops.plain import IGNORE_INDEX, softcapped

__all__ = [
    "IGNORE_INDEX",
    "Operators",
    "VocabularyShard",
    "linear_multi_token_loss",
    "multi_token_loss",
    "patch_embedding",
    "softcapped",
]

Operators = Literal["fused", "plain"]
"""fused: compiled kernels where they are built. plain: the formulas everywhere, at K = 1 with the bits of an ordinary language model."""


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's part of the vocabulary.

    Args:
        start: the token id of its first row.
        group: the ranks that hold the shards of the vocabulary.
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
    """Returns the mean of the K token embeddings of each patch; see `plain.patch_embedding`.

    Args:
        weight: [V or a shard of it, H].
        token_ids: int64 [..., T, K].
        operators: "fused" or "plain".
        vocab_start: the token id of the shard's first row; None: the weight has the full vocabulary.
        weight_grad_accumulator: float32 [V or a shard of it, H], to which the backward pass adds the weight's gradient, while the weight
            itself gets none; the kernels add it unrounded, the plain formulas rounded to the weight's dtype. See `ops.accumulation`.

    Returns:
        [..., T, H] in the weight's dtype.
    """
    if operators == "fused" and native.supports(weight):
        return fused_embedding.patch_embedding(weight, token_ids, vocab_start, weight_grad_accumulator)
    return plain.patch_embedding(redirect_gradient(weight, weight_grad_accumulator), token_ids, vocab_start)


def multi_token_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_weights: torch.Tensor | None = None,
    operators: Operators = "fused",
    shard: VocabularyShard | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss of logits over K labels for each row; see `plain.multi_token_loss`.

    Args:
        logits: [N, V or a shard of it].
        labels: int64 [N, K]; IGNORE_INDEX is not scored.
        label_weights: [K], or None for 1.
        operators: "fused" or "plain".
        shard: this rank's vocabulary shard; None: the logits have the full vocabulary.

    Returns:
        (sum of weighted losses in nats, sum of the weights of scored labels), float32 (float64 stays float64).
    """
    start, group = (None, None) if shard is None else (shard.start, shard.group)
    formula = fused_loss.multi_token_loss if operators == "fused" and native.supports(logits) else plain.multi_token_loss
    losses, _ = formula(logits, labels, start, group)
    if label_weights is not None:
        losses = losses * label_weights.to(losses.dtype)
    return losses.sum(), plain.weight_of_labels(labels, label_weights, losses.dtype)


def linear_multi_token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    label_weights: torch.Tensor | None = None,
    operators: Operators = "fused",
    shard: VocabularyShard | None = None,
    weight_grad_accumulator: torch.Tensor | None = None,
    unit_gradient: bool = False,
    logit_softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss of the head's logits over K labels for each row; see `plain.linear_multi_token_loss`.

    Args:
        hidden: [N, H].
        weight: [V or a shard of it, H].
        labels: int64 [N, K]; IGNORE_INDEX is not scored.
        label_weights: [K], or None for 1.
        operators: "fused" or "plain".
        shard: this rank's vocabulary shard; None: the weight has the full vocabulary.
        weight_grad_accumulator: float32 [V or a shard of it, H], to which the weight's gradient is added, while the weight itself gets
            none; the kernels add it unrounded, the plain formulas rounded to the weight's dtype. See `ops.accumulation`.
        unit_gradient: with an accumulator, if the caller starts the backward pass from this loss: the kernels add the gradient in the
            forward pass, without a temporary table. The plain formulas ignore it. See `fused_linear_loss.linear_multi_token_loss`.
        logit_softcap: c of logits that are capped to c·tanh(logit / c) before the loss; None: they are not.

    Returns:
        (sum of weighted losses in nats, sum of the weights of scored labels), float32 (float64 stays float64).
    """
    start, group = (None, None) if shard is None else (shard.start, shard.group)
    if operators == "fused" and native.supports(weight):
        return fused_linear_loss.linear_multi_token_loss(
            *(hidden, weight, labels, label_weights),
            vocab_start=start,
            group=group,
            weight_grad_accumulator=weight_grad_accumulator,
            unit_gradient=unit_gradient,
            logit_softcap=logit_softcap,
        )
    check_unit_gradient(unit_gradient, weight_grad_accumulator)
    weight = redirect_gradient(weight, weight_grad_accumulator)
    return plain.linear_multi_token_loss(hidden, weight, labels, label_weights, vocab_start=start, group=group, logit_softcap=logit_softcap)
