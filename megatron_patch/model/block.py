"""A pre-norm transformer block: attention and feed-forward layer each add to the residual stream."""

from __future__ import annotations

import torch
from torch import nn

from megatron_patch.model.attention import Attention, AttentionContext, KeyValueCache
from megatron_patch.model.feed_forward import FeedForward
from megatron_patch.model.norm import make_norm
from megatron_patch.model.shape import ModelShape
from megatron_patch.parallel.tensor import UNSHARDED, TensorParallel


class Block(nn.Module):
    """Computes h = x + attention(norm(x)), then h + feed_forward(norm(h)).

    Args:
        shape: the model's shape.
        recompute_attention: whether the backward pass recomputes the scaled dot products.
        parallel: the ranks that share the layer.
        number: number of the block, from 0, which decides on its window and its rotation.
    """

    def __init__(self, shape: ModelShape, recompute_attention: bool = False, parallel: TensorParallel = UNSHARDED, number: int = 0) -> None:
        super().__init__()
        self.attention_norm = make_norm(shape, parallel)
        self.attention = Attention(shape, recompute_attention, parallel, number)
        self.feed_forward_norm = make_norm(shape, parallel)
        self.feed_forward = FeedForward(shape, parallel)

    def forward(self, hidden: torch.Tensor, context: AttentionContext, cache: KeyValueCache | None = None) -> torch.Tensor:
        """Maps [B, T, H] to [B, T, H]; with sequence parallelism both hold this rank's positions only."""
        hidden = hidden + self.attention(self.attention_norm(hidden), context, cache)
        return hidden + self.feed_forward(self.feed_forward_norm(hidden))
