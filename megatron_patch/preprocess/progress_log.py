"""The progress log of a preprocessing run, from which a killed run resumes.

In: at intervals, after the output so far was forced to disk, the progress of input and output. Out: the last such record. It is
PREFIX_progress.jsonl: the first line describes the input and the settings, and each further line is a record; an incomplete last line, as
after a crash, is ignored. Resuming truncates the output to the last record and continues reading from there, so that the result is that of
an uninterrupted run.
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
from megatron_patch.raw_text.inputs import STANDARD_INPUT, FileRange
from megatron_patch.utils.files import checksum, fsync_folder, open_in_place, read_small, reason, write_durably
from megatron_patch.utils.units import plural

_MOST_BYTES = 1 << 30  # a record has about a kilobyte
FORMAT = "megatron_patch/progress-1"
# What may differ when a run resumes: both encoders give the same ids, and the tokenizer is identified by its checksum.
_MAY_CHANGE = ("backend", "tokenizer_model", "vocab_file", "merge_file")
# Settings that earlier versions did not have: they are recorded where they differ from the default, so that earlier runs can be resumed.
_ADDED = {"keep_empty": False, "bos_token": None}
# Field of `Record` -> its key in the file, where they differ.
_JSON_KEYS = {"next_unit": "upto"}


@dataclass(frozen=True)
class Record:
    """The progress of a run.

    Args:
        file: index of the input that was being read.
        next_unit: the unit of it to continue from.
        line: lines of that input before this unit.
        outputs: (documents, tokens) of each output that are forced to disk.
        read: bytes read so far.
        empty: documents without a token so far, also if they are kept.
        filtered: documents that were too short or too long so far.
        checked: documents compared with the reference so far.
        bad: bad lines so far.
        bad_bytes: size of the list of bad lines.
        lengths: the histogram of document lengths.
        longest: the length of the longest document.
        largest: the largest id of the texts so far.
        distrusted: the fast encoder gave other ids than the reference, so it is not used again.
        seconds: time spent so far.
        complete: all input has been read.
        text_checks: the `TextChecks` so far, by name.
        bad_in_input: bad lines of that input so far.
        mostly_bad: how many inputs before it had mostly bad lines, and the sentence on the first one.
    """

    file: int = 0
    next_unit: int = 0
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
    text_checks: Mapping[str, Any] = field(default_factory=dict)
    bad_in_input: int = 0
    mostly_bad: Sequence[Any] = (0, "")


def progress_log_path(output_prefix: str) -> Path:
    """Returns the path of a run's progress log."""
    return Path(f"{output_prefix}_progress.jsonl")


def tokenizer_checksum(settings: EncodeSettings) -> str:
    """Returns the xxh64 of the tokenizer's files, or the vocabulary size of a tokenizer without files."""
    digest = xxhash.xxh64()
    for name in (settings.tokenizer_model, settings.vocab_file, settings.merge_file):
        if name is None:
            continue
        path = Path(name)
        for file in (path,) if path.is_file() else (path / "tokenizer.json", path / "tokenizer_config.json"):
            digest.update((checksum(file) if file.is_file() else "-").encode())
    return digest.hexdigest() if settings.tokenizer_model or settings.vocab_file else f"{settings.vocab_size}"


def identity(
    parts: Sequence[FileRange], settings: EncodeSettings, special_tokens: tuple[int | None, int | None], **more: Any
) -> dict[str, Any]:
    """Returns everything that the result of a run depends on, as plain values. A file is identified by name, size and time of change.

    Args:
        parts: the input.
        settings: how to encode.
        special_tokens: ids of the end-of-document and the beginning-of-sequence token, which files next to the tokenizer's may change.
        more: other settings, as plain values.
    """
    inputs = []
    for part in parts:
        known = Path(part.path).stat() if part.path != STANDARD_INPUT else None
        stamp = [known.st_size, known.st_mtime_ns] if known else [0, 0]
        inputs.append([os.path.abspath(part.path) if known else part.path, *stamp, part.start, part.end])
    chosen = {name: value for name, value in asdict(settings).items() if name not in _MAY_CHANGE}
    for name, default in _ADDED.items():
        if chosen[name] == default:
            del chosen[name]
    chosen = {name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()}
    chosen.update(more)
    return {
        "format": FORMAT,
        "inputs": inputs,
        "settings": chosen,
        "tokenizer": tokenizer_checksum(settings),
        "special_tokens": list(special_tokens),
    }


def identity_checksum(found: Mapping[str, Any]) -> str:
    """Returns a checksum of an `identity`, without the ids of special tokens, which earlier versions did not record."""
    known = {name: value for name, value in found.items() if name != "special_tokens"}
    return xxhash.xxh64(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _check_same_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Checks that a run is resumed with the settings that it was started with.

    Raises:
        DataError: they differ; the message names the differences.
    """
    difference = None
    if before.get("format") != now["format"]:
        difference = f"the progress log has the format {before.get('format')!r}"
    elif before["settings"] != now["settings"]:
        one, other = before["settings"], now["settings"]
        names = [name for name in dict.fromkeys([*other, *one]) if one.get(name) != other.get(name)]
        difference = "; ".join(f"{name} was {one.get(name)!r}, now {other.get(name)!r}" for name in names)
    elif before["tokenizer"] != now["tokenizer"]:
        difference = "the tokenizer's files have changed"
    elif before.get("special_tokens", now["special_tokens"]) != now["special_tokens"]:
        difference = f"the ids of the tokens that end and begin documents were {before['special_tokens']}, now {now['special_tokens']}"
    if difference:
        raise _refusal(difference)


def _input_matches(record: Record, before: Sequence[Any], now: Sequence[Any]) -> bool:
    """Returns whether the files that a record has read, and the one to continue in, are unchanged. Later files may be changed or added."""
    if record.complete:
        return before == now
    return record.file < len(now) and before[: record.file + 1] == now[: record.file + 1]


def _input_difference(before: Sequence[Any], now: Sequence[Any]) -> str:
    for one, other in zip(before, now, strict=False):
        if one != other:
            return f"the input was {one[0]}, now {other[0]}" if one[0] != other[0] else f"{one[0]} has changed"
    return f"there were {plural(len(before), 'input')}, now {len(now)}"


def _refusal(difference: str) -> DataError:
    return DataError(
        f"the unfinished run cannot be resumed: {difference}",
        "the same settings, and unchanged files up to the one that was being read",
        "restore them, or start over with --overwrite instead of --resume",
    )


class ProgressLog:
    """Writes the progress log of a run.

    Args:
        path: path of the file.
        identity: identity of the run, as `identity` returns it.
        begin: the record that the run resumes from; None: it starts from the beginning.

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
        """Writes a record and forces it to disk.

        Raises:
            DataError: it cannot be written.
        """
        try:
            if self._file is None:
                new = not self._path.exists()
                self._file = open_in_place(self._path, "a")
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
    return DataError(
        f"cannot write {path}: {error.strerror or error}",
        "a writable folder with free space",
        "free disk space, and run again with --resume",
    )


def _line(record: Record) -> str:
    return json.dumps({_JSON_KEYS.get(name, name): value for name, value in asdict(record).items()}) + "\n"


def _records(path: Path) -> tuple[dict[str, Any], list[Record]] | None:
    """Returns (identity, records) of a progress log, without an incomplete last line; None if it does not exist or has no records.

    Raises:
        DataError: the file is not a progress log.
    """
    if not path.is_file():
        return None
    try:
        lines = read_small(path, _MOST_BYTES).split(b"\n")[:-1]
        if len(lines) < 2:
            return None
        records = []
        for line in lines[1:]:
            found = json.loads(line)
            found |= {name: found.pop(key) for name, key in _JSON_KEYS.items() if key in found}
            found["outputs"] = tuple((documents, tokens) for documents, tokens in found["outputs"])
            records.append(Record(**found))
        return json.loads(lines[0]), records
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} is not a progress log: {reason(error)}",
            "a file that tools/preprocess_data.py wrote",
            "start over with --overwrite instead of --resume",
        ) from error


def last_record(path: Path) -> Record | None:
    """Returns the progress of an unfinished run; None if nothing is recorded.

    Raises:
        DataError: the file is not a progress log.
    """
    found = _records(path)
    return found[1][-1] if found is not None else None


def record_to_resume(path: Path, now: Mapping[str, Any]) -> Record | None:
    """Returns the last record whose input is unchanged, from which the run can resume; None if nothing is recorded.

    Args:
        path: the progress log.
        now: the `identity` of the run.

    Raises:
        DataError: the file is not a progress log, the settings differ, or the input of every record has changed.
    """
    found = _records(path)
    if found is None:
        return None
    before, records = found
    _check_same_settings(before, now)
    for record in reversed(records):
        if _input_matches(record, before["inputs"], now["inputs"]):
            return record
    raise _refusal(_input_difference(before["inputs"], now["inputs"]))
