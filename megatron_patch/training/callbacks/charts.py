"""Numbers of a run for a service that draws them, over tokens, under the same names in every service.

In: records. Out: values, handed to TensorBoard or Weights & Biases. A chart that cannot be drawn is no reason to end a run of a thousand
GPUs: it is said once, and tried again later; SAVE/metrics.jsonl has what the chart misses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

from megatron_patch.errors import ConfigError
from megatron_patch.training.callbacks.base import STEP_METRICS, Callback, EvaluationRecord, RunStart, StepRecord
from megatron_patch.training.faults.exit_protocol import print_stderr

_STEP_VALUES = (*STEP_METRICS, "cost", "cost_tokens", "patch_size")
_FIRST_PAUSE = 60.0


def named_values(record: StepRecord | EvaluationRecord) -> dict[str, float]:
    """A record's numbers under the names that all services show.

    They are the records' own, behind "train/" or "eval/"; a training loss is called by its kind, so that no chart joins the two.
    """
    if isinstance(record, EvaluationRecord):
        values = {"eval/token_loss": record.token_loss}
        if record.patch_size > 1:
            values["eval/patch_loss"] = record.patch_loss
        return values
    pairs = ((name, getattr(record, name)) for name in _STEP_VALUES)
    loss = "train/token_loss" if record.patch_size == 1 else "train/patch_loss"
    return {loss: record.loss, **{f"train/{name}": float(value) for name, value in pairs if value is not None}}


class ChartWriter(Protocol):
    """A service; any method may fail."""

    name: str

    def open(self, resumed_at: int) -> None:
        """Begins to write, behind so many tokens of the run: later values are of an earlier life; 0: none are."""

    def add(self, tokens: int, values: Mapping[str, float]) -> None:
        """Values at a number of tokens."""

    def close(self) -> None:
        """Writes what is left, where the service is open."""


class Charts(Callback):
    """Tells a service of steps and evaluations.

    Args:
        writer: the service.
        clock: seconds.
    """

    def __init__(self, writer: ChartWriter, clock: Callable[[], float] = time.monotonic) -> None:
        self._writer, self._clock = writer, clock
        self._missed_from: int | None = None
        self._pause, self._again = _FIRST_PAUSE, 0.0

    def on_start(self, record: RunStart) -> None:
        """Opens the service.

        Raises:
            ConfigError: it cannot be opened, and the run is a new one.
        """
        try:
            self._writer.open(record.tokens)
        except Exception as error:
            if record.tokens == 0:
                allowed = "what can be written to, at least at a run's first start"
                raise ConfigError(f"{self._writer.name} cannot be written: {error}", allowed, "change its flag, or leave it out") from error
            self._fail(record.tokens, error)

    def on_step(self, record: StepRecord) -> None:
        """Each step."""
        self._add(record)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Each evaluation."""
        self._add(record)

    def _add(self, record: StepRecord | EvaluationRecord) -> None:
        missed_from = self._missed_from
        if missed_from is not None and self._clock() < self._again:
            return
        try:
            if missed_from is not None:
                self._writer.open(0)
            self._writer.add(record.tokens, named_values(record))
        except Exception as error:
            self._fail(record.tokens, error)
            return
        if missed_from is not None:
            print_stderr(
                f"{self._writer.name} can be written again; from {missed_from:,} to {record.tokens:,} tokens metrics.jsonl alone has values"
            )
            self._missed_from = None

    def _fail(self, tokens: int, error: Exception) -> None:
        if self._missed_from is None:
            self._missed_from, self._pause = tokens, _FIRST_PAUSE
            print_stderr(
                f"{self._writer.name} cannot be written: {error}; training goes on, metrics.jsonl has all values, and it is tried again"
            )
        self._again = self._clock() + self._pause
        self._pause *= 2
        self._close(quietly=True)

    def _close(self, quietly: bool) -> None:
        try:
            self._writer.close()
        except Exception as error:
            if not quietly:
                print_stderr(f"{self._writer.name} cannot be written: {error}; metrics.jsonl has all values")

    def close(self) -> None:
        """Ends the chart."""
        self._close(quietly=self._missed_from is not None)
