"""What a preprocessing run was asked for, and how far it is.

In: the settings of a run; each batch after it has been written. Out: counts for the summary and for the user, and records of the progress
log, from which a run resumes.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_patch.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_patch.preprocess.dedup_shuffle import unordered_prefix
from megatron_patch.preprocess.encode import EncodedBatch
from megatron_patch.preprocess.progress_log import ProgressLog, Record
from megatron_patch.preprocess.summary import BadLines, LengthSample
from megatron_patch.raw_text.inputs import STANDARD_INPUT, FileRange
from megatron_patch.tokenizers.round_trip import TextChecks
from megatron_patch.utils.units import plural

ReportProgress = Callable[[int, int, int, float, float], None]
"""Called with (documents, tokens, bytes, seconds, fraction of the input) after each batch."""


@dataclass(frozen=True)
class Run:
    """The settings of a run, other than how to encode."""

    parts: tuple[FileRange, ...]
    prefixes: tuple[str, ...]
    output_prefix: str
    workers: int
    on_bad_line: Literal["skip", "fail"]
    separator: bytes | None
    dedup: bool
    shuffle_seed: int | None
    save_seconds: float
    may_be_empty: bool
    progress: ReportProgress | None
    notice: Callable[[str], None]

    @functools.cached_property
    def resumable(self) -> bool:
        """Whether the input can be read from any position."""
        return all(part.path != STANDARD_INPUT for part in self.parts)

    @property
    def changes_order(self) -> bool:
        """Whether documents are removed or reordered after all of them are written."""
        return self.dedup or self.shuffle_seed is not None

    @property
    def ordered_prefixes(self) -> tuple[str, ...]:
        """The prefixes of the outputs in the order of the input."""
        return tuple(map(unordered_prefix, self.prefixes)) if self.changes_order else self.prefixes

    @property
    def scratch(self) -> Path:
        """The folder of temporary files."""
        return Path(f"{self.output_prefix}_scratch")


def _size(part: FileRange) -> int:
    if part.path == STANDARD_INPUT:
        return 0
    return part.end - part.start if part.end is not None else os.path.getsize(part.path)


class Counters:
    """Counts documents, bytes and problems during a run, and saves them to the progress log."""

    def __init__(self, run: Run, begin: Record) -> None:
        self._run, self._begin = run, begin
        self._ends = [0, *itertools.accumulate(map(_size, run.parts))]
        self._started = time.monotonic()
        self._saved = self._started
        self.read, self.empty, self.filtered, self.checked = begin.read, begin.empty, begin.filtered, begin.checked
        self.text_checks = TextChecks(**begin.text_checks)
        self.largest = begin.largest
        self.lengths = LengthSample(begin.lengths, begin.longest)
        self.bad = BadLines(
            Path(f"{run.output_prefix}_bad_lines.jsonl"),
            run.on_bad_line,
            begin.file,
            begin.line,
            begin.bad,
            begin.bad_bytes,
            begin.bad_in_input,
            run.parts[begin.file].path if run.parts else "",
            begin.mostly_bad,
        )
        self.file, self.next_unit = begin.file, begin.next_unit
        self.backend: str | None = None
        self.encoder_note = ""

    @property
    def seconds(self) -> float:
        """The time spent, without the time between an interruption and its resumption."""
        return self._begin.seconds + time.monotonic() - self._started

    def add(self, encoded: EncodedBatch, writers: Sequence[IndexedDatasetWriter]) -> None:
        """Counts a batch that has been written."""
        self.bad.add(encoded)
        self.lengths.add(encoded.columns[0].lengths)
        self.read += encoded.bytes
        self.empty += encoded.empty
        self.filtered += encoded.filtered
        self.checked += encoded.checked
        self.text_checks += encoded.text_checks
        self.largest = max(self.largest, encoded.largest)
        self.file, self.next_unit = encoded.file, encoded.next_unit
        if self.backend is None:
            self._run.notice(f"encoding with {encoded.encoder_note}")
            more = encoded.fraction < 1 or encoded.file + 1 < len(self._run.parts)
            if more and 0 < encoded.lines == len(encoded.bad):
                # Before all of a large input is read: most likely the key of the text is wrong.
                none = f"none of the first {plural(encoded.lines, 'line')} has text"
                self._run.notice(f"warning: {none}; the first bad line is {self.bad.first}")
        self.backend, self.encoder_note = encoded.backend, encoded.encoder_note
        if self._run.progress is not None:
            before, after = self._ends[self.file : self.file + 2]
            done = before + encoded.fraction * (after - before)
            documents, tokens = sum(w.num_documents for w in writers), sum(w.num_tokens for w in writers)
            self._run.progress(documents, tokens, self.read, self.seconds, done / max(1, self._ends[-1]))

    def due(self) -> bool:
        """Returns whether it is time to save."""
        return self._run.resumable and time.monotonic() - self._saved >= self._run.save_seconds

    def save(self, progress_log: ProgressLog, writers: Sequence[IndexedDatasetWriter], complete: bool = False) -> None:
        """Forces all output to disk, and then adds a record to the progress log."""
        outputs = tuple(writer.sync() for writer in writers)
        bad_bytes = self.bad.sync()
        progress_log.add(
            Record(
                self.file,
                self.next_unit,
                self.bad.line,
                outputs,
                self.read,
                self.empty,
                self.filtered,
                self.checked,
                self.bad.count,
                bad_bytes,
                self.lengths.to_json(),
                self.lengths.longest,
                self.largest,
                self._begin.distrusted,
                self.seconds,
                complete,
                asdict(self.text_checks),
                self.bad.in_input,
                self.bad.mostly_bad_before,
            )
        )
        self._saved = time.monotonic()
