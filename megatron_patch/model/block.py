"""A transformer block: attention and feed-forward layer each add to the residual stream, with norms before or after them."""

from __future__ import annotations

import torch
from torch import nn

from megatron_patch.model.attention import Attention, AttentionContext, KeyValueCache
from megatron_patch.model.experts import MixtureOfExperts
from megatron_patch.model.feed_forward import FeedForward
from megatron_patch.model.norm import make_norm
from megatron_patch.model.shape import ModelShape
from megatron_patch.parallel.experts import UNDIVIDED, ExpertParallel
from megatron_patch.parallel.tensor import UNSHARDED, TensorParallel


class Block(nn.Module):
    """Computes h = x + post(attention(pre(x))), then h + post(feed_forward(pre(h))), each with norms of its own.

    A norm that the shape's placement leaves out is the identity.

    Args:
        shape: the model's shape.
        recompute_attention: whether the backward pass recomputes the scaled dot products.
        parallel: the ranks that share the layer.
        number: number of the block, from 0, which decides on its window, its rotation and its experts.
        divided: the data-parallel ranks that divide the experts.
    """

    def __init__(
        self,
        shape: ModelShape,
        recompute_attention: bool = False,
        parallel: TensorParallel = UNSHARDED,
        number: int = 0,
        divided: ExpertParallel = UNDIVIDED,
    ) -> None:
        super().__init__()
        before, after = shape.norms_before, shape.norms_after
        self.attention_norm = make_norm(shape, parallel) if before else None
        self.attention = Attention(shape, recompute_attention, parallel, number)
        self.attention_output_norm = make_norm(shape, parallel) if after else None
        self.feed_forward_norm = make_norm(shape, parallel) if before else None
        experts = shape.experts_of(number)
        self.feed_forward = FeedForward(shape, parallel) if experts is None else MixtureOfExperts(shape, experts, parallel, divided)
        self.feed_forward_output_norm = make_norm(shape, parallel) if after else None

    def forward(self, hidden: torch.Tensor, context: AttentionContext, cache: KeyValueCache | None = None) -> torch.Tensor:
        """Maps [B, T, H] to [B, T, H]; with sequence parallelism both hold this rank's positions only."""
        attended = self.attention(_normalized(self.attention_norm, hidden), context, cache)
        hidden = hidden + _normalized(self.attention_output_norm, attended)
        normalized = _normalized(self.feed_forward_norm, hidden)
        if isinstance(self.feed_forward, MixtureOfExperts):
            fed_forward = self.feed_forward(normalized, context.real_samples)
        else:
            fed_forward = self.feed_forward(normalized)
        return hidden + _normalized(self.feed_forward_output_norm, fed_forward)


def _normalized(norm: nn.Module | None, hidden: torch.Tensor) -> torch.Tensor:
    if norm is None:
        return hidden
    result: torch.Tensor = norm(hidden)
    return result
