"""The operators as plain formulas: what the fused kernels must equal, and what serves where those are not built.

In: weights, ids, logits, labels. Out: patch embeddings and loss sums. K = 1 takes the same path and gives the bits of an ordinary
language model (`F.embedding`, `F.cross_entropy`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
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
    return rows.to(_accumulation_dtype(weight.dtype)).mean(dim=-2).to(weight.dtype)


def multi_token_loss(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Each position's distribution scored against all K labels of the next patch (arXiv 2407.12665, equation 3).

    loss = sum over n, k with labels[n, k] != IGNORE_INDEX of w_k * -log softmax(logits[n])[labels[n, k]]

    Args:
        logits: [N, V].
        labels: int64 [N, K]; IGNORE_INDEX is not scored.
        weights: [K], or None for 1.

    Returns:
        (sum of weighted losses, sum of the weights of scored labels), float32 (float64 stays float64).
    """
    log_probabilities = F.log_softmax(logits, dim=-1, dtype=_accumulation_dtype(logits.dtype))
    scored = labels != IGNORE_INDEX
    losses = -log_probabilities.gather(-1, torch.where(scored, labels, 0))
    counted = scored.to(losses.dtype)
    if weights is not None:
        counted = counted * weights.to(losses.dtype)
        losses = losses * weights.to(losses.dtype)
    return torch.where(scored, losses, 0.0).sum(), counted.sum()
