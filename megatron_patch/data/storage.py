"""Files that are read at any place: on this machine's file systems, or at addresses such as s3://bucket/web.bin through `fsspec`.

In: a path or an address. Out: its size, and any range of its bytes. Nothing is mapped: a file that has become shorter, or a file system
that fails, gives an error, and not a signal that kills the process. What comes from an address is kept on this machine in blocks, each
fetched once, so that a corpus crosses the network once however many epochs, restarts and ranks read it. The cache is the folder that
MEGATRON_PATCH_CACHE names, by default ~/.cache/megatron_patch; a block appears there whole or not at all, so ranks may share the folder.
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

from megatron_patch.errors import DataError

_BLOCK_BYTES = 1 << 20
_PIECE_BYTES = 1 << 22
_ATTEMPTS = 4
_PAUSE_SECONDS = 0.5
_FETCHERS = 32
# What file systems call the properties that change with a file's content.
_VERSIONS = ("size", "ETag", "etag", "Content-MD5", "md5Hash", "Last-Modified", "LastModified", "last_modified", "mtime", "created")


class StoredFile(Protocol):
    """A file that is open for reading.

    Args:
        path: where it is.
        size: bytes.
    """

    path: str
    size: int

    def read_into(self, start: int, out: memoryview) -> None:
        """Fills a buffer with the bytes from `start` on.

        Raises:
            DataError: the file is shorter, or cannot be read.
        """
        ...

    def fetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Makes ready what will be read: (first byte, bytes) of each range."""
        ...

    def is_current(self) -> bool:
        """Whether the file under its path is still the one that was opened, as far as its size, its time and its name tell."""
        ...


def is_address(path: str) -> bool:
    """Whether a path is an address of another file system."""
    return "://" in path


def open_stored(path: str) -> StoredFile:
    """Opens a file.

    Raises:
        DataError: there is none, or it cannot be read; an address without fsspec.
    """
    return _FetchedFile(path) if is_address(path) else _LocalFile(path)


def exists(path: str) -> bool:
    """Whether there is such a file.

    Raises:
        DataError: an address whose file system cannot be asked.
    """
    if not is_address(path):
        return os.path.isfile(path)
    system, inner = _file_system(path)
    try:
        return bool(_asked(path, lambda: system.info(inner))["type"] == "file")
    except FileNotFoundError:
        return False


def matching(pattern: str) -> list[str]:
    """The files that a glob matches, by name.

    Raises:
        DataError: an address whose file system cannot be asked.
    """
    if not is_address(pattern):
        return sorted(glob.glob(pattern, recursive=True))
    system, inner = _file_system(pattern)
    return sorted(str(system.unstrip_protocol(found)) for found in _asked(pattern, lambda: system.glob(inner)))


def read_bytes(path: str) -> bytes:
    """A whole, small file.

    Raises:
        DataError: as `open_stored`.
    """
    file = open_stored(path)
    out = bytearray(file.size)
    file.read_into(0, memoryview(out))
    return bytes(out)


def stored_checksum(path: str) -> str:
    """xxh64 of a file, read in pieces.

    Raises:
        DataError: as `open_stored`.
    """
    file, digest = open_stored(path), xxhash.xxh64()
    piece = bytearray(_PIECE_BYTES)
    for start in range(0, file.size, _PIECE_BYTES):
        part = memoryview(piece)[: file.size - start]
        file.read_into(start, part)
        digest.update(part)
    return digest.hexdigest()


class StoredArray:
    """Numbers in a file, read when they are asked for.

    Args:
        file: that holds them.
        dtype: of the numbers, little endian.
        offset: first byte.
        count: numbers.
    """

    def __init__(self, file: StoredFile, dtype: npt.DTypeLike, offset: int, count: int) -> None:
        self._file, self._dtype, self._offset, self._count = file, np.dtype(dtype).newbyteorder("<"), offset, count

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, count: int) -> npt.NDArray[Any]:
        """Numbers `[start, start + count)`.

        Raises:
            DataError: as `StoredFile.read_into`.
        """
        out = np.empty(count, self._dtype)
        if count:
            self._file.read_into(self._offset + start * self._dtype.itemsize, out.view(np.uint8).data)
        return out

    def __getitem__(self, where: slice | int) -> Any:
        """A number, or those of a slice without steps.

        Raises:
            IndexError: outside.
            DataError: as `read`.
        """
        if isinstance(where, slice):
            first, last, step = where.indices(self._count)
            if step != 1:
                raise IndexError(f"a step of {step}")
            return self.read(first, max(0, last - first))
        if not -self._count <= where < self._count:
            raise IndexError(f"number {where} of {self._count}")
        return self.read(where % self._count, 1)[0]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return self.read(0, self._count).astype(dtype or self._dtype, copy=False)


class _LocalFile:
    """A file of this machine, open as long as this object lives."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._stamp = self._now()
        except OSError as error:
            raise DataError(
                f"cannot read {path}: {error.strerror}", "files that this user can read", "check the path and its permissions"
            ) from error
        self.size = self._stamp[0]

    def _now(self) -> tuple[int, int, bool]:
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns, found.st_nlink > 0

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read_into(self, start: int, out: memoryview) -> None:
        """See `StoredFile`."""
        done = 0
        while done < len(out):
            try:
                count = os.preadv(self._descriptor, [out[done:]], start + done)
            except OSError as error:
                raise DataError(
                    f"cannot read {self.path}: {error.strerror}", "files on a sound disk", "check the disk or network"
                ) from error
            if count == 0:
                raise _shorter(self.path, self.size)
            done += count

    def fetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """See `StoredFile`: there is nothing to do."""

    def is_current(self) -> bool:
        """See `StoredFile`."""
        try:
            return self._now() == self._stamp
        except OSError:
            return False


class _FetchedFile:
    """A file at an address, whose blocks are fetched into the cache when they are first read."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._system, self._inner = _file_system(path)
        self._version = self._ask()
        self.size = int(self._version["size"])
        name = hashlib.blake2b(f"{path}\x1f{sorted(self._version.items())}".encode(), digest_size=16).hexdigest()
        self._folder = _cache_folder() / name

    def _ask(self) -> dict[str, str]:
        """The properties that tell this file from what may take its place.

        Raises:
            DataError: there is no such file, or it cannot be asked for.
        """
        self._system.invalidate_cache()
        info = self._from_system(lambda: self._system.info(self._inner))
        if info.get("size") is None:
            raise DataError(f"{self.path}: its server does not tell its size", "files that can be read at any place", "copy it here")
        return {name: str(info[name]) for name in _VERSIONS if info.get(name) is not None}

    def read_into(self, start: int, out: memoryview) -> None:
        """See `StoredFile`."""
        if start + len(out) > self.size:
            raise _shorter(self.path, self.size)
        done = 0
        while done < len(out):
            number, inside = divmod(start + done, _BLOCK_BYTES)
            count = min(len(out) - done, _BLOCK_BYTES - inside)
            self._read_block(number, inside, out[done : done + count])
            done += count

    def fetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """See `StoredFile`: many blocks are fetched at a time."""
        numbers = {n for start, count in ranges for n in range(start // _BLOCK_BYTES, (start + max(count, 1) - 1) // _BLOCK_BYTES + 1)}
        missing = [number for number in sorted(numbers) if not self._path(number).exists()]
        if len(missing) > 1:
            with ThreadPoolExecutor(min(_FETCHERS, len(missing))) as pool:
                list(pool.map(self._fetch, missing))

    def is_current(self) -> bool:
        """See `StoredFile`. What has been fetched stays what it is, so this is asked again only with each block that is fetched."""
        return True

    def _path(self, number: int) -> Path:
        return self._folder / f"{number // 1000:06d}" / f"{number % 1000:03d}"

    def _length(self, number: int) -> int:
        return min(_BLOCK_BYTES, self.size - number * _BLOCK_BYTES)

    def _read_block(self, number: int, inside: int, out: memoryview) -> None:
        for _ in range(2):
            with contextlib.suppress(OSError), self._path(number).open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size == self._length(number) and os.preadv(file.fileno(), [out], inside) == len(out):
                    return
            data = self._fetch(number)
        out[:] = data[inside : inside + len(out)]

    def _fetch(self, number: int) -> bytes:
        """Fetches a block and keeps it."""
        start, length = number * _BLOCK_BYTES, self._length(number)
        data = self._from_system(lambda: self._system.cat_file(self._inner, start=start, end=start + length))
        if len(data) != length:
            raise DataError(
                f"{self.path}: {len(data)} bytes came where {length} were asked for",
                "servers that send the range that is asked for",
                "use one that does, or copy the file here",
            )
        if self._ask() != self._version:
            raise DataError(
                f"{self.path} has changed since it was opened",
                "files that stay as they are while they are read",
                "restore it, and go on from the last checkpoint",
            )
        path = self._path(number)
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{time.monotonic_ns()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise DataError(
                f"cannot write {path}: {error.strerror}",
                "a folder with space for the corpus",
                "free space, or name another folder in MEGATRON_PATCH_CACHE",
            ) from error
        return data

    def _from_system(self, call: Callable[[], Any]) -> Any:
        try:
            return _asked(self.path, call)
        except FileNotFoundError as error:
            raise DataError(f"{self.path} does not exist", "files that stay while they are read", "check the address") from error


def _cache_folder() -> Path:
    named = os.environ.get("MEGATRON_PATCH_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "megatron_patch"


def _file_system(path: str) -> tuple[Any, str]:
    """(the file system of an address, the path there).

    Raises:
        DataError: fsspec, or its part for this kind of address, is not installed.
    """
    kind = path.partition("://")[0]
    try:
        import fsspec

        system, inner = fsspec.core.url_to_fs(path)
        return system, str(inner)
    except (ImportError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}",
            "paths of this machine, or addresses that fsspec knows and has its package for",
            f"pip install fsspec and what it names for {kind}:// (s3fs, gcsfs, aiohttp, …), or copy the files here",
        ) from error


def _asked(path: str, call: Callable[[], Any]) -> Any:
    """What a call of a remote file system returns; it is repeated where it fails, as networks do now and then.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it failed every time.
    """
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            return call()
        except Exception as error:  # what a remote file system may raise is not known
            # HTTP's says so of any failure; the cause knows better.
            if isinstance(error, FileNotFoundError) and getattr(error.__cause__, "status", 404) in (404, 410):
                raise
            failure = error
    raise _unreachable(path, failure) from failure


def _unreachable(path: str, error: Exception) -> DataError:
    return DataError(
        f"{path} cannot be read: {type(error).__name__}: {error}",
        "an address that this machine can reach, with credentials where it needs some",
        "check the address, the network and the credentials",
    )


def _shorter(path: str, size: int) -> DataError:
    return DataError(
        f"{path} has become shorter than the {size} bytes that it had",
        "files that stay as they are while they are read",
        "restore it, and go on from the last checkpoint",
    )
