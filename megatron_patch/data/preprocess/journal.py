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

from megatron_patch.data.preprocess.encode import EncodeSettings
from megatron_patch.data.preprocess.inputs import STANDARD_INPUT, Span
from megatron_patch.errors import DataError
from megatron_patch.files import checksum, fsync_folder

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


def check_identity(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """A run may be continued only over the same input with the same settings.

    Raises:
        DataError: naming the first difference.
    """
    difference = None
    if before.get("format") != now["format"]:
        difference = f"the journal has the format {before.get('format')!r}"
    elif before["settings"] != now["settings"]:
        names = [name for name in now["settings"] if before["settings"].get(name) != now["settings"][name]]
        difference = "; ".join(f"{name} was {before['settings'].get(name)!r}, now {now['settings'][name]!r}" for name in names)
    elif before["tokenizer"] != now["tokenizer"]:
        difference = "the tokenizer's files have changed"
    elif before["inputs"] != now["inputs"]:
        if len(before["inputs"]) != len(now["inputs"]):
            difference = f"{len(before['inputs'])} inputs before, {len(now['inputs'])} now"
        else:
            one, other = next((one, other) for one, other in zip(before["inputs"], now["inputs"], strict=True) if one != other)
            difference = f"{one[0]} was input, now {other[0]}" if one[0] != other[0] else f"{one[0]} has changed"
    if difference:
        raise DataError(
            f"the unfinished run cannot be resumed: {difference}",
            "the same input and settings",
            "restore them, or start over with --overwrite instead of --resume",
        )


class Journal:
    """Writes the journal of a run.

    Args:
        path: its file.
        identity: what the run reads and how.
        resumed: it goes on with a journal that is there.

    Raises:
        DataError: it cannot be written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], resumed: bool) -> None:
        self._path, self._identity = path, identity
        self._file: TextIO | None = None
        if resumed:
            self._mend()

    def _mend(self) -> None:
        """Cuts off a last line that is not whole."""
        data = self._path.read_bytes()
        with self._path.open("rb+") as file:
            file.truncate(data.rfind(b"\n") + 1)

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
                    self._file.write(json.dumps(self._identity) + "\n")
                    fsync_folder(self._path.parent)
            self._file.write(json.dumps(asdict(record)) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DataError(
                f"cannot write {self._path}: {error.strerror or error}", "a writable folder with free space", "free space, and use --resume"
            ) from error

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError:
                return


def last_record(path: Path) -> tuple[dict[str, Any], Record] | None:
    """(identity, last record) of a journal; None where nothing is recorded.

    Raises:
        DataError: the file is no journal.
    """
    if not path.is_file():
        return None
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
        if len(lines) < 2:
            return None
        found = json.loads(lines[-1])
        found["outputs"] = tuple((documents, tokens) for documents, tokens in found["outputs"])
        return json.loads(lines[0]), Record(**found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no journal: {error}", "what tools/preprocess_data.py writes", "start over with --overwrite instead of --resume"
        ) from error
