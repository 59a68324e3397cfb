"""The output head: logits of each position, and the loss over its labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_patch import ops
from megatron_patch.model.shape import ModelShape
from megatron_patch.ops import Operators
from megatron_patch.parallel.tensor import UNSHARDED, TensorParallel, copy_to_tensor_parallel, gather_last_dim


class Head(nn.Module):
    """A linear layer from hidden states to the vocabulary, with its own weight or, if tied, the embedding's.

    Args:
        shape: the model's shape.
        operators: the implementation of the loss.
        parallel: the ranks that share the vocabulary.
    """

    def __init__(self, shape: ModelShape, operators: Operators = "fused", parallel: TensorParallel = UNSHARDED) -> None:
        super().__init__()
        self.operators: Operators = operators
        self.parallel = parallel
        self.vocab_size, self.softcap = shape.vocab_size, shape.logit_softcap
        rows = parallel.shard_size(shape.padded_vocab_size)
        self.first_row = parallel.rank * rows
        self.unpadded_rows = min(rows, max(0, shape.vocab_size - self.first_row))
        self.weight = None if shape.tie_embeddings else nn.Parameter(torch.empty(rows, shape.hidden_size))

    def logits(self, hidden: torch.Tensor, embedding: torch.Tensor | None) -> torch.Tensor:
        """Returns the logits [..., V] of hidden states [..., H], without the padding of the vocabulary.

        Args:
            hidden: [..., H], after the final norm.
            embedding: the embedding's weight, if the head is tied to it.
        """
        if self.parallel.size == 1:
            logits = F.linear(hidden, self._rows(embedding))
        else:
            # Includes the padding, so that all vocabulary shards have the same size.
            shard = F.linear(copy_to_tensor_parallel(hidden, self.parallel), self._matrix(embedding))
            logits = gather_last_dim(shard, self.parallel)[..., : self.vocab_size]
        return logits if self.softcap is None else ops.softcapped(logits, self.softcap)

    def forward(
        self, hidden: torch.Tensor, embedding: torch.Tensor | None, labels: torch.Tensor, label_weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the loss of every position over its labels.

        Args:
            hidden: [B, T, H], after the final norm.
            embedding: the embedding's weight, if the head is tied to it.
            labels: int64 [B, T, K].
            label_weights: [K], or None for 1.

        Returns:
            (sum of weighted losses in nats, sum of the weights of scored labels), float32.
        """
        hidden = copy_to_tensor_parallel(hidden, self.parallel)
        shard = None if self.parallel.size == 1 else ops.VocabularyShard(self.first_row, self.parallel.group)
        return ops.linear_multi_token_loss(
            hidden.flatten(0, 1),
            self._rows(embedding),
            labels.flatten(0, 1),
            label_weights,
            self.operators,
            shard,
            logit_softcap=self.softcap,
        )

    def _matrix(self, embedding: torch.Tensor | None) -> torch.Tensor:
        matrix = embedding if self.weight is None else self.weight
        assert matrix is not None
        return matrix

    def _rows(self, embedding: torch.Tensor | None) -> torch.Tensor:
        """This rank's vocabulary shard, without padding rows."""
        return self._matrix(embedding)[: self.unpadded_rows]
