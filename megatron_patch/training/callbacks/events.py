"""SAVE/events.jsonl: what happened to a run, for people, reports and scripts: starts, switches, saves, sick steps, stragglers, ends.

In: records. Out: lines with a "type", a "time" and a "step". Unlike metrics, nothing is dropped when a run is resumed: a step that is taken
again happened twice.
"""

from __future__ import annotations

from pathlib import Path

from megatron_patch.training.callbacks.base import Callback, Event, RunEnd, RunStart, SaveRecord, SwitchRecord
from megatron_patch.training.callbacks.jsonl_writer import JsonlWriter
from megatron_patch.training.callbacks.metrics import to_json


class Events(Callback):
    """Writes the file, a line at a time, so that a kill tears the last one at most.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._lines = JsonlWriter(path)

    def on_start(self, record: RunStart) -> None:
        """A run begins or goes on."""
        self._lines.add(to_json("start", record))

    def on_switch(self, record: SwitchRecord) -> None:
        """The next stage."""
        self._lines.add(to_json("switch", record))

    def on_save(self, record: SaveRecord) -> None:
        """A checkpoint."""
        self._lines.add(to_json("save", record))

    def on_event(self, event: Event) -> None:
        """Anything else."""
        values = to_json(event.kind, event)
        del values["kind"], values["details"]
        self._lines.add(values | event.details)

    def on_end(self, record: RunEnd) -> None:
        """The end, on purpose; endings.py writes the others."""
        self._lines.add(to_json("end", record))

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()
