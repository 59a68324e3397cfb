"""The grid of ranks: tensor x pipeline x data, as one object that is passed to whoever asks "which part is mine".

In: this process' rank and the sizes of the axes. Out: its coordinates. Ranks are laid out with the tensor axis innermost, then data,
then pipeline, so that ranks that talk most are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_patch.errors import ConfigError


@dataclass(frozen=True)
class Grid:
    """Coordinates of one rank.

    Args:
        rank: this process among all.
        world_size: all processes.
        tensor_parallel_size: ranks that share each layer.
        pipeline_parallel_size: ranks that share the list of layers.

    Raises:
        ConfigError: the axes do not multiply to the number of ranks.
    """

    rank: int
    world_size: int
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1

    def __post_init__(self) -> None:
        model = self.tensor_parallel_size * self.pipeline_parallel_size
        if self.world_size % model:
            raise ConfigError(
                f"{self.world_size} ranks for {self.tensor_parallel_size} x {self.pipeline_parallel_size} model-parallel ranks",
                f"multiples of {model}",
                "change the number of ranks or the parallel sizes",
            )

    @property
    def data_parallel_size(self) -> int:
        """Ranks that share a global batch."""
        return self.world_size // (self.tensor_parallel_size * self.pipeline_parallel_size)

    @property
    def tensor_parallel_rank(self) -> int:
        """Which part of each layer is mine."""
        return self.rank % self.tensor_parallel_size

    @property
    def data_parallel_rank(self) -> int:
        """Which samples are mine."""
        return self.rank // self.tensor_parallel_size % self.data_parallel_size

    @property
    def pipeline_parallel_rank(self) -> int:
        """Which layers are mine."""
        return self.rank // (self.tensor_parallel_size * self.data_parallel_size)
