"""Which files are read, and which part of each: from what a user writes to spans, for one machine or for one of many.

In: paths, globs, "-". Out: `Span`s in order. The spans of all shards of a run, one after another, are all of the input, so that outputs
merged in the order of the shards are what one run over everything writes.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_patch.errors import DataError

LINE_SUFFIXES = (".jsonl", ".json")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
STANDARD_INPUT = "-"
_PIECE = 1 << 16


@dataclass(frozen=True)
class Span:
    """Part of one input.

    Args:
        path: the file, or "-".
        start: the first unit: bytes of plain files, unpacked bytes of archives, rows of tables.
        end: the unit behind the last; None: all there is.
    """

    path: str
    start: int = 0
    end: int | None = None


def is_compressed(path: str) -> bool:
    """Whether a file has to be unpacked."""
    return Path(path).suffix in COMPRESSED_SUFFIXES


def inner_suffix(path: str) -> str:
    """What is inside: .jsonl, .json, .txt or .parquet."""
    inner = Path(path).with_suffix("") if is_compressed(path) else Path(path)
    return inner.suffix


def expand(inputs: Sequence[str]) -> list[str]:
    """Paths and globs as a list of files: in the order given, each glob's files by name.

    Raises:
        DataError: a file that does not exist, a glob without a match, a suffix that is not known.
    """
    files: list[str] = []
    for pattern in inputs:
        if pattern == STANDARD_INPUT:
            files.append(pattern)
            continue
        matches = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        matches = [match for match in matches if Path(match).is_file()]
        if not matches:
            raise DataError(f"--input {pattern} matches no file", "files, globs in quotes, or - for standard input", "check the path")
        files += matches
    for file in files:
        packed_table = is_compressed(file) and inner_suffix(file) == ".parquet"
        if file != STANDARD_INPUT and (inner_suffix(file) not in (*LINE_SUFFIXES, ".txt", ".parquet") or packed_table):
            raise DataError(
                f"--input {file}: unknown kind of file",
                ".jsonl, .json (one object a line) or .txt (one document a file, or separated), also as .gz, .bz2, .xz, .zst; .parquet",
                "rename or convert it",
            )
    if not files:
        raise DataError("no input", "--input FILE [FILE …]")
    return files


def divide(files: Sequence[str], number: int, count: int) -> list[Span]:
    """The part of one shard of a run over many machines: contiguous, about equal in bytes, the same on every machine.

    Files of plain lines are cut at line ends: a line belongs to the shard in which its first byte lies. Any other file belongs as a whole
    to the shard in which its middle lies.

    Args:
        files: all inputs.
        number: which shard, from 0.
        count: how many.

    Raises:
        DataError: no such shard, or standard input, which cannot be divided.
    """
    _checked_shard(number, count)
    if count == 1:
        return [Span(file) for file in files]
    if STANDARD_INPUT in files:
        raise DataError("--shard of standard input", "files", "name the files")
    sizes = [Path(file).stat().st_size for file in files]
    total = sum(sizes)
    first, last = total * number // count, total * (number + 1) // count
    spans, begin = [], 0
    for file, size in zip(files, sizes, strict=True):
        if inner_suffix(file) in LINE_SUFFIXES and not is_compressed(file):
            start, end = (line_start(file, min(max(edge - begin, 0), size)) for edge in (first, last))
            if start < end:
                spans.append(Span(file, start, end))
        elif first <= begin + size // 2 < last:
            spans.append(Span(file))
        begin += size
    return spans


def parse_shard(text: str, environment: Mapping[str, str]) -> tuple[int, int]:
    """Reads --shard: i/n, slurm/n (the task of a Slurm array is i), or slurm (the array's size is n).

    Args:
        text: what was given.
        environment: where Slurm's variables are.

    Returns:
        (i, n), i from 0.

    Raises:
        DataError: none of these, or an array that is not 0 to n - 1.
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
        raise DataError(f"--shard {text} without {error.args[0]}", "a task of a Slurm array", "use sbatch --array") from error
    except ValueError as error:
        raise DataError(f"--shard {text}", "i/n, slurm/n or slurm", "for example --shard 0/8") from error
    if first != 0 or last != size - 1:
        raise DataError(
            f"--shard slurm in an array of {size} tasks from {first} to {last}: which shards there are is not known",
            "all tasks from 0 on: --array=0-63",
            f"say how many shards there are in all: --shard slurm/{last + 1}",
        )
    return _checked_shard(number, size)


def _checked_shard(number: int, count: int) -> tuple[int, int]:
    if not 0 <= number < count:
        raise DataError(f"--shard {number}/{count}", "i/n with i from 0 to n - 1", "count shards from 0")
    return number, count


def line_start(path: str, offset: int) -> int:
    """Where the first line begins that begins at a byte or behind it, or the size of the file."""
    if offset == 0:
        return 0
    with open(path, "rb") as file:
        file.seek(offset - 1)
        while piece := file.read(_PIECE):
            if (found := piece.find(b"\n")) >= 0:
                return file.tell() - len(piece) + found + 1
        return file.tell()


def after(spans: Sequence[Span], file: int, position: int | None) -> list[tuple[int, Span]]:
    """What is left of some spans, with their numbers, where number `file` has been read up to a unit (None: not at all)."""
    return [
        (number, replace(span, start=position) if number == file and position is not None else span)
        for number, span in enumerate(spans)
        if number >= file
    ]
