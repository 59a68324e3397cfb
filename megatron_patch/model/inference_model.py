"""What evaluation and generation ask of a model, whether one process holds it or many ranks do."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from megatron_patch.model.attention import ModelCache
from megatron_patch.model.shape import ModelShape


class InferenceModel(Protocol):
    """A model in evaluation mode. Where ranks hold it together, all of them must ask alike, and get the same."""

    shape: ModelShape

    @property
    def device(self) -> torch.device:
        """Where ids are to be."""
        ...

    @property
    def __call__(self) -> Any:
        """(int64 [B, T, K], labels int64 [B, T, K]) to (sum of losses in nats, number of scored labels)."""
        ...

    def logits(self, input_ids: torch.Tensor, *, cache: ModelCache | None = None, last_only: bool = False) -> torch.Tensor:
        """int64 [B, T, K] to [B, T, V], or of the last position alone [B, 1, V]; a cache holds earlier positions."""
        ...
