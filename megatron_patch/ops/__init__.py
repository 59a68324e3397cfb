"""The operators of the method, fastest form first: compiled kernels where they are built, plain formulas elsewhere."""

from __future__ import annotations

import torch

from megatron_patch.ops import native, plain
from megatron_patch.ops.plain import IGNORE_INDEX, multi_token_loss

__all__ = ["IGNORE_INDEX", "multi_token_loss", "patch_embedding"]


def patch_embedding(weight: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """The mean of the K token embeddings of each patch: `plain.patch_embedding`, compiled where it can be."""
    if native.supports(weight):
        return native.patch_embedding(weight, token_ids)
    return plain.patch_embedding(weight, token_ids)
