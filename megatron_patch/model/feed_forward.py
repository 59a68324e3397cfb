"""The feed-forward layer of a block, applied to each position independently."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_patch.model.shape import ModelShape
from megatron_patch.parallel.tensor import UNSHARDED, RowParallelLinear, TensorParallel, copy_to_tensor_parallel


class FeedForward(nn.Module):
    """Computes down(a(gate(x)) · up(x)) (arXiv 2002.05202), a = silu (SwiGLU) or gelu (GeGLU), or down(gelu(up(x))); tanh form of GELU.

    Args:
        shape: the model's shape.
        parallel: the ranks that share the layer.
        inner: width of the layer; None: the shape's.
    """

    def __init__(self, shape: ModelShape, parallel: TensorParallel = UNSHARDED, inner: int | None = None) -> None:
        super().__init__()
        self.parallel = parallel
        hidden, inner, bias = shape.hidden_size, shape.ffn_hidden_size if inner is None else inner, shape.mlp_bias
        self.gate = nn.Linear(hidden, parallel.shard_size(inner), bias=bias) if shape.gated else None
        self.silu = shape.activation == "swiglu"
        self.up = nn.Linear(hidden, parallel.shard_size(inner), bias=bias)
        self.down = RowParallelLinear(inner, hidden, bias, parallel)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Maps [B, T, H] to [B, T, H]; with sequence parallelism both hold this rank's positions only."""
        result: torch.Tensor = self.down(self._inner(copy_to_tensor_parallel(hidden, self.parallel)))
        return result

    def partial(self, hidden: torch.Tensor) -> torch.Tensor:
        """Maps [B, T, H], all positions, to this rank's summand of the result, for a layer without biases."""
        return F.linear(self._inner(hidden), self.down.weight)

    def _inner(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.gate is None:
            return F.gelu(self.up(hidden), approximate="tanh")
        gate = self.gate(hidden)
        return (F.silu(gate) if self.silu else F.gelu(gate, approximate="tanh")) * self.up(hidden)
