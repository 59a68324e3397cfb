"""Files that survive a crash: checksums, and writes that are either whole or not there."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import xxhash

_LONGEST_JSON = 1 << 28


def checksum(path: Path) -> str:
    """xxh64 of a file, read in pieces."""
    digest = xxhash.xxh64()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def copy_range(source: int, target: int, start: int, count: int) -> None:
    """Copies bytes `[start, start + count)` of one open file behind the position of another, inside the kernel where it can.

    Args:
        source: descriptor to read.
        target: descriptor to write, at its position.
        start: first byte.
        count: bytes.

    Raises:
        OSError: reading or writing failed.
        EOFError: the source is shorter.
    """
    copy = _copy_in_kernel
    end = start + count
    while start < end:
        try:
            done = copy(source, target, min(end - start, 1 << 28), start)
        except OSError as error:
            if copy is _copy_through_memory or error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
                raise
            copy = _copy_through_memory
            continue
        if done == 0:
            raise EOFError(f"a file of {start} bytes where {end} were expected")
        start += done


def _copy_in_kernel(source: int, target: int, count: int, start: int) -> int:
    return os.copy_file_range(source, target, count, start)


def _copy_through_memory(source: int, target: int, count: int, start: int) -> int:
    return os.write(target, os.pread(source, min(count, 1 << 22), start))


def begin_writing_back(file: int, start: int, count: int) -> None:
    """Lets the system begin to bring bytes `[start, start + count)` of an open file to disk, so that a later fsync has less to wait for.

    A hint, without a promise: only Linux has it.
    """
    if (begin := _sync_file_range()) is not None:
        begin(file, start, count, 2)  # SYNC_FILE_RANGE_WRITE


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (AttributeError, OSError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return cast("Callable[[int, int, int, int], int]", function)


def allow_open_files(count: int) -> None:
    """Raises this process' soft limit of open files towards `count`, as far as the hard limit goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def checksum_on_disk(path: Path) -> str:
    """As `checksum`, of what the disk gives back: the system is asked to forget what it still holds of the file, which must be synced."""
    with path.open("rb") as file, contextlib.suppress(OSError):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return checksum(path)


def read_json(path: Path) -> Any:
    """A JSON file's value.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, no UTF-8, or longer than any file that this program writes.
        RecursionError: it is nested too deeply.
    """
    with path.open("rb") as file:
        data = file.read(_LONGEST_JSON + 1)
    if len(data) > _LONGEST_JSON:
        raise ValueError(f"it has more than {_LONGEST_JSON} bytes")
    return json.loads(data)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, so that they survive a crash; one that is there already will do."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync_folder(folder.parent)


def fsync_folder(folder: Path) -> None:
    """Forces a folder's list of names to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Replaces a file by new text in one step that survives a crash."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Adds a line in one write, behind what a kill has left of another; several processes may do so.

    Args:
        path: of a file, which is made where there is none, with its folder.
        line: without its end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        torn = False
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write(b"\n" * torn + line.encode() + b"\n")
