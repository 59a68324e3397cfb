"""TensorBoard events with tokens on the x axis. In: records. Out: an event folder."""

from __future__ import annotations

from typing import Any

from megatron_patch.errors import ConfigError
from megatron_patch.training.callbacks.base import Callback, EvaluationRecord, RunStart, StepRecord

STEP_VALUES = (
    "lr",
    "grad_norm",
    "tokens_per_second",
    "positions_per_second",
    "tflops",
    "mfu",
    "memory_gib",
    "data_seconds",
    "step_seconds",
    "cost",
    "cost_tokens",
    "patch_size",
)


def named_values(record: StepRecord | EvaluationRecord) -> dict[str, float]:
    """A record's numbers under the names that both TensorBoard and Weights & Biases show.

    They are the records' own, behind "train/" or "eval/"; a training loss is called by its kind, so that no chart joins the two.
    """
    if isinstance(record, EvaluationRecord):
        values = {"eval/token_loss": record.token_loss}
        if record.patch_size > 1:
            values["eval/patch_loss"] = record.patch_loss
        return values
    pairs = ((name, getattr(record, name)) for name in STEP_VALUES)
    loss = "train/token_loss" if record.patch_size == 1 else "train/patch_loss"
    return {loss: record.loss, **{f"train/{name}": float(value) for name, value in pairs if value is not None}}


class TensorBoard(Callback):
    """Writes events.

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
        self._folder = folder
        self._make: Any = SummaryWriter
        self._writer: Any = None

    def on_start(self, record: RunStart) -> None:
        """Opens the folder; events behind the point of resuming are hidden."""
        self._writer = self._make(self._folder, purge_step=record.tokens + 1 if record.tokens else None)

    def _add(self, record: StepRecord | EvaluationRecord) -> None:
        for name, value in named_values(record).items():
            self._writer.add_scalar(name, value, record.tokens)

    def on_step(self, record: StepRecord) -> None:
        """Each step."""
        self._add(record)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Each evaluation."""
        self._add(record)

    def close(self) -> None:
        """Writes what is left."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
