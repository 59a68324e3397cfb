"""Random access to files: on this machine's file systems (local_files.py), or at addresses such as s3://bucket/web.bin (remote_files.py).

In: a path or an address. Out: whether it exists, its size, any range of its bytes, or an array in it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_patch.data.local_files import LocalFile
from megatron_patch.data.remote_files import RemoteFile, remote_exists, remote_glob
from megatron_patch.errors import DataError
from megatron_patch.utils.path_patterns import expand_local

_PIECE_BYTES = 1 << 22


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
    return RemoteFile(path) if is_address(path) else LocalFile(path)


def exists(path: str) -> bool:
    """Returns whether anything has this path or address, also what is no file, and a link to nothing: opening it says what is wrong.

    Raises:
        DataError: the remote file system cannot be reached.
    """
    return remote_exists(path) if is_address(path) else os.path.lexists(path)


def glob_files(pattern: str) -> list[str]:
    """Returns the files that a glob matches, sorted by name; a path that exists is itself, whatever characters it has.

    Raises:
        DataError: the remote file system cannot be reached.
    """
    return remote_glob(pattern) if is_address(pattern) else expand_local(pattern)


def read_bytes(path: str, limit: int) -> bytes:
    """Returns the content of a small file.

    Args:
        path: its path or address.
        limit: the most bytes that it may have.

    Raises:
        DataError: the file cannot be opened or read, or is longer.
    """
    file = open_file(path)
    if file.size > limit:
        raise DataError(f"{path} has {file.size:,} bytes, and such a file may have up to {limit:,}", "a smaller file", "check the path")
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
