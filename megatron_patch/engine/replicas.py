"""Compares the copies of parameters that several ranks hold.

In: a rank's parameters. Out: `ReplicaMismatch` records. Only checksums are sent, so a comparison of large models is cheap.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch

from megatron_patch.engine.distributed import gather_objects
from megatron_patch.engine.interface import ReplicaMismatch
from megatron_patch.model.shape import ModelShape
from megatron_patch.model.sharding import VOCABULARY_PARAMETERS, is_expert_parameter, shard_of
from megatron_patch.parallel.grid import Grid

_CHECKSUM_CHUNK = 1 << 22


def checksum_of_bits(tensor: torch.Tensor) -> tuple[int, int]:
    """Returns two sums over the bits of a tensor, one of them weighted by position; equal tensors have equal sums."""
    bits = tensor.detach().contiguous().view(-1).view(torch.int32 if tensor.element_size() == 4 else torch.int16)
    plain = weighted = 0
    for number, part in enumerate(bits.split(_CHECKSUM_CHUNK)):
        wide = part.long()
        plain += int(wide.sum())
        weighted += (number + 1) * int((wide * torch.arange(1, wide.numel() + 1, device=wide.device)).sum())
    return plain % 2**63, weighted % 2**63


def compare_replicas(names: Mapping[torch.Tensor, str], shape: ModelShape, grid: Grid, expert_size: int = 1) -> list[ReplicaMismatch]:
    """Returns the copies that differ from that of the lowest rank with the same part; every rank must call it.

    Args:
        names: what this rank holds of the model -> its names.
        shape: the shape of the full model.
        grid: this rank's coordinates.
        expert_size: data-parallel ranks that divide the experts.
    """
    local = {name: checksum_of_bits(parameter.data) for parameter, name in names.items()}
    expert_rank = grid.data_parallel_rank % expert_size
    # The ranks that hold a copy of the same tensor: (pipeline rank, parameter, tensor-parallel rank) -> rank -> checksum.
    holders: dict[tuple[int, str, int], dict[int, tuple[int, int]]] = {}
    for rank, gathered in enumerate(gather_objects((grid.pipeline_parallel_rank, grid.tensor_parallel_rank, expert_rank, local))):
        pipeline_rank, tensor_rank, its_experts, checksums = cast("tuple[int, int, int, dict[str, tuple[int, int]]]", gathered)
        for name, checksum in checksums.items():
            # Tied embeddings are on the first and on the last pipeline rank.
            pipeline_key = 0 if name in VOCABULARY_PARAMETERS else pipeline_rank
            tensor_key = tensor_rank if shard_of(name, shape, 0, grid.tensor_parallel_size) else 0
            if is_expert_parameter(name):
                tensor_key = tensor_rank * expert_size + its_experts
            holders.setdefault((pipeline_key, name, tensor_key), {})[rank] = checksum
    return [
        ReplicaMismatch(name, rank, min(copies))
        for (_, name, _), copies in sorted(holders.items())
        for rank, checksum in copies.items()
        if checksum != copies[min(copies)]
    ]
