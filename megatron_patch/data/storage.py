"""Random access to files: on this machine's file systems, or at addresses such as s3://bucket/web.bin through `fsspec`.

In: a path or an address. Out: the file's size, and any range of its bytes. Files are read, not memory-mapped. A truncated file or a failing
disk raises an error; with a memory map it would be SIGBUS.

Chunks of remote files are cached on this machine, so that a corpus crosses the network once for all epochs, restarts and ranks. The cache
is the folder in MEGATRON_PATCH_CACHE, by default ~/.cache/megatron_patch. A chunk is written under a temporary name and renamed, so
processes may share the folder. fsspec has caches too, but its block cache writes its list of blocks only when a file is closed: other
processes, and a restart after a crash, would fetch everything again. Its file caches fetch complete files. So fsspec is used for the
protocols only.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_patch.data.addresses import check_address
from megatron_patch.errors import DataError
from megatron_patch.utils.files import open_new

_CHUNK_BYTES = 1 << 20
_PIECE_BYTES = 1 << 22
_ATTEMPTS = 4
_PAUSE_SECONDS = 0.5
_FETCHERS = 32
# The metadata keys, as file systems name them, that change when a file changes.
_VERSIONS = ("size", "ETag", "etag", "Content-MD5", "md5Hash", "Last-Modified", "LastModified", "last_modified", "mtime", "created")


class RandomAccessFile(Protocol):
    """A file that is open for reading.

    Args:
        path: its path or address.
        size: its size in bytes.
    """

    path: str
    size: int

    def read_into(self, start: int, out: memoryview) -> None:
        """Fills a buffer with the bytes from `start` on.

        Raises:
            DataError: the file is too short, or cannot be read.
        """
        ...

    def fetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Loads the ranges that will be read next into the cache, each given as (first byte, number of bytes)."""
        ...

    def is_current(self) -> bool:
        """Returns whether the path still refers to the opened file, judged by its size, modification time and number of links."""
        ...


def is_address(path: str) -> bool:
    """Returns whether a path is an address of a remote file system."""
    return "://" in path


def open_file(path: str) -> RandomAccessFile:
    """Opens a file for reading.

    Raises:
        DataError: the file does not exist or cannot be read, or its address needs a package that is not installed.
    """
    return _RemoteFile(path) if is_address(path) else _LocalFile(path)


def exists(path: str) -> bool:
    """Returns whether a path or address is a file.

    Raises:
        DataError: the remote file system cannot be reached.
    """
    if not is_address(path):
        return os.path.isfile(path)
    system, inner = _file_system(path)
    try:
        return bool(_with_retries(path, lambda: system.info(inner))["type"] == "file")
    except FileNotFoundError:
        return False


def glob_files(pattern: str) -> list[str]:
    """Returns the files that a glob matches, sorted by name.

    Raises:
        DataError: the remote file system cannot be reached.
    """
    if not is_address(pattern):
        return sorted(glob.glob(pattern, recursive=True))
    system, inner = _file_system(pattern)
    return sorted(str(system.unstrip_protocol(found)) for found in _with_retries(pattern, lambda: system.glob(inner)))


def read_bytes(path: str) -> bytes:
    """Returns the content of a small file.

    Raises:
        DataError: the file cannot be opened or read.
    """
    file = open_file(path)
    out = bytearray(file.size)
    file.read_into(0, memoryview(out))
    return bytes(out)


def file_checksum(path: str) -> str:
    """Returns the xxh64 checksum of a file, as hexadecimal digits.

    Raises:
        DataError: the file cannot be opened or read.
    """
    file, digest = open_file(path), xxhash.xxh64()
    piece = bytearray(_PIECE_BYTES)
    for start in range(0, file.size, _PIECE_BYTES):
        part = memoryview(piece)[: file.size - start]
        file.read_into(start, part)
        digest.update(part)
    return digest.hexdigest()


class FileArray:
    """A one-dimensional array in a file. Only the requested parts are read.

    Args:
        file: the file.
        dtype: type of the numbers, stored as little endian.
        offset: first byte of the array.
        count: number of numbers.
    """

    def __init__(self, file: RandomAccessFile, dtype: npt.DTypeLike, offset: int, count: int) -> None:
        self._file, self._dtype, self._offset, self._count = file, np.dtype(dtype).newbyteorder("<"), offset, count

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, count: int) -> npt.NDArray[Any]:
        """Returns the numbers `[start, start + count)`.

        Raises:
            DataError: the file is too short, or cannot be read.
        """
        out = np.empty(count, self._dtype)
        if count:
            self._file.read_into(self._offset + start * self._dtype.itemsize, out.view(np.uint8).data)
        return out

    def __getitem__(self, where: slice | int) -> Any:
        """Returns one number, or those of a slice with step 1.

        Raises:
            IndexError: an index is out of range, or the slice has another step.
            DataError: the file is too short, or cannot be read.
        """
        if isinstance(where, slice):
            first, last, step = where.indices(self._count)
            if step != 1:
                raise IndexError(f"slice step {step}; only 1 is supported")
            return self.read(first, max(0, last - first))
        if not -self._count <= where < self._count:
            raise IndexError(f"index {where} is out of range for {self._count} elements")
        return self.read(where % self._count, 1)[0]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return self.read(0, self._count).astype(dtype or self._dtype, copy=False)


class _LocalFile:
    """A file on this machine's file systems; it is closed with this object."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._stamp = self._current_stamp()
        except OSError as error:
            raise DataError(
                f"cannot read {path}: {error.strerror}", "a file that this user can read", "check the path and its permissions"
            ) from error
        self.size = self._stamp[0]

    def _current_stamp(self) -> tuple[int, int, bool]:
        """Returns (size, modification time in ns, whether the file still has a name)."""
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns, found.st_nlink > 0

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read_into(self, start: int, out: memoryview) -> None:
        """Fills a buffer with the bytes from `start` on, see `RandomAccessFile`."""
        done = 0
        while done < len(out):
            try:
                count = os.preadv(self._descriptor, [out[done:]], start + done)
            except OSError as error:
                raise DataError(
                    f"cannot read {self.path}: {error.strerror}", "a file system without errors", "check the disk or the network"
                ) from error
            if count == 0:
                raise _shorter(self.path, self.size)
            done += count

    def fetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Does nothing: the file is on this machine."""

    def is_current(self) -> bool:
        """Returns whether the path still refers to the opened file, see `RandomAccessFile`."""
        try:
            return self._current_stamp() == self._stamp
        except OSError:
            return False


class _RemoteFile:
    """A file at an address. Its chunks are fetched into the cache when they are first read."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._system, self._inner = _file_system(path)
        self._version = self._current_version()
        self.size = int(self._version["size"])
        name = hashlib.blake2b(f"{path}\x1f{sorted(self._version.items())}".encode(), digest_size=16).hexdigest()
        self._folder = _cache_folder() / name

    def _current_version(self) -> dict[str, str]:
        """Returns the properties that change when the file is replaced.

        Raises:
            DataError: the file does not exist, or its server cannot be reached or does not report the size.
        """
        self._system.invalidate_cache()
        info = self._from_system(lambda: self._system.info(self._inner))
        if info.get("size") is None:
            raise DataError(
                f"{self.path}: the server does not report its size",
                "servers that report the size and support range requests",
                "copy the file to this machine",
            )
        return {name: str(info[name]) for name in _VERSIONS if info.get(name) is not None}

    def read_into(self, start: int, out: memoryview) -> None:
        """Fills a buffer with the bytes from `start` on, see `RandomAccessFile`."""
        if start + len(out) > self.size:
            raise _shorter(self.path, self.size)
        done = 0
        while done < len(out):
            number, inside = divmod(start + done, _CHUNK_BYTES)
            count = min(len(out) - done, _CHUNK_BYTES - inside)
            self._read_chunk(number, inside, out[done : done + count])
            done += count

    def fetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetches the missing chunks of some ranges, several at a time."""
        numbers = {n for start, count in ranges for n in range(start // _CHUNK_BYTES, (start + max(count, 1) - 1) // _CHUNK_BYTES + 1)}
        missing = [number for number in sorted(numbers) if not self._path(number).exists()]
        if len(missing) > 1:
            with ThreadPoolExecutor(min(_FETCHERS, len(missing))) as pool:
                list(pool.map(self._fetch, missing))

    def is_current(self) -> bool:
        """Returns True: cached chunks never change, and each chunk that is fetched is checked against the version that was opened."""
        return True

    def _path(self, number: int) -> Path:
        return self._folder / f"{number // 1000:06d}" / f"{number % 1000:03d}"

    def _length(self, number: int) -> int:
        return min(_CHUNK_BYTES, self.size - number * _CHUNK_BYTES)

    def _read_chunk(self, number: int, inside: int, out: memoryview) -> None:
        for _ in range(2):
            with contextlib.suppress(OSError), self._path(number).open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size == self._length(number) and os.preadv(file.fileno(), [out], inside) == len(out):
                    return
            data = self._fetch(number)
        out[:] = data[inside : inside + len(out)]

    def _fetch(self, number: int) -> bytes:
        """Fetches a chunk, writes it to the cache, and returns it."""
        start, length = number * _CHUNK_BYTES, self._length(number)
        data = self._from_system(lambda: self._system.cat_file(self._inner, start=start, end=start + length))
        if len(data) != length:
            raise DataError(
                f"{self.path}: the server sent {len(data)} of {length} requested bytes",
                "servers that support range requests",
                "use another server, or copy the file to this machine",
            )
        if self._current_version() != self._version:
            raise DataError(
                f"{self.path} has changed since it was opened",
                "files that do not change while they are read",
                "restore the file, and resume from the newest checkpoint",
            )
        path = self._path(number)
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{time.monotonic_ns()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open_new(temporary) as file:
                file.write(data)
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise DataError(
                f"cannot write {path}: {error.strerror}",
                "a folder with free space for the corpus",
                "free space, or set MEGATRON_PATCH_CACHE to another folder",
            ) from error
        return data

    def _from_system(self, call: Callable[[], Any]) -> Any:
        try:
            return _with_retries(self.path, call)
        except FileNotFoundError as error:
            raise DataError(f"{self.path} does not exist", "the address of a file", "check the address") from error


def _cache_folder() -> Path:
    folder = os.environ.get("MEGATRON_PATCH_CACHE")
    return Path(folder) if folder else Path.home() / ".cache" / "megatron_patch"


def _file_system(path: str) -> tuple[Any, str]:
    """Returns the file system of an address, and the path on it.

    Raises:
        DataError: the address is refused (see `check_address`), or fsspec, or the package that it needs for this kind of address, is not
            installed.
    """
    check_address(path)
    kind = path.partition("://")[0]
    try:
        import fsspec

        system, inner = fsspec.core.url_to_fs(path)
        return system, str(inner)
    except (ImportError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}",
            "paths on this machine, or addresses for which fsspec and its package are installed",
            f"install fsspec and the package for {kind}:// (s3fs, gcsfs, aiohttp, …), or copy the files to this machine",
        ) from error


def _with_retries(path: str, call: Callable[[], Any]) -> Any:
    """Returns the result of a call to a remote file system; a call that fails is repeated after a pause.

    Raises:
        FileNotFoundError: the file does not exist.
        DataError: all attempts failed.
    """
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            return call()
        except Exception as error:  # each file system raises errors of its own
            # fsspec's HTTP file system raises FileNotFoundError for any failure; the status is in its cause.
            if isinstance(error, FileNotFoundError) and getattr(error.__cause__, "status", 404) in (404, 410):
                raise
            failure = error
    raise _unreachable(path, failure) from failure


def _unreachable(path: str, error: Exception) -> DataError:
    return DataError(
        f"{path} cannot be read: {type(error).__name__}: {error}",
        "an address that this machine can reach, with credentials if they are required",
        "check the address, the network and the credentials",
    )


def _shorter(path: str, size: int) -> DataError:
    return DataError(
        f"{path} has become shorter than the {size} bytes that it had",
        "files that do not change while they are read",
        "restore the file, and resume from the newest checkpoint",
    )
