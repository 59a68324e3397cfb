"""Initial weights.

The initial value of a parameter depends only on the seed and the parameter's name, so that every parallel layout starts from the same
model.
"""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from megatron_patch.model.shape import ModelShape
from megatron_patch.model.sharding import Shard, shard_of

_SEGMENT = 1 << 20
_RESIDUAL_OUTPUTS = (
    *("attention.output.weight", "feed_forward.down.weight"),
    *("feed_forward.experts.down.weight", "feed_forward.shared.down.weight"),
)


def parameter_seed(seed: int, name: str) -> int:
    """Returns the seed of one parameter's generator."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little") >> 1


def initial_span(
    name: str,
    parameter_shape: tuple[int, ...],
    shape: ModelShape,
    seed: int,
    start: int = 0,
    numel: int | None = None,
    threads: int = 1,
) -> torch.Tensor:
    """Returns a span of the initial value of one parameter, flattened.

    Matrices are drawn from N(0, init_std²); those whose output is added to the residual stream are scaled by 1/sqrt(2·layers) (GPT-2).
    Weights of norms are 1 (0 if they are stored minus 1), biases 0. Each segment of 2^20 elements has its own
    generator, so that a rank draws little more than its part.

    Args:
        name: the parameter's name in the model.
        parameter_shape: shape of the full parameter.
        shape: the model's shape.
        seed: seed of the run.
        start: index of the first element.
        numel: number of elements; None: up to the end.
        threads: number of threads that draw at the same time.

    Returns:
        float32 [numel], on the CPU.
    """
    total = math.prod(parameter_shape)
    end = total if numel is None else start + numel
    if len(parameter_shape) < 2:
        zeros = name.endswith(".bias") or shape.zero_centered_norms
        return torch.zeros(end - start) if zeros else torch.ones(end - start)
    std = shape.init_std / (math.sqrt(2 * shape.num_layers) if name.endswith(_RESIDUAL_OUTPUTS) else 1.0)
    first, last = start // _SEGMENT, -(-end // _SEGMENT)
    values = torch.empty(min(last * _SEGMENT, total) - first * _SEGMENT)

    def draw(segment: int) -> None:
        generator = torch.Generator().manual_seed(parameter_seed(seed, f"{name}/{segment}" if segment else name))
        values[(segment - first) * _SEGMENT :][:_SEGMENT].normal_(0.0, std, generator=generator)

    # Drawing releases Python's lock and uses one core.
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(draw, range(first, last)))
    return values[start - first * _SEGMENT : end - first * _SEGMENT]


class InitialWeights:
    """Reads spans of a rank's parts of the initial parameters.

    Args:
        shape: the model's shape.
        seed: seed of the run.
        threads: number of threads that draw at the same time.
    """

    def __init__(self, shape: ModelShape, seed: int, threads: int = 1) -> None:
        self._shape, self._seed, self._threads = shape, seed, threads
        self._last: tuple[str, torch.Tensor] = ("", torch.empty(0))

    def read(self, name: str, whole: tuple[int, ...], shard: Shard | None, start: int, numel: int) -> torch.Tensor:
        """Returns a span of a rank's part of a parameter, flattened.

        Args:
            name: the parameter's name in the model.
            whole: shape of the full parameter.
            shard: this rank's part; None: the full parameter.
            start: index of the first element.
            numel: number of elements.

        Returns:
            float32 [numel], on the CPU.
        """
        if shard is None or shard.dim == 0:
            begin = 0 if shard is None else shard.index * (math.prod(whole) // shard.count)
            return initial_span(name, whole, self._shape, self._seed, begin + start, numel, self._threads)
        # A part along an inner dimension is not contiguous in the parameter, so the full parameter is drawn once and its part kept.
        if self._last[0] != name:
            value = initial_span(name, whole, self._shape, self._seed, threads=self._threads).view(whole)
            self._last = (name, value.chunk(shard.count, dim=shard.dim)[shard.index].flatten())
        return self._last[1][start : start + numel]


@torch.no_grad()
def initialize(model: nn.Module, shape: ModelShape, seed: int, rank: int = 0, size: int = 1) -> None:
    """Sets all parameters to their initial values.

    Args:
        model: the model, of which this rank holds its part.
        shape: the model's shape.
        seed: seed of the run.
        rank: the tensor-parallel rank.
        size: number of tensor-parallel ranks.
    """
    initial = InitialWeights(shape, seed)
    for name, parameter in model.named_parameters():
        shard = shard_of(name, shape, rank, size)
        local = tuple(parameter.shape)
        whole = local if shard is None else shard.full_shape(local)
        parameter.copy_(initial.read(name, whole, shard, 0, parameter.numel()).view(local))
