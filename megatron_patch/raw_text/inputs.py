"""Chooses which files a run reads, and which part of each, on one machine or on one of several.

In: the user's paths and globs, or "-". Out: `FileRange`s in order. The ranges of all shards of a run, in order, cover all of the input, so
that the shards' outputs, merged in order, are what a single run writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_patch.errors import DataError
from megatron_patch.raw_text.large_documents import MOST_DOCUMENT_BYTES
from megatron_patch.raw_text.missing_input import content_of_folder, near_file
from megatron_patch.utils.path_patterns import expand_local
from megatron_patch.utils.text import shortened

LINE_SUFFIXES = (".jsonl", ".json")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
STANDARD_INPUT = "-"
_PIECE = 1 << 16


@dataclass(frozen=True)
class FileRange:
    """A part of one input file.

    Args:
        path: the file, or "-".
        start: the first unit. Units are bytes of plain files, decompressed bytes of compressed files, rows of tables.
        end: the unit after the last; None: the end of the file.
    """

    path: str
    start: int = 0
    end: int | None = None


def is_compressed(path: str) -> bool:
    """Returns whether a file has the suffix of a compressed file."""
    return Path(path).suffix in COMPRESSED_SUFFIXES


def inner_suffix(path: str) -> str:
    """Returns the suffix of the decompressed file: .jsonl, .json, .txt or .parquet."""
    inner = Path(path).with_suffix("") if is_compressed(path) else Path(path)
    return inner.suffix


def expand(inputs: Sequence[str]) -> list[str]:
    """Expands paths and globs to a list of files, in the given order; the files of a glob are sorted by name. An existing file is no glob.

    Raises:
        DataError: a file does not exist, a glob matches nothing, or a suffix is not supported.
    """
    files: list[str] = []
    for pattern in inputs:
        if pattern == STANDARD_INPUT:
            files.append(pattern)
            continue
        found = expand_local(pattern)
        matches = [match for match in found if Path(match).is_file()]
        if not matches:
            raise _no_match(pattern, next((match for match in found if Path(match).is_dir()), None))
        files += matches
    for file in files:
        if file != STANDARD_INPUT and _input_suffix(file) is None:
            raise DataError(
                f"--input {file} has an unsupported suffix",
                ".jsonl and .json (one object per line), .txt (one per file, or separated), also as .gz, .bz2, .xz, .zst; .parquet",
                "rename or convert the file",
            )
    if not files:
        raise DataError("there is no input", "--input FILE [FILE …]", "name at least one file, glob or address")
    return files


def _input_suffix(path: str) -> str | None:
    """Returns the suffix of a file that can be read, with that of its compression; None if it cannot be read."""
    inner, outer = inner_suffix(path), Path(path).suffix if is_compressed(path) else ""
    return inner + outer if inner in (*LINE_SUFFIXES, ".txt") or (inner == ".parquet" and not outer) else None


def _no_match(pattern: str, folder: str | None) -> DataError:
    """Returns the error for a path or glob that names no file, but perhaps a folder."""
    allowed = "files, globs in quotes, or - for standard input"
    if folder is None:
        return DataError(f"--input {shortened(pattern)} matches no file", allowed, near_file(pattern) or "check the path")
    content, globs = content_of_folder(folder, _input_suffix)
    return DataError(
        f"--input {shortened(pattern)} matches no file, only the folder {folder}: {content}",
        allowed,
        f"name the files: --input {globs}" if globs is not None else "give another folder's files",
    )


def shard_inputs(files: Sequence[str], number: int, count: int) -> list[FileRange]:
    """Returns the part of the input that belongs to one shard: contiguous, about equal in bytes, computed the same way on every machine.

    Files of plain lines are split at line ends: a line belongs to the shard that contains its first byte. Any other file belongs to the
    shard that contains its middle byte.

    Args:
        files: all inputs.
        number: index of the shard, from 0.
        count: number of shards.

    Raises:
        DataError: the shard does not exist, or the input is standard input, which cannot be split.
    """
    _checked_shard(number, count)
    if count == 1:
        return [FileRange(file) for file in files]
    if STANDARD_INPUT in files:
        raise DataError("--shard cannot split standard input", "files", "give the files with --input")
    sizes = [Path(file).stat().st_size for file in files]
    total = sum(sizes)
    first, last = total * number // count, total * (number + 1) // count
    parts, begin = [], 0
    for file, size in zip(files, sizes, strict=True):
        if inner_suffix(file) in LINE_SUFFIXES and not is_compressed(file):
            start, end = (next_line_start(file, min(max(edge - begin, 0), size)) for edge in (first, last))
            if start < end:
                parts.append(FileRange(file, start, end))
        elif first <= begin + size // 2 < last:
            parts.append(FileRange(file))
        begin += size
    return parts


def parse_shard(text: str, environment: Mapping[str, str]) -> tuple[int, int]:
    """Parses --shard: i/n, slurm/n (i is the task of the Slurm array), or slurm (i and n are the task and the size of the array).

    Args:
        text: the value of the flag.
        environment: contains Slurm's variables.

    Returns:
        (i, n), i from 0.

    Raises:
        DataError: the value has another form, or the tasks of the array are not 0 to n - 1.
    """
    word, _, count = text.partition("/")
    try:
        if word != "slurm":
            return _checked_shard(int(word), int(count))
        number = int(environment["SLURM_ARRAY_TASK_ID"])
        if count:
            return _checked_shard(number, int(count))
        size, first, last = (int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in ("COUNT", "MIN", "MAX"))
    except KeyError as error:
        raise DataError(
            f"--shard {text} needs the variable {error.args[0]}, which is not set", "a task of a Slurm array", "submit with sbatch --array"
        ) from error
    except ValueError as error:
        raise DataError(f"--shard {text} is not a shard", "i/n, slurm/n or slurm", "use, for example, --shard 0/8") from error
    if first != 0 or last != size - 1:
        raise DataError(
            f"--shard slurm in an array of {size} tasks from {first} to {last}: the number of shards is unknown",
            "an array of all tasks from 0 on: --array=0-63",
            f"give the number of shards: --shard slurm/{last + 1}",
        )
    return _checked_shard(number, size)


def _checked_shard(number: int, count: int) -> tuple[int, int]:
    if not 0 <= number < count:
        raise DataError(f"--shard {number}/{count} does not exist", "i/n with i from 0 to n - 1", "count shards from 0")
    return number, count


def next_line_start(path: str, offset: int) -> int:
    """Returns the offset of the first line that starts at or after a byte, or the size of the file.

    A line that is too long to be a document, such as the zeros of a sparse file, is not read to its end: an offset inside of it is given.
    """
    if offset == 0:
        return 0
    with open(path, "rb") as file:
        file.seek(offset - 1)
        while piece := file.read(_PIECE):
            if (found := piece.find(b"\n")) >= 0:
                return file.tell() - len(piece) + found + 1
            if file.tell() - offset > MOST_DOCUMENT_BYTES:
                break
        return file.tell()


def remaining_ranges(parts: Sequence[FileRange], file: int, unit: int | None) -> list[tuple[int, FileRange]]:
    """Returns the ranges that have not been read, with their indices.

    Args:
        parts: all ranges.
        file: index of the range that was being read.
        unit: it has been read up to this unit; None: none of it.
    """
    return [
        (index, replace(part, start=unit) if index == file and unit is not None else part)
        for index, part in enumerate(parts)
        if index >= file
    ]
