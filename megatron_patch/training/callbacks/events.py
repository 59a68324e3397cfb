"""SAVE/events.jsonl: what happened to a run, for people, reports and scripts: starts, switches, saves, sick steps, stragglers, ends.

In: records. Out: lines with a "type", a "time" and a "step". Unlike metrics, nothing is dropped when a run is resumed: a step that is taken
again happened twice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_patch.files import append_line
from megatron_patch.training.callbacks.base import Callback, Event, RunEnd, RunStart, SaveRecord, SwitchRecord
from megatron_patch.training.callbacks.metrics import to_json


class Events(Callback):
    """Writes the file, a line at a time, so that a kill tears the last one at most.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def _write(self, values: dict[str, Any]) -> None:
        append_line(self._path, json.dumps(values))

    def on_start(self, record: RunStart) -> None:
        """A run begins or goes on."""
        self._write(to_json("start", record))

    def on_switch(self, record: SwitchRecord) -> None:
        """The next stage."""
        self._write(to_json("switch", record))

    def on_save(self, record: SaveRecord) -> None:
        """A checkpoint."""
        self._write(to_json("save", record))

    def on_event(self, event: Event) -> None:
        """Anything else."""
        values = to_json(event.kind, event)
        del values["kind"], values["details"]
        self._write(values | event.details)

    def on_end(self, record: RunEnd) -> None:
        """The end, on purpose; endings.py writes the others."""
        self._write(to_json("end", record))
