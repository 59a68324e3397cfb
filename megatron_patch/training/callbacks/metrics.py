"""Writes SAVE/metrics.jsonl: one JSON object for each record. A resumed run has each step once (`training.rollback`).

In: records. Out: lines with a "type": start, step, evaluation, switch, save, end. Numbers that JSON cannot express (a loss that is not
finite) are written as null, and as text under the field's name plus "_text"; in a list, only as null. To add a field, add it to a record
in base.py and set it in accounting.py.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_patch.training.callbacks.base import Callback, EvaluationRecord, RunEnd, RunStart, SaveRecord, StepRecord, SwitchRecord
from megatron_patch.training.callbacks.jsonl_writer import JsonlWriter
from megatron_patch.utils.files import LONGEST_LINE, bounded_lines


def to_json(kind: str, record: Any) -> dict[str, Any]:
    """Returns a record as plain JSON values, with its type and the time."""
    values: dict[str, Any] = {"type": kind, "time": round(time.time(), 3)}
    return values | _finite(asdict(record))


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values, and those inside of them, of which numbers that are not finite are None and text under another name.

    Empty tuples are left out.
    """
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            result[name], result[f"{name}_text"] = None, str(value)
        elif value == ():
            continue  # what only a model with experts has
        elif isinstance(value, tuple):
            result[name] = [None if isinstance(part, float) and not math.isfinite(part) else part for part in value]
        else:
            result[name] = _finite(value) if isinstance(value, dict) else value
    return result


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of a metrics file; lines that a crash left incomplete are skipped."""
    with path.open("rb") as file:
        for line in bounded_lines(file, LONGEST_LINE):
            try:
                record = json.loads(line or b"")
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                yield record


class Metrics(Callback):
    """Writes the metrics file.

    Args:
        path: path of the file.
    """

    def __init__(self, path: Path) -> None:
        self._lines = JsonlWriter(path)

    def on_start(self, record: RunStart) -> None:
        """Writes a "start" line."""
        self._lines.add(to_json("start", record))

    def on_step(self, record: StepRecord) -> None:
        """Writes a "step" line."""
        self._lines.add(to_json("step", record))

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Writes an "evaluation" line."""
        self._lines.add(to_json("evaluation", record))

    def on_switch(self, record: SwitchRecord) -> None:
        """Writes a "switch" line."""
        self._lines.add(to_json("switch", record))

    def on_save(self, record: SaveRecord) -> None:
        """Writes a "save" line."""
        self._lines.add(to_json("save", record))

    def on_end(self, record: RunEnd) -> None:
        """Writes an "end" line."""
        self._lines.add(to_json("end", record))

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()
