"""The interface through which evaluation and generation use a model, on one process or on many ranks."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from megatron_patch.model.attention import ModelCache
from megatron_patch.model.shape import ModelShape


class InferenceModel(Protocol):
    """A model in evaluation mode. Where it is sharded over ranks, all of them must make the same calls, and all get the same results."""

    shape: ModelShape

    @property
    def device(self) -> torch.device:
        """The device of the ids that the model takes."""
        ...

    @property
    def __call__(self) -> Any:
        """The forward pass: (ids int64 [B, T, K], labels int64 [B, T, K]) to (sum of losses in nats, number of scored labels)."""
        ...

    def logits(self, input_ids: torch.Tensor, *, cache: ModelCache | None = None, last_only: bool = False) -> torch.Tensor:
        """Returns logits.

        Args:
            input_ids: int64 [B, T, K].
            cache: earlier positions; the new ones are appended.
            last_only: return the logits of the last position only.

        Returns:
            [B, T, V], or [B, 1, V].
        """
        ...
