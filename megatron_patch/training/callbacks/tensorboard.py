"""Writes TensorBoard events. In: values over tokens. Out: a folder for `tensorboard --logdir`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_patch.errors import ConfigError


class TensorBoard:
    """A `ChartWriter` that writes a folder of TensorBoard events.

    Args:
        folder: path of the folder.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, folder: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "--tensorboard-dir needs TensorBoard, which is not installed",
                "an environment with the package tensorboard",
                "pip install 'megatron_patch[tensorboard]'",
            ) from error
        self.name = f"--tensorboard-dir {folder}"
        self._folder = folder
        self._make: Any = SummaryWriter
        self._writer: Any = None

    def open(self, drop_after: int | None) -> None:
        """Opens a file in the folder; TensorBoard hides the events of older files after `drop_after` tokens."""
        self._writer = self._make(self._folder, purge_step=None if drop_after is None else drop_after + 1)

    def add(self, tokens: int, values: Mapping[str, float]) -> None:
        """Adds values, which a thread of TensorBoard writes."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, tokens)

    def close(self) -> None:
        """Writes the remaining events and closes the file."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
