"""The output head: from hidden states to one distribution a position, and to the loss over its labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_patch import ops
from megatron_patch.model.shape import ModelShape


class Head(nn.Module):
    """A matrix of its own, or the embedding's."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.vocab_size = shape.vocab_size
        self.weight = None if shape.tie_embeddings else nn.Parameter(torch.empty(shape.padded_vocab_size, shape.hidden_size))

    def logits(self, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """[..., H] to [..., V]; the vocabulary's padding rows are cut off.

        Args:
            hidden: normalised hidden states.
            embedding: the embedding's weight, used where the head is tied to it.
        """
        weight = embedding if self.weight is None else self.weight
        return F.linear(hidden, weight[: self.vocab_size])

    def forward(
        self, hidden: torch.Tensor, embedding: torch.Tensor, labels: torch.Tensor, label_weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores every position against its labels.

        Args:
            hidden: [B, T, H], normalised.
            embedding: the embedding's weight.
            labels: int64 [B, T, K].
            label_weights: [K], or None for 1.

        Returns:
            (sum of weighted losses, sum of weights of scored labels), float32.
        """
        logits = self.logits(hidden, embedding)
        return ops.multi_token_loss(logits.flatten(0, 1), labels.flatten(0, 1), label_weights)
