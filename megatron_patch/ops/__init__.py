"""The operators of the method, fastest form first: compiled kernels where they are built, plain formulas elsewhere or where asked for."""

from __future__ import annotations

from typing import Literal

import torch

from megatron_patch.ops import fused_embedding, fused_linear_loss, native, plain
from megatron_patch.ops.plain import IGNORE_INDEX

__all__ = ["IGNORE_INDEX", "Operators", "linear_multi_token_loss", "patch_embedding"]

Operators = Literal["fused", "plain"]
"""The compiled kernels where they are built; or the plain formulas everywhere, bit by bit an ordinary language model's at K = 1."""


def patch_embedding(weight: torch.Tensor, token_ids: torch.Tensor, operators: Operators = "fused") -> torch.Tensor:
    """The mean of the K token embeddings of each patch; see `plain.patch_embedding`."""
    if operators == "fused" and native.supports(weight):
        return fused_embedding.patch_embedding(weight, token_ids)
    return plain.patch_embedding(weight, token_ids)


def linear_multi_token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    label_weights: torch.Tensor | None = None,
    operators: Operators = "fused",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The head's logits scored against K labels a row; see `plain.linear_multi_token_loss`."""
    if operators == "fused" and native.supports(weight):
        return fused_linear_loss.linear_multi_token_loss(hidden, weight, labels, label_weights)
    return plain.linear_multi_token_loss(hidden, weight, labels, label_weights)
