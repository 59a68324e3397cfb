"""The process groups of a grid: who shares a layer with me, and who holds the same part of the model over other samples.

In: the grid. Out: `Groups`, and the object that DeepSpeed asks about model parallelism. Every rank makes every group, in the same order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_patch.parallel.grid import Grid
from megatron_patch.parallel.tensor import TensorParallel


@dataclass(frozen=True)
class Groups:
    """This rank's process groups; None stands for all ranks of a job that shares no layers.

    Args:
        grid: the ranks' coordinates.
        tensor: ranks that share each of my layers.
        data: ranks that hold the same part of the model.
        pipeline: ranks that my samples pass through; None without a pipeline.
        ends: the first and the last of them, for what both hold; None in between.
    """

    grid: Grid
    tensor: dist.ProcessGroup | None
    data: dist.ProcessGroup | None
    pipeline: dist.ProcessGroup | None = None
    ends: dist.ProcessGroup | None = None

    def tensor_parallel(self, sequence: bool) -> TensorParallel:
        """How my layers are shared."""
        grid = self.grid
        return TensorParallel(grid.tensor_parallel_rank, grid.tensor_parallel_size, self.tensor, sequence and grid.tensor_parallel_size > 1)


def make_groups(grid: Grid) -> Groups:
    """Makes all groups and returns this rank's."""
    if grid.tensor_parallel_size * grid.pipeline_parallel_size == 1:
        return Groups(grid, None, None)
    places = [dataclasses.replace(grid, rank=rank) for rank in range(grid.world_size)]

    def mine(key: Callable[[Grid], tuple[int, ...]], chosen: Callable[[Grid], bool] = lambda place: True) -> dist.ProcessGroup | None:
        found = None
        for value in sorted({key(place) for place in places}):
            ranks = [place.rank for place in places if key(place) == value and chosen(place)]
            group = dist.new_group(ranks)
            if grid.rank in ranks:
                found = group
        return found

    def at_an_end(place: Grid) -> bool:
        return place.pipeline_parallel_rank in (0, grid.pipeline_parallel_size - 1)

    tensor = mine(lambda place: (place.pipeline_parallel_rank, place.data_parallel_rank))
    data = mine(lambda place: (place.pipeline_parallel_rank, place.tensor_parallel_rank))
    if grid.pipeline_parallel_size == 1:
        return Groups(grid, tensor, data)
    column = mine(lambda place: (place.data_parallel_rank, place.tensor_parallel_rank))
    ends = mine(lambda place: (place.data_parallel_rank, place.tensor_parallel_rank), at_an_end)
    return Groups(grid, tensor if grid.tensor_parallel_size > 1 else None, data, column, ends)


@dataclass(frozen=True)
class Replicas:
    """Ranks that hold the same part of a model and share out what is to be read.

    Args:
        rank: which of them this is.
        size: how many they are.
        group: they; None: all ranks of the job.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def mine(self, number: int) -> bool:
        """Whether the piece of this number is this rank's."""
        return number % self.size == self.rank

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over them, in place; every rank must call it."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, value: object) -> list[object]:
        """What each of them has, in order, on all; every rank must call it."""
        if self.size == 1:
            return [value]
        values: list[object] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


SINGLE_REPLICA = Replicas()
"""A model without copies."""


class ModelParallelUnit:
    """What DeepSpeed asks about the ranks that share a model ("mpu").

    Args:
        groups: of a grid with tensor parallelism.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def get_model_parallel_rank(self) -> int:
        """Which part of each layer is mine."""
        return self._groups.grid.tensor_parallel_rank

    def get_model_parallel_world_size(self) -> int:
        """Ranks that share each layer."""
        return self._groups.grid.tensor_parallel_size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """They."""
        return self._groups.tensor

    def get_data_parallel_rank(self) -> int:
        """Which samples are mine."""
        return self._groups.grid.data_parallel_rank

    def get_data_parallel_world_size(self) -> int:
        """Ranks that hold the same part of the model."""
        return self._groups.grid.data_parallel_size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """They."""
        return self._groups.data
