"""Initial weights, each a function of (seed, parameter name) alone, and the parameters that weight decay leaves out.

Because no parameter's draw depends on another's, every parallel layout starts from the same model: a rank draws the whole parameter and
keeps its part.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn

from megatron_patch.model.shape import ModelShape
from megatron_patch.parallel.sharding import shard_of

_RESIDUAL_OUTPUTS = ("attention.output.weight", "feed_forward.down.weight")


def parameter_seed(seed: int, name: str) -> int:
    """The seed of one parameter's generator."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little") >> 1


def initial_value(name: str, parameter_shape: tuple[int, ...], shape: ModelShape, seed: int) -> torch.Tensor:
    """One parameter's initial value.

    Matrices are N(0, init_std²); those that write into the residual stream are scaled by 1/sqrt(2·layers) (GPT-2). Norms' weights are
    1, biases 0.

    Args:
        name: the parameter's name in the model.
        parameter_shape: its whole shape.
        shape: the model's shape.
        seed: of the run.

    Returns:
        float32, on the CPU.
    """
    if len(parameter_shape) < 2:
        return torch.zeros(parameter_shape) if name.endswith(".bias") else torch.ones(parameter_shape)
    std = shape.init_std / (math.sqrt(2 * shape.num_layers) if name.endswith(_RESIDUAL_OUTPUTS) else 1.0)
    generator = torch.Generator().manual_seed(parameter_seed(seed, name))
    return torch.empty(parameter_shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialize(model: nn.Module, shape: ModelShape, seed: int, rank: int = 0, size: int = 1) -> None:
    """Sets all parameters to their initial values; of `size` tensor-parallel ranks each keeps its part."""
    for name, parameter in model.named_parameters():
        shard = shard_of(name, shape, rank, size)
        whole = tuple(parameter.shape) if shard is None else shard.whole_shape(tuple(parameter.shape))
        value = initial_value(name, whole, shape, seed)
        parameter.copy_(value if shard is None else value.chunk(shard.count, dim=shard.dim)[shard.index])


def parameter_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices, which weight decay pulls to zero; norms and biases, which it leaves alone)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
