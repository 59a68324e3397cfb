"""Keeps the records of a run for the script that started it: the last of each kind, and all of them where no metrics file is written."""

from __future__ import annotations

from typing import Any

from megatron_patch.training.callbacks.base import Callback, EvaluationRecord, RunEnd, RunStart, SaveRecord, StepRecord, SwitchRecord
from megatron_patch.training.callbacks.metrics import to_json


class Recorder(Callback):
    """Keeps records.

    Args:
        keeps_all: whether all records are kept, as lines of a metrics file would have them.
    """

    def __init__(self, keeps_all: bool) -> None:
        self._keeps_all = keeps_all
        self.records: list[dict[str, Any]] = []
        self.last_step: StepRecord | None = None
        self.last_evaluation: EvaluationRecord | None = None
        self.end: RunEnd | None = None

    def _add(self, kind: str, record: Any) -> None:
        if self._keeps_all:
            self.records.append(to_json(kind, record))

    def on_start(self, record: RunStart) -> None:
        """Keeps the record."""
        self._add("start", record)

    def on_step(self, record: StepRecord) -> None:
        """Keeps the record, also as the last step."""
        self.last_step = record
        self._add("step", record)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Keeps the record, also as the last evaluation."""
        self.last_evaluation = record
        self._add("evaluation", record)

    def on_switch(self, record: SwitchRecord) -> None:
        """Keeps the record."""
        self._add("switch", record)

    def on_save(self, record: SaveRecord) -> None:
        """Keeps the record."""
        self._add("save", record)

    def on_end(self, record: RunEnd) -> None:
        """Keeps the record, also as the end of the run."""
        self.end = record
        self._add("end", record)
