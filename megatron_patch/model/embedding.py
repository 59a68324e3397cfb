"""From token patches to the residual stream: the mean of K token embeddings, and learned positions where the family has them."""

from __future__ import annotations

import torch
from torch import nn

from megatron_patch import ops
from megatron_patch.errors import ConfigError
from megatron_patch.model.shape import ModelShape
from megatron_patch.ops import Operators


class Embedding(nn.Module):
    """Token patches [B, T, K] to hidden states [B, T, H]."""

    def __init__(self, shape: ModelShape, operators: Operators = "fused") -> None:
        super().__init__()
        self.operators: Operators = operators
        self.word = nn.Embedding(shape.padded_vocab_size, shape.hidden_size)
        self.position = nn.Embedding(shape.max_positions, shape.hidden_size) if shape.position_embedding == "learned" else None

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Averages each patch.

        Args:
            input_ids: int64 [B, T, K].
            position_ids: int64 [B, T]; None: 0..T-1.

        Returns:
            [B, T, H].

        Raises:
            ConfigError: more positions than the model has learned.
        """
        hidden = ops.patch_embedding(self.word.weight, input_ids, self.operators)
        if self.position is None:
            return hidden
        if input_ids.shape[1] > self.position.num_embeddings:
            raise ConfigError(
                f"{input_ids.shape[1]} positions for a model with {self.position.num_embeddings} learned positions",
                "as many positions as --max-position-embeddings",
                "use shorter samples, or rotary positions",
            )
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        return hidden + self.position(position_ids)
