"""The operators as plain formulas: the reference for the fused kernels, and the fallback if they are not built.

In: weights, ids, logits, labels. Out: patch embeddings and loss sums. K = 1 uses the same code and gives the bits of an ordinary language
model (`F.embedding`, `F.cross_entropy`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

IGNORE_INDEX = -100


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which numbers of a dtype are summed: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def patch_embedding(weight: torch.Tensor, token_ids: torch.Tensor, vocab_start: int | None = None) -> torch.Tensor:
    """Returns the mean of the K token embeddings of each patch (arXiv 2407.12665, section 2).

    Args:
        weight: [V or a shard of it, H].
        token_ids: int64 [..., T, K].
        vocab_start: the token id of the shard's first row; ids of other shards add nothing. None: the weight has the full vocabulary.

    Returns:
        [..., T, H] in the weight's dtype; averaged in float32 (float64 stays float64).
    """
    if vocab_start is None:
        rows = F.embedding(token_ids, weight)
    else:
        here = (token_ids >= vocab_start) & (token_ids < vocab_start + weight.shape[0])
        rows = F.embedding(torch.where(here, token_ids - vocab_start, 0), weight) * here[..., None]
    if token_ids.shape[-1] == 1:
        return rows.squeeze(-2)
    return rows.to(accumulation_dtype(weight.dtype)).mean(dim=-2).to(weight.dtype)


def multi_token_loss(
    logits: torch.Tensor, labels: torch.Tensor, vocab_start: int | None = None, group: dist.ProcessGroup | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss of each position for each of the K labels of the next patch (arXiv 2407.12665, equation 3).

    Args:
        logits: [N, V or a shard of it].
        labels: int64 [N, K]; IGNORE_INDEX is not scored.
        vocab_start: the token id of the shard's first column; None: the logits have the full vocabulary.
        group: the ranks that hold the shards; None: there are no other shards.

    Returns:
        (negative log-likelihoods in nats [N, K], 0 for labels that are not scored; log-sum-exp of each row [N]), float32 (float64 stays
        float64).
    """
    if vocab_start is not None:
        return _sharded_losses(logits, labels, vocab_start, group)
    return _losses(logits, labels), torch.logsumexp(logits.to(accumulation_dtype(logits.dtype)), dim=-1)


def softcapped(values: torch.Tensor, cap: float) -> torch.Tensor:
    """Returns cap · tanh(value / cap) of each value (Gemma 2, arXiv 2408.00118, section 2)."""
    return torch.tanh(values / cap) * cap


def linear_multi_token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    label_weights: torch.Tensor | None = None,
    z_loss: float = 0.0,
    vocab_start: int | None = None,
    group: dist.ProcessGroup | None = None,
    logit_softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the summed loss of the head's logits over all K labels of the next patch (arXiv 2407.12665, equation 3).

    loss = sum over n, k with labels[n, k] != IGNORE_INDEX of w_k * (-log softmax(z[n])[labels[n, k]] + z_loss * lse[n]²)
    with z = hidden @ weightᵀ, capped where a cap is given

    Args:
        hidden: [N, H].
        weight: [V or a shard of it, H].
        labels: int64 [N, K]; IGNORE_INDEX is not scored.
        label_weights: [K], or None for 1.
        z_loss: factor of the term that keeps the log-sum-exp near 0 (arXiv 2204.02311, section 5).
        vocab_start: the token id of the shard's first row; None: the weight has the full vocabulary.
        group: the ranks that hold the shards; the gradient of `hidden` is this shard's part.
        logit_softcap: the cap of z; see `softcapped`. None: z is not capped.

    Returns:
        (sum of weighted losses in nats, sum of the weights of scored labels), float32 (float64 stays float64).
    """
    logits = F.linear(hidden, weight)
    if logit_softcap is not None:
        logits = softcapped(logits, logit_softcap)
    lse = None
    if vocab_start is None:
        losses = _losses(logits, labels)
    else:
        losses, lse = _sharded_losses(logits, labels, vocab_start, group)
    if z_loss:
        lse = torch.logsumexp(logits.to(losses.dtype), dim=-1) if lse is None else lse
        losses = losses + torch.where(labels != IGNORE_INDEX, z_loss * lse.square()[:, None], 0.0)
    if label_weights is not None:
        losses = losses * label_weights.to(losses.dtype)
    return losses.sum(), weight_of_labels(labels, label_weights, losses.dtype)


def weight_of_labels(labels: torch.Tensor, label_weights: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Returns the sum of the weights of all scored labels, by which a sum of losses is divided to get the mean."""
    scored = (labels != IGNORE_INDEX).to(dtype)
    return (scored if label_weights is None else scored * label_weights.to(dtype)).sum()


def _losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    log_probabilities = F.log_softmax(logits, dim=-1, dtype=accumulation_dtype(logits.dtype))
    scored = labels != IGNORE_INDEX
    return torch.where(scored, -log_probabilities.gather(-1, torch.where(scored, labels, 0)), 0.0)


class _SumOverRanks(torch.autograd.Function):
    """Returns the sum of a tensor over ranks; the gradient of each rank's tensor is that of the sum."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        total = tensor.clone()
        if group is not None:
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad, None


def _sharded_losses(
    logits: torch.Tensor, labels: torch.Tensor, vocab_start: int, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (losses [N, K], log-sum-exp [N]) over all shards, from this rank's columns of the logits."""
    rows, columns = logits.shape
    # A neutral column, because a shard can consist of padding only.
    wide = F.pad(logits.to(accumulation_dtype(logits.dtype)), (0, 1), value=float("-inf"))
    largest = wide.detach().amax(dim=1) if rows else wide.new_zeros(0)
    if group is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    sums = _SumOverRanks.apply(torch.exp(wide - largest[:, None]).sum(dim=1), group)
    here = (labels >= vocab_start) & (labels < vocab_start + columns)
    picked = torch.where(here, wide.gather(1, torch.where(here, labels - vocab_start, columns)), 0.0)
    nll = (largest[:, None] - _SumOverRanks.apply(picked, group)) + sums.log()[:, None]
    return torch.where(labels == IGNORE_INDEX, 0.0, nll), largest + sums.log()
