"""The grid of ranks: tensor x pipeline x data parallel.

In: this process's rank and the sizes of the axes. Out: its coordinates. The tensor axis is innermost, then data, then pipeline, so that
the ranks that communicate most are neighbors.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_patch.errors import ConfigError
from megatron_patch.utils.units import plural


@dataclass(frozen=True)
class Grid:
    """Coordinates of one rank.

    Args:
        rank: number of this process, from 0.
        world_size: number of processes of the job.
        tensor_parallel_size: number of ranks that share each layer.
        pipeline_parallel_size: number of pipeline ranks, which share the list of layers.

    Raises:
        ConfigError: the world size is not a multiple of tensor_parallel_size x pipeline_parallel_size.
    """

    rank: int
    world_size: int
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1

    def __post_init__(self) -> None:
        model = self.tensor_parallel_size * self.pipeline_parallel_size
        if self.world_size % model:
            raise ConfigError(
                f"{plural(self.world_size, 'rank')} with tensor-parallel size {self.tensor_parallel_size} and pipeline-parallel size "
                f"{self.pipeline_parallel_size}",
                f"a number of ranks that is a multiple of {model}",
                "change the number of ranks or the parallel sizes",
            )

    @property
    def data_parallel_size(self) -> int:
        """Number of model replicas, which share each global batch."""
        return self.world_size // (self.tensor_parallel_size * self.pipeline_parallel_size)

    @property
    def tensor_parallel_rank(self) -> int:
        """Which shard of each layer this rank holds."""
        return self.rank % self.tensor_parallel_size

    @property
    def data_parallel_rank(self) -> int:
        """Which samples of a global batch this rank reads; without context parallelism, no other replica reads them."""
        return self.rank // self.tensor_parallel_size % self.data_parallel_size

    @property
    def pipeline_parallel_rank(self) -> int:
        """Which part of the list of layers this rank holds."""
        return self.rank // (self.tensor_parallel_size * self.data_parallel_size)
