"""The input of the residual stream: the mean of the K token embeddings of each patch, in some families scaled or with positions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from megatron_patch import ops
from megatron_patch.errors import ConfigError
from megatron_patch.model.shape import ModelShape
from megatron_patch.ops import Operators
from megatron_patch.parallel.tensor import UNSHARDED, TensorParallel, all_reduce_gradient, reduce_from_tensor_parallel, shard_positions


class Embedding(nn.Module):
    """Embeds token patches [B, T, K] as hidden states [B, T, H].

    Args:
        shape: the model's shape.
        operators: the implementation of the patch embedding.
        parallel: the ranks that share the vocabulary.
        positions: whether learned positions belong to this layer; False on a pipeline rank that holds only the weight of a tied head.
    """

    def __init__(
        self, shape: ModelShape, operators: Operators = "fused", parallel: TensorParallel = UNSHARDED, positions: bool = True
    ) -> None:
        super().__init__()
        self.operators: Operators = operators
        self.parallel = parallel
        rows = parallel.shard_size(shape.padded_vocab_size)
        self.vocab_start = None if parallel.size == 1 else parallel.rank * rows
        self.word = nn.Embedding(rows, shape.hidden_size)
        self.scale = math.sqrt(shape.hidden_size) if shape.scaled_embeddings else None
        learned = positions and shape.position_embedding == "learned"
        self.position = nn.Embedding(shape.max_positions, shape.hidden_size) if learned else None

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, longest: int = 0) -> torch.Tensor:
        """Returns the embedding of each patch.

        Args:
            input_ids: int64 [B, T, K].
            position_ids: int64 [B or 1, T]; None: 0 to T - 1.
            longest: positions of a sample whose T positions here are a part.

        Returns:
            [B, T, H]; with sequence parallelism this rank's positions.

        Raises:
            ConfigError: more positions than the model has learned positions.
        """
        # Each rank averages first and the ranks sum the averages, which moves K times fewer bytes than summing token embeddings.
        hidden = reduce_from_tensor_parallel(
            ops.patch_embedding(self.word.weight, input_ids, self.operators, self.vocab_start), self.parallel
        )
        if self.scale is not None:
            # Rounded to the dtype first, as in Gemma. The mean of scaled embeddings is the scaled mean.
            hidden = hidden * float(torch.tensor(self.scale, dtype=hidden.dtype, device="cpu"))
        if self.position is None:
            return hidden
        longest = max(longest, input_ids.shape[1])
        if longest > self.position.num_embeddings:
            raise ConfigError(
                f"a sample of {longest} positions, but the model has {self.position.num_embeddings} learned positions",
                "at most --max-position-embeddings positions",
                "shorten the samples, or train with rotary positions",
            )
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        weight = all_reduce_gradient(self.position.weight, self.parallel) if self.parallel.sequence else self.position.weight
        return hidden + F.embedding(shard_positions(position_ids, self.parallel), weight)
