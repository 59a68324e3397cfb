"""Sends the numbers of a run to a chart service (TensorBoard, Weights & Biases), over tokens and under the same names everywhere.

In: records. Out: named values. A service that fails must not end a run on a thousand GPUs: the failure is printed once, the service is
tried again later, and SAVE/metrics.jsonl has the values that the chart lacks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

from megatron_patch.errors import ConfigError
from megatron_patch.training.callbacks.base import STEP_METRICS, Callback, EvaluationRecord, RunStart, StepRecord
from megatron_patch.training.faults.exit_protocol import print_stderr

_STEP_VALUES = (*STEP_METRICS, "cost", "cost_tokens", "patch_size")
_FIRST_PAUSE = 60.0  # seconds before a service that failed is tried again; doubled with each further failure


def named_values(record: StepRecord | EvaluationRecord) -> dict[str, float]:
    """Returns the numbers of a record by the names that all services show.

    These are the field names with the prefix "train/" or "eval/"; a training loss is named `token_loss` or `patch_loss`, so that no chart
    joins the two. The loss of one corpus of several is `eval/token_loss/NAME`.
    """
    if isinstance(record, EvaluationRecord):
        corpora = record.corpora if len(record.corpora) > 1 else {}
        values = {"eval/token_loss": record.token_loss}
        values |= {f"eval/token_loss/{name}": part.token_loss for name, part in corpora.items()}
        if record.patch_size > 1:
            values["eval/patch_loss"] = record.patch_loss
            values |= {f"eval/patch_loss/{name}": part.patch_loss for name, part in corpora.items()}
        return values
    pairs = ((name, getattr(record, name)) for name in _STEP_VALUES)
    loss = "train/token_loss" if record.patch_size == 1 else "train/patch_loss"
    return {loss: record.loss, **{f"train/{name}": float(value) for name, value in pairs if value is not None}}


class ChartWriter(Protocol):
    """A chart service; any method may raise any exception."""

    name: str

    def open(self, drop_after: int | None) -> None:
        """Opens the service.

        Args:
            drop_after: number of tokens after which values of previous starts are dropped, because the run repeats them; None: nothing is
                dropped.
        """

    def add(self, tokens: int, values: Mapping[str, float]) -> None:
        """Adds values at a number of tokens."""

    def close(self) -> None:
        """Writes the remaining values and closes the service; does nothing if it is not open."""


class Charts(Callback):
    """Sends steps and evaluations to a chart service.

    Args:
        writer: the service.
        clock: returns seconds.
    """

    def __init__(self, writer: ChartWriter, clock: Callable[[], float] = time.monotonic) -> None:
        self._writer, self._clock = writer, clock
        self._missed_from: int | None = None
        self._pause, self._retry_at = _FIRST_PAUSE, 0.0

    def on_start(self, record: RunStart) -> None:
        """Opens the service.

        Raises:
            ConfigError: the service cannot be opened at the start of a new run.
        """
        try:
            self._writer.open(record.tokens)
        except Exception as error:
            if record.tokens == 0:
                raise ConfigError(
                    f"{self._writer.name} cannot be written: {error}",
                    "a chart service that a new run can write to",
                    "change or omit its flag",
                ) from error
            self._fail(record.tokens, error)

    def on_step(self, record: StepRecord) -> None:
        """Sends a step."""
        self._add(record)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Sends an evaluation."""
        self._add(record)

    def _add(self, record: StepRecord | EvaluationRecord) -> None:
        missed_from = self._missed_from
        if missed_from is not None and self._clock() < self._retry_at:
            return
        try:
            if missed_from is not None:
                self._writer.open(None)
            self._writer.add(record.tokens, named_values(record))
        except Exception as error:
            self._fail(record.tokens, error)
            return
        if missed_from is not None:
            print_stderr(
                f"{self._writer.name} can be written again; from {missed_from:,} to {record.tokens:,} tokens only metrics.jsonl has values"
            )
            self._missed_from = None

    def _fail(self, tokens: int, error: Exception) -> None:
        if self._missed_from is None:
            self._missed_from, self._pause = tokens, _FIRST_PAUSE
            print_stderr(
                f"{self._writer.name} cannot be written: {error}; training continues, metrics.jsonl has all values, and a retry follows"
            )
        self._retry_at = self._clock() + self._pause
        self._pause *= 2
        self._close(quietly=True)

    def _close(self, quietly: bool) -> None:
        try:
            self._writer.close()
        except Exception as error:
            if not quietly:
                print_stderr(f"{self._writer.name} cannot be written: {error}; metrics.jsonl has all values")

    def close(self) -> None:
        """Closes the service."""
        self._close(quietly=self._missed_from is not None)
