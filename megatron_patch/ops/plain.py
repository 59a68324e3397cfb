"""The operators as plain formulas: what the fused kernels must equal, and what serves where those are not built.

In: weights, ids, logits, labels. Out: patch embeddings and loss sums. K = 1 takes the same path and gives the bits of an ordinary
language model (`F.embedding`, `F.cross_entropy`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over numbers of a dtype are taken in."""
    return torch.promote_types(dtype, torch.float32)


def patch_embedding(weight: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """The mean of the K token embeddings of each patch (arXiv 2407.12665, section 2).

    Args:
        weight: [V, H].
        token_ids: int64 [..., T, K].

    Returns:
        [..., T, H] in the weight's dtype; averaged in float32 (float64 stays float64).
    """
    rows = F.embedding(token_ids, weight)
    if token_ids.shape[-1] == 1:
        return rows.squeeze(-2)
    return rows.to(accumulation_dtype(weight.dtype)).mean(dim=-2).to(weight.dtype)


def multi_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each position's distribution scored against all K labels of the next patch (arXiv 2407.12665, equation 3), label by label.

    Args:
        logits: [N, V].
        labels: int64 [N, K]; IGNORE_INDEX is not scored.

    Returns:
        (negative log-likelihoods [N, K], 0 where a label is not scored; log-sum-exp of each row [N]), float32 (float64 stays float64).
    """
    return _losses(logits, labels), torch.logsumexp(logits.to(accumulation_dtype(logits.dtype)), dim=-1)


def linear_multi_token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    label_weights: torch.Tensor | None = None,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The head's logits scored against all K labels of the next patch (arXiv 2407.12665, equation 3), summed.

    loss = sum over n, k with labels[n, k] != IGNORE_INDEX of w_k * (-log softmax(z[n])[labels[n, k]] + z_loss * lse[n]²)
    with z = hidden @ weightᵀ

    Args:
        hidden: [N, H].
        weight: [V, H].
        labels: int64 [N, K]; IGNORE_INDEX is not scored.
        label_weights: [K], or None for 1.
        z_loss: holds the log-sum-exp near 0 (arXiv 2204.02311, section 5).

    Returns:
        (sum of weighted losses, sum of the weights of scored labels), float32 (float64 stays float64).
    """
    logits = F.linear(hidden, weight)
    losses = _losses(logits, labels)
    if z_loss:
        lse = torch.logsumexp(logits.to(losses.dtype), dim=-1, keepdim=True)
        losses = losses + torch.where(labels != IGNORE_INDEX, z_loss * lse.square(), 0.0)
    if label_weights is not None:
        losses = losses * label_weights.to(losses.dtype)
    return losses.sum(), weight_of_labels(labels, label_weights, losses.dtype)


def weight_of_labels(labels: torch.Tensor, label_weights: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The sum of the weights of all scored labels: what a sum of losses is divided by to be a mean."""
    scored = (labels != IGNORE_INDEX).to(dtype)
    return (scored if label_weights is None else scored * label_weights.to(dtype)).sum()


def _losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    log_probabilities = F.log_softmax(logits, dim=-1, dtype=accumulation_dtype(logits.dtype))
    scored = labels != IGNORE_INDEX
    return torch.where(scored, -log_probabilities.gather(-1, torch.where(scored, labels, 0)), 0.0)
