"""The process groups of a grid of ranks.

In: the grid. Out: `Groups`, this rank's process groups, and `ModelParallelUnit`, which shows them to DeepSpeed. Every rank creates every
group in the same order, as torch.distributed requires.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_patch.parallel.context import UNSHARED, ContextParallel
from megatron_patch.parallel.experts import UNDIVIDED, ExpertParallel
from megatron_patch.parallel.grid import Grid
from megatron_patch.parallel.tensor import TensorParallel


@dataclass(frozen=True)
class Groups:
    """This rank's process groups; in `tensor`, `data` and `same_layers`, None without model parallelism stands for the default group.

    Args:
        grid: this rank's coordinates.
        tensor: ranks that share each of this rank's layers; None if no other rank does.
        data: ranks that hold the same part of the model as this rank; they read different samples.
        pipeline: ranks that the hidden states of this rank's samples pass through; None without a pipeline.
        embedding: the first and the last pipeline rank of `pipeline`, which both hold a tied embedding; None on other ranks.
        same_layers: ranks that hold parts or copies of the same layers as this rank: all of its pipeline rank; None: all ranks.
        context: (size, ranks that share each of this rank's samples) for each context-parallel size above 1 of the run's stages.
        gathering: those sizes with which the ranks gather keys and values, in place of sharing heads.
        experts: how data-parallel ranks divide experts.
    """

    grid: Grid
    tensor: dist.ProcessGroup | None
    data: dist.ProcessGroup | None
    pipeline: dist.ProcessGroup | None = None
    embedding: dist.ProcessGroup | None = None
    same_layers: dist.ProcessGroup | None = None
    context: tuple[tuple[int, dist.ProcessGroup], ...] = ()
    gathering: frozenset[int] = frozenset()
    experts: ExpertParallel = UNDIVIDED

    def context_parallel(self, size: int) -> ContextParallel:
        """Returns how positions are shared in a stage with this context-parallel size, one of those that `make_groups` was given."""
        if size == 1:
            return UNSHARED
        group = dict(self.context)[size].group_name
        return ContextParallel(self.grid.data_parallel_rank % size, size, group, size in self.gathering)

    def tensor_parallel(self, sequence: bool) -> TensorParallel:
        """Returns how this rank's layers are sharded; with `sequence`, positions are sharded too if several ranks share a layer."""
        grid = self.grid
        return TensorParallel(grid.tensor_parallel_rank, grid.tensor_parallel_size, self.tensor, sequence and grid.tensor_parallel_size > 1)


def make_groups(grid: Grid, context_sizes: Iterable[int] = (), gathering: Iterable[int] = (), expert_size: int = 1) -> Groups:
    """Creates all process groups of the grid and returns this rank's; every rank must call it.

    Args:
        grid: this rank's coordinates.
        context_sizes: context-parallel sizes of the run's stages. Groups of all of them are created at once, so that none has to be in the
            middle of a run.
        gathering: those sizes with which the ranks gather keys and values.
        expert_size: data-parallel ranks that divide the experts.
    """
    coordinates = [dataclasses.replace(grid, rank=rank) for rank in range(grid.world_size)]

    def make_group(
        key: Callable[[Grid], tuple[int, ...]], is_member: Callable[[Grid], bool] = lambda other: True
    ) -> dist.ProcessGroup | None:
        """Creates a group for each value of `key` and returns the group of this rank, or None if it is in none."""
        local_group = None
        members: dict[tuple[int, ...], list[int]] = {}
        for other in coordinates:
            if is_member(other):
                members.setdefault(key(other), []).append(other.rank)
        for _, ranks in sorted(members.items()):
            group = dist.new_group(ranks)
            if grid.rank in ranks:
                local_group = group
        return local_group

    def holds_embedding(other: Grid) -> bool:
        return other.pipeline_parallel_rank in (0, grid.pipeline_parallel_size - 1)

    def make_context_group(size: int) -> dist.ProcessGroup:
        group = make_group(lambda other: (other.pipeline_parallel_rank, other.tensor_parallel_rank, other.data_parallel_rank // size))
        assert group is not None
        return group

    context = tuple((size, make_context_group(size)) for size in sorted(set(context_sizes) - {1}))
    gathers = frozenset(gathering)
    experts = UNDIVIDED
    if expert_size > 1:
        dividing = make_group(
            lambda other: (other.pipeline_parallel_rank, other.tensor_parallel_rank, other.data_parallel_rank // expert_size)
        )
        experts = ExpertParallel(grid.data_parallel_rank % expert_size, expert_size, dividing)
    if grid.tensor_parallel_size * grid.pipeline_parallel_size == 1:
        return Groups(grid, None, None, context=context, gathering=gathers, experts=experts)
    tensor = make_group(lambda other: (other.pipeline_parallel_rank, other.data_parallel_rank))
    data = make_group(lambda other: (other.pipeline_parallel_rank, other.tensor_parallel_rank))
    if grid.pipeline_parallel_size == 1:
        return Groups(grid, tensor, data, context=context, gathering=gathers, experts=experts)
    pipeline = make_group(lambda other: (other.data_parallel_rank, other.tensor_parallel_rank))
    embedding = make_group(lambda other: (other.data_parallel_rank, other.tensor_parallel_rank), holds_embedding)
    same_layers = make_group(lambda other: (other.pipeline_parallel_rank,))
    in_layer = tensor if grid.tensor_parallel_size > 1 else None
    return Groups(grid, in_layer, data, pipeline, embedding, same_layers, context, gathers, experts)


@dataclass(frozen=True)
class Replicas:
    """The ranks that hold the same part of a model and divide the data of an evaluation among them.

    Args:
        rank: number of this rank among them.
        size: number of these ranks.
        group: their process group; None: the default group.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def owns(self, index: int) -> bool:
        """Returns whether this rank processes the item of this index."""
        return index % self.size == self.rank

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums the tensor over the replicas, in place, and returns it; every rank must call it."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, value: object) -> list[object]:
        """Returns the values of all replicas, in order, on every rank; every rank must call it."""
        if self.size == 1:
            return [value]
        values: list[object] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


SINGLE_REPLICA = Replicas()
"""The replicas of a model that exists once."""


class ModelParallelUnit:
    """The interface ("mpu") through which DeepSpeed learns which ranks share a model.

    Args:
        groups: process groups of a grid with tensor parallelism.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def get_model_parallel_rank(self) -> int:
        """Returns which shard of each layer this rank holds."""
        return self._groups.grid.tensor_parallel_rank

    def get_model_parallel_world_size(self) -> int:
        """Returns the number of ranks that share each layer."""
        return self._groups.grid.tensor_parallel_size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """Returns the process group of the ranks that share each layer."""
        return self._groups.tensor

    def get_data_parallel_rank(self) -> int:
        """Returns which samples of a global batch this rank reads."""
        return self._groups.grid.data_parallel_rank

    def get_data_parallel_world_size(self) -> int:
        """Returns the number of ranks that hold the same part of the model."""
        return self._groups.grid.data_parallel_size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """Returns the process group of the ranks that hold the same part of the model."""
        return self._groups.data
