"""Writes SAVE/events.jsonl: starts, switches, saves, rejected steps, rewinds, stragglers, collapsed experts and ends of a run.

In: records. Out: lines with a "type", a "time" and a "step". Unlike metrics, events are never dropped: if a resumed run repeats a step, its
events are in the file twice.
"""

from __future__ import annotations

from pathlib import Path

from megatron_patch.training.callbacks.base import Callback, Event, RunEnd, RunStart, SaveRecord, SwitchRecord
from megatron_patch.training.callbacks.jsonl_writer import JsonlWriter
from megatron_patch.training.callbacks.metrics import to_json


class Events(Callback):
    """Writes the events file line by line, so that a kill damages at most the last line.

    Args:
        path: path of the file.
    """

    def __init__(self, path: Path) -> None:
        self._lines = JsonlWriter(path)

    def on_start(self, record: RunStart) -> None:
        """Writes a "start" line."""
        self._lines.add(to_json("start", record))

    def on_switch(self, record: SwitchRecord) -> None:
        """Writes a "switch" line."""
        self._lines.add(to_json("switch", record))

    def on_save(self, record: SaveRecord) -> None:
        """Writes a "save" line."""
        self._lines.add(to_json("save", record))

    def on_event(self, event: Event) -> None:
        """Writes a line with the type and the details of the event."""
        values = to_json(event.kind, event)
        del values["kind"], values["details"]
        self._lines.add(values | event.details)

    def on_end(self, record: RunEnd) -> None:
        """Writes an "end" line; after an error `exit_protocol` writes it."""
        self._lines.add(to_json("end", record))

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()
