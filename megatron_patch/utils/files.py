"""Files that survive a crash: atomic writes that are forced to disk, checksums, and fast copies.

In: paths and open files. Out: files. The known package for atomic writes, atomicwrites, is no longer maintained. Nothing here locks files;
`checkpoint.lock` has the lock of a run's folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import json
import os
import resource
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import xxhash

MOST_JSON_BYTES = 1 << 26
"""The most bytes of a JSON file that is read as a whole; those that this program writes stay far below."""
LONGEST_LINE = 1 << 20
"""The most bytes of a line of JSON that this program writes about a run."""
MOST_SKIPPED = 1 << 26
"""The most bytes of a line that is skipped; where one is longer, the rest of the file is not read."""
LINK_TO_NOTHING = "it is a link to a file that does not exist"
_PIECE_BYTES = 1 << 20


def same_path(first: str | Path, second: str | Path) -> bool:
    """Returns whether two paths, which need not exist, name the same file or folder: "run/" and "run", also through symbolic links."""
    try:
        return os.path.realpath(first) == os.path.realpath(second)
    except ValueError:  # a null character, or text that no path can contain
        return False


def checksum(path: Path) -> str:
    """Returns the xxh64 checksum of a file, as hexadecimal digits."""
    digest = xxhash.xxh64()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def copy_range(source: int, target: int, start: int, count: int) -> None:
    """Copies bytes `[start, start + count)` of one open file to the current position of another, inside the kernel if possible.

    Args:
        source: descriptor to read from.
        target: descriptor to write to.
        start: first byte.
        count: number of bytes.

    Raises:
        OSError: reading or writing failed.
        EOFError: the source is too short.
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
            raise EOFError(f"the file has {start} bytes, but {end} were expected")
        start += done


def _copy_in_kernel(source: int, target: int, count: int, start: int) -> int:
    return os.copy_file_range(source, target, count, start)


def _copy_through_memory(source: int, target: int, count: int, start: int) -> int:
    return os.write(target, os.pread(source, min(count, 1 << 22), start))


def begin_writing_back(file: int, start: int, count: int) -> None:
    """Asks Linux to start writing bytes `[start, start + count)` of an open file to disk, so that a later fsync takes less time.

    Other systems ignore the request.
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
    """Raises this process' soft limit of open files to `count`, or to the hard limit if that is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def too_many_open_files(error: OSError) -> bool:
    """Returns whether an error means that the process or the machine may open no more files."""
    return error.errno in (errno.EMFILE, errno.ENFILE)


RAISE_OPEN_FILES = "raise the limit of open files before the program starts: ulimit -n 4096 (its hard limit: /etc/security/limits.conf)"
"""What to do where there are too many."""


def checksum_on_disk(path: Path) -> str:
    """Returns the checksum of a file as it is on disk. The file must be synced; the system is requested to drop it from its cache first."""
    with path.open("rb") as file, contextlib.suppress(OSError):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return checksum(path)


def read_small(path: str | Path, limit: int, wait: bool = False) -> bytes:
    """Returns the content of a file that has to fit into memory, never more than `limit` bytes of it.

    Args:
        path: the file.
        limit: the most bytes that it may have.
        wait: read also from a pipe or a device, such as /dev/stdin or <(…), until its other end is closed. Without it they are refused.

    Raises:
        OSError: the file has more than `limit` bytes (EFBIG), is not a file, or cannot be read; its `strerror` says which.
    """
    # Without waiting for the other end of a pipe.
    with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            if not wait:
                raise OSError(errno.EINVAL, "it is not a file", str(path))
            os.set_blocking(file.fileno(), True)
        content = bytearray()
        if found.st_size <= limit:
            # One piece at a time, because a read allocates all bytes that it asks for. Files of /proc report a size of 0.
            while len(content) <= limit and (piece := file.read(min(limit + 1 - len(content), _PIECE_BYTES))):
                content += piece
        if max(len(content), found.st_size) > limit:
            size = f"{found.st_size:,}" if found.st_size > limit else f"more than {limit:,}"
            raise OSError(errno.EFBIG, f"it has {size} bytes, and such a file may have up to {limit:,}", str(path))
    if not content and stat.S_ISFIFO(found.st_mode):
        # Whoever was to write to it has not opened it yet, or has ended: nothing is not the same as an empty file.
        raise OSError(errno.EPIPE, "it is a pipe, and nothing came out of it", str(path))
    return bytes(content)


def optional_file(path: str | Path) -> bool:
    """Returns whether a file that may be missing is there; False only where nothing has its name.

    Raises:
        OSError: a folder, a pipe, a device or a link to nothing has the name; its `strerror` says that.
    """
    if not os.path.lexists(path):
        return False
    try:
        found = os.stat(path)
    except FileNotFoundError as error:
        raise OSError(errno.ENOENT, LINK_TO_NOTHING, str(path)) from error
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    return True


def bounded_lines(file: BinaryIO, longest: int) -> Iterator[bytes | None]:
    """Yields the lines of a file, the last one also without its end; None in place of one that is longer than any that is wanted.

    Args:
        file: the file.
        longest: the most bytes of a line; no more than that is held in memory.

    Raises:
        OSError: a line has more than `MOST_SKIPPED` bytes (EFBIG): what follows may be hundreds of gigabytes of zeros.
    """
    while line := file.readline(longest):
        if len(line) < longest or line.endswith(b"\n"):
            yield line
            continue
        skipped = len(line)
        while (rest := file.readline(longest)) and not rest.endswith(b"\n"):
            skipped += len(rest)
            if skipped > MOST_SKIPPED:
                raise OSError(errno.EFBIG, f"a line has more than {MOST_SKIPPED:,} bytes")
        yield None


def reason(error: BaseException) -> str:
    """Returns why a file could not be used, in words: without the number and the path that the text of an OSError has."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def read_json(path: Path) -> Any:
    """Returns the value of a JSON file.

    Raises:
        OSError: the file cannot be read, is not a file, or is longer than any that this program writes.
        ValueError: the file is not JSON in UTF-8.
        RecursionError: the value is nested too deeply.
    """
    return json.loads(read_small(path, MOST_JSON_BYTES))


def open_new(path: Path, mode: str = "wb", buffering: int = -1) -> Any:
    """Opens a new file for writing, in place of whatever has its name.

    Others may be able to write to the folder, and know the name of a temporary file. A link that they put there is removed, not followed:
    it would make this program overwrite another file of its user. "x" opens no link.

    Args:
        path: path of the file.
        mode: "wb", "wb+" or "w"; text is UTF-8.
        buffering: as for `open`.
    """
    path.unlink(missing_ok=True)
    return path.open(mode.replace("w", "x"), buffering=buffering, encoding=None if "b" in mode else "utf-8")


def open_in_place(path: Path, mode: str, buffering: int = -1) -> Any:
    """Opens a file to continue it, as `open` does, except that a link, a pipe or a device is refused.

    Args:
        path: path of the file; a mode with "a" creates it.
        mode: a mode of `open` other than "w"; text is UTF-8.
        buffering: as for `open`.

    Raises:
        OSError: the path is not a file, or it cannot be opened.
    """
    return open(path, mode, buffering=buffering, encoding=None if "b" in mode else "utf-8", opener=_open_file_itself)


def open_descriptor(path: Path, flags: int) -> int:
    """Returns a descriptor as `os.open` does, except that a link, a pipe or a device is refused.

    Raises:
        OSError: the path is not a file, or it cannot be opened.
    """
    # A pipe would wait for its other end; a file ignores O_NONBLOCK.
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    return descriptor


def _open_file_itself(path: str, flags: int) -> int:
    return open_descriptor(Path(path), flags)


def deny_writing_by_everybody() -> None:
    """Makes sure that not every user may write to the files that this process creates, whatever its umask was."""
    os.umask(os.umask(0o077) | stat.S_IWOTH)


def make_folder(folder: Path) -> None:
    """Creates a folder and its parents, if they do not exist, and forces them to disk."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync_folder(folder.parent)


def fsync_folder(folder: Path) -> None:
    """Forces the entries of a folder to disk, so that new names survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Replaces the content of a file atomically, and forces it to disk."""
    temporary = path.with_name(path.name + ".partial")
    with open_new(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file in one write, which several processes may do at the same time.

    If a killed process left an incomplete line, the new one begins on a line of its own.

    Args:
        path: path of the file, which is created with its folder if it does not exist.
        line: the line, without a newline.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_in_place(path, "ab+", buffering=0) as file:
        torn = False
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write(b"\n" * torn + line.encode() + b"\n")
