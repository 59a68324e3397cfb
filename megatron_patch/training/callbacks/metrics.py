"""Writes SAVE/metrics.jsonl: one JSON object for each record; a resumed run has each step once.

In: records. Out: lines with a "type": start, step, evaluation, switch, save, end. Numbers that JSON cannot express (a loss that is not
finite) are written as null, and as text under the field's name plus "_text". To add a field, add it to a record in base.py and set it in
accounting.py.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_patch.errors import CheckpointError
from megatron_patch.training.callbacks.base import Callback, EvaluationRecord, RunEnd, RunStart, SaveRecord, StepRecord, SwitchRecord
from megatron_patch.training.callbacks.jsonl_writer import JsonlWriter
from megatron_patch.utils.files import open_new


def to_json(kind: str, record: Any) -> dict[str, Any]:
    """Returns a record as plain JSON values, with its type and the time."""
    values: dict[str, Any] = {"type": kind, "time": round(time.time(), 3)}
    for name, value in asdict(record).items():
        if isinstance(value, float) and not math.isfinite(value):
            values[name], values[f"{name}_text"] = None, str(value)
        else:
            values[name] = value
    return values


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of a metrics file; lines that a crash left incomplete are skipped."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                yield record


def truncate(path: Path, step: int) -> None:
    """Drops the records after a step, because a resumed run writes them again; the file is replaced atomically.

    Args:
        path: path of the file; nothing happens if it does not exist.
        step: last step whose records are kept.

    Raises:
        CheckpointError: the file cannot be read, or its replacement cannot be written.
    """
    if not path.exists():
        return
    temporary = path.with_name(path.name + ".partial")
    try:
        with open_new(temporary, "w") as file:
            for record in read_metrics(path):
                at = record.get("step", 0)
                if record.get("type") == "start" or (isinstance(at, int) and at <= step):
                    file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {temporary}: {error.strerror}", "a folder with free space", "free space, then restart the run"
        ) from error


class Metrics(Callback):
    """Writes the metrics file.

    Args:
        path: path of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lines = path, JsonlWriter(path)

    def on_start(self, record: RunStart) -> None:
        """Drops the records after the step that the run resumes from, and writes a "start" line."""
        truncate(self._path, record.step)
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
