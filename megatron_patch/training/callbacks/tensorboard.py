"""TensorBoard events. In: values over tokens. Out: a folder that TensorBoard draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_patch.errors import ConfigError


class TensorBoard:
    """A folder of events, as a `ChartWriter`.

    Args:
        folder: where to.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, folder: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("--tensorboard-dir without TensorBoard", "pip install 'megatron_patch[tensorboard]'", "install it") from error
        self.name = f"--tensorboard-dir {folder}"
        self._folder = folder
        self._make: Any = SummaryWriter
        self._writer: Any = None

    def open(self, resumed_at: int) -> None:
        """Opens a file in the folder; events behind the point of resuming are hidden."""
        self._writer = self._make(self._folder, purge_step=resumed_at + 1 if resumed_at else None)

    def add(self, tokens: int, values: Mapping[str, float]) -> None:
        """Values; a thread writes them."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, tokens)

    def close(self) -> None:
        """Writes what is left."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
