"""What is finished: a journal beside the output, from which a run that was killed goes on.

In: from time to time, after the output so far was forced to disk, how far input and output are. Out: the last such record. The journal is
PREFIX_progress.jsonl: a first line that says what is read and how, then a line for each record; a last line that a crash cut short is
as if it had not been written. Resuming cuts the output back to the last record and reads on from there: whatever came behind it is
written again, so that the result is that of an unbroken run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import xxhash

from megatron_patch.errors import DataError
from megatron_patch.preprocess.encode import EncodeSettings
from megatron_patch.raw_text.inputs import STANDARD_INPUT, Span
from megatron_patch.utils.files import checksum, fsync_folder, write_durably

FORMAT = "megatron_patch/progress-1"
# What may change between a run and its continuation: both backends give the same ids, and the tokenizer is known by its checksum.
_FREE = ("backend", "tokenizer_model", "vocab_file", "merge_file")


@dataclass(frozen=True)
class Record:
    """How far a run is.

    Args:
        file: number of the input that was being read.
        upto: the unit of it to go on from.
        line: lines of that input before it.
        outputs: (documents, tokens) of each output, forced to disk.
        read: bytes.
        empty: texts without a token so far.
        filtered: texts too short or too long so far.
        checked: texts compared with the reference so far.
        bad: bad lines so far.
        bad_bytes: size of their list.
        lengths: the histogram of lengths.
        longest: of the lengths.
        largest: of the texts' ids so far.
        distrusted: a fast backend gave other ids than the reference before, so that it is not used again.
        seconds: worked so far.
        complete: all input has been read.
    """

    file: int = 0
    upto: int = 0
    line: int = 0
    outputs: tuple[tuple[int, int], ...] = ()
    read: int = 0
    empty: int = 0
    filtered: int = 0
    checked: int = 0
    bad: int = 0
    bad_bytes: int = 0
    lengths: Mapping[str, int] = field(default_factory=dict)
    longest: int = 0
    largest: int = 0
    distrusted: bool = False
    seconds: float = 0.0
    complete: bool = False


def journal_path(output_prefix: str) -> Path:
    """The journal of a run."""
    return Path(f"{output_prefix}_progress.jsonl")


def tokenizer_checksum(settings: EncodeSettings) -> str:
    """xxh64 over the tokenizer's files, or over its size where it has none."""
    digest = xxhash.xxh64()
    for name in (settings.tokenizer_model, settings.vocab_file, settings.merge_file):
        if name is None:
            continue
        path = Path(name)
        for file in (path,) if path.is_file() else (path / "tokenizer.json", path / "tokenizer_config.json"):
            digest.update((checksum(file) if file.is_file() else "-").encode())
    return digest.hexdigest() if settings.tokenizer_model or settings.vocab_file else f"{settings.vocab_size}"


def identity(spans: Sequence[Span], settings: EncodeSettings, **more: Any) -> dict[str, Any]:
    """What a run reads and how: all that its result depends on, as plain values. A file is known by name, size and time of change.

    Args:
        spans: the input.
        settings: of encoding.
        more: other settings, as plain values.
    """
    inputs = []
    for span in spans:
        known = Path(span.path).stat() if span.path != STANDARD_INPUT else None
        stamp = [known.st_size, known.st_mtime_ns] if known else [0, 0]
        inputs.append([os.path.abspath(span.path) if known else span.path, *stamp, span.start, span.end])
    chosen = {name: value for name, value in asdict(settings).items() if name not in _FREE}
    chosen = {name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()}
    chosen.update(more)
    return {"format": FORMAT, "inputs": inputs, "settings": chosen, "tokenizer": tokenizer_checksum(settings)}


def identity_checksum(found: Mapping[str, Any]) -> str:
    """One number for an identity."""
    return xxhash.xxh64(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _same_run(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """A run may be continued only with the same settings.

    Raises:
        DataError: naming the differences.
    """
    difference = None
    if before.get("format") != now["format"]:
        difference = f"the journal has the format {before.get('format')!r}"
    elif before["settings"] != now["settings"]:
        names = [name for name in now["settings"] if before["settings"].get(name) != now["settings"][name]]
        difference = "; ".join(f"{name} was {before['settings'].get(name)!r}, now {now['settings'][name]!r}" for name in names)
    elif before["tokenizer"] != now["tokenizer"]:
        difference = "the tokenizer's files have changed"
    if difference:
        raise _refusal(difference)


def _is_of_this_input(record: Record, before: Sequence[Any], now: Sequence[Any]) -> bool:
    """Whether what a record has read, and the file to go on in, are what they were; files behind it may be repaired, added or left out."""
    if record.complete:
        return before == now
    return record.file < len(now) and before[: record.file + 1] == now[: record.file + 1]


def _input_difference(before: Sequence[Any], now: Sequence[Any]) -> str:
    for one, other in zip(before, now, strict=False):
        if one != other:
            return f"{one[0]} was input, now {other[0]}" if one[0] != other[0] else f"{one[0]} has changed"
    return f"{len(before)} inputs before, {len(now)} now"


def _refusal(difference: str) -> DataError:
    return DataError(
        f"the unfinished run cannot be resumed: {difference}",
        "the same settings, and the same input as far as it has been read",
        "restore them, or start over with --overwrite instead of --resume",
    )


class Journal:
    """Writes the journal of a run.

    Args:
        path: its file.
        identity: what the run reads and how.
        begin: the record that the run goes on from; None: it begins anew.

    Raises:
        DataError: it cannot be written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], begin: Record | None) -> None:
        self._path = path
        self._file: TextIO | None = None
        self._first = json.dumps(identity) + "\n"
        if begin is not None:
            try:
                write_durably(path, self._first + _line(begin))
            except OSError as error:
                raise _unwritable(path, error) from error

    def add(self, record: Record) -> None:
        """Writes a record, forced to disk.

        Raises:
            DataError: no space left.
        """
        try:
            if self._file is None:
                new = not self._path.exists()
                self._file = self._path.open("a", encoding="utf-8")
                if new:
                    self._file.write(self._first)
                    fsync_folder(self._path.parent)
            self._file.write(_line(record))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError:
                return


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(f"cannot write {path}: {error.strerror or error}", "a writable folder with free space", "free space, and use --resume")


def _line(record: Record) -> str:
    return json.dumps(asdict(record)) + "\n"


def _records(path: Path) -> tuple[dict[str, Any], list[Record]] | None:
    """(identity, records) of a journal; None where nothing is recorded. A last line that is cut short does not count.

    Raises:
        DataError: the file is no journal.
    """
    if not path.is_file():
        return None
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
        if len(lines) < 2:
            return None
        records = []
        for line in lines[1:]:
            found = json.loads(line)
            found["outputs"] = tuple((documents, tokens) for documents, tokens in found["outputs"])
            records.append(Record(**found))
        return json.loads(lines[0]), records
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no journal: {error}", "what tools/preprocess_data.py writes", "start over with --overwrite instead of --resume"
        ) from error


def last_record(path: Path) -> Record | None:
    """How far an unfinished run has come; None: nothing is recorded.

    Raises:
        DataError: the file is no journal.
    """
    found = _records(path)
    return found[1][-1] if found is not None else None


def record_to_resume(path: Path, now: Mapping[str, Any]) -> Record | None:
    """The last record that a run can go on from: all that had been read then is what it was. None: nothing is recorded.

    Args:
        path: the journal.
        now: what the run reads and how, as `identity` says.

    Raises:
        DataError: the file is no journal; other settings, or other input from the first record on.
    """
    found = _records(path)
    if found is None:
        return None
    before, records = found
    _same_run(before, now)
    for record in reversed(records):
        if _is_of_this_input(record, before["inputs"], now["inputs"]):
            return record
    raise _refusal(_input_difference(before["inputs"], now["inputs"]))
