"""The process groups of a grid: who shares a layer with me, and who holds the same part of the model over other samples.

In: the grid. Out: `Groups`, and the object that DeepSpeed asks about model parallelism. Every rank makes every group, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    """

    grid: Grid
    tensor: dist.ProcessGroup | None
    data: dist.ProcessGroup | None

    def tensor_parallel(self, sequence: bool) -> TensorParallel:
        """How my layers are shared."""
        grid = self.grid
        return TensorParallel(grid.tensor_parallel_rank, grid.tensor_parallel_size, self.tensor, sequence and grid.tensor_parallel_size > 1)


def make_groups(grid: Grid) -> Groups:
    """Makes all groups and returns this rank's."""
    if grid.tensor_parallel_size * grid.pipeline_parallel_size == 1:
        return Groups(grid, None, None)
    places = [Grid(rank, grid.world_size, grid.tensor_parallel_size, grid.pipeline_parallel_size) for rank in range(grid.world_size)]

    def mine(key: Callable[[Grid], tuple[int, int]]) -> dist.ProcessGroup:
        found = None
        for value in sorted({key(place) for place in places}):
            group = dist.new_group([place.rank for place in places if key(place) == value])
            if value == key(grid):
                found = group
        assert found is not None
        return found

    tensor = mine(lambda place: (place.pipeline_parallel_rank, place.data_parallel_rank))
    data = mine(lambda place: (place.pipeline_parallel_rank, place.tensor_parallel_rank))
    return Groups(grid, tensor, data)


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
