"""Writes TensorBoard events. In: steps and evaluations. Out: a folder for `tensorboard --logdir`, with values over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_patch.requirements import missing_package
from megatron_patch.training.callbacks.base import EvaluationRecord, RunEnd, RunStart, StepRecord
from megatron_patch.training.callbacks.charts import named_values
from megatron_patch.training.callbacks.delivery import Timed


class TensorBoard:
    """A `Service` that writes a folder of TensorBoard events.

    Args:
        folder: path of the folder.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    records: tuple[type, ...] = (StepRecord, EvaluationRecord)

    def __init__(self, folder: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise missing_package("tensorboard", f"--tensorboard-dir {folder}") from error
        self.name = f"--tensorboard-dir {folder}"
        self._folder = folder
        self._make: Any = SummaryWriter
        self._writer: Any = None

    def open(self, start: RunStart | None) -> None:
        """Opens a file in the folder; TensorBoard hides the events of older files that the run repeats."""
        self._writer = self._make(self._folder, purge_step=None if start is None else start.tokens + 1)

    def add(self, records: Sequence[Timed]) -> None:
        """Writes the values."""
        for timed in records:
            for name, value in named_values(timed.record).items():
                self._writer.add_scalar(name, value, timed.record.tokens, timed.time)
        self._writer.flush()  # raises what its thread could not write

    def abandon(self) -> None:
        """Closes the file."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def close(self, end: RunEnd | None) -> None:
        """Closes the file."""
        self._writer.close()
