"""Decompresses files.

In: an open file. Out: a stream of the decompressed bytes. A truncated file raises an error; it is never taken for a complete file. A file
made to exhaust memory or disk raises an error, too: the ratio of decompressed to compressed bytes is limited, and so is the memory that the
file may demand from its decompressor.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron_patch.errors import DataError

MOST_RATIO = 500
"""Largest ratio of decompressed to compressed bytes of a file."""
UNCHECKED_BYTES = 1 << 30
"""Decompressed bytes up to which any ratio is allowed, because they do no harm."""
_XZ_MEMORY = 1 << 29
_PIECE_BYTES = 1 << 13  # a block of zstd can hold 128 KiB in 4 bytes, so a piece can become 256 MiB


def open_compressed(file: BinaryIO, path: str) -> BinaryIO:
    """Returns a stream of the decompressed bytes of an open .gz, .bz2, .xz or .zst file.

    Raises:
        EOFError: the file is empty, which no compressed file is.
    """
    if os.fstat(file.fileno()).st_size == 0:
        raise EOFError("the file is empty; not a valid compressed file")
    return cast("BinaryIO", _BoundedFile(_decompressed(file, Path(path).suffix), file, path))


def _decompressed(file: BinaryIO, suffix: str) -> Any:
    if suffix == ".gz":
        try:
            from isal import igzip

            return igzip.IGzipFile(fileobj=file, mode="rb")
        except ImportError:
            return gzip.GzipFile(fileobj=file, mode="rb")
    if suffix == ".bz2":
        return bz2.BZ2File(file, "rb")
    if suffix == ".xz":
        return _FramedFile(file, lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY), b"\0")
    import zstandard

    return _FramedFile(file, zstandard.ZstdDecompressor().decompressobj)


def read_errors() -> tuple[type[Exception], ...]:
    """Returns the exceptions that reading a file may raise, damaged compressed files included."""
    import zstandard

    return (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


class _FramedFile:
    """Decompresses consecutive frames, of which each needs its own decompressor. A truncated last frame raises an error.

    zstandard's own reader ends without one; `lzma.LZMAFile` has no limit of memory.

    Args:
        file: the compressed file.
        begin: returns a decompressor of one frame.
        padding: bytes that may stand between frames.
    """

    def __init__(self, file: BinaryIO, begin: Callable[[], Any], padding: bytes = b"") -> None:
        self._file, self._begin, self._padding = file, begin, padding
        self._frame: Any = None
        self._compressed = b""

    def read(self, size: int = -1) -> bytes:
        """Returns about `size` decompressed bytes, none at the end of the file.

        Raises:
            EOFError: the file ends inside a frame.
        """
        pieces, total = [], 0
        while size < 0 or total < size:
            compressed = self._compressed or self._file.read(_PIECE_BYTES)
            if not compressed:
                if self._frame is not None:
                    raise EOFError("the last frame is truncated")
                break
            if self._frame is None:
                compressed = compressed.lstrip(self._padding) if self._padding else compressed
                if not compressed:
                    self._compressed = b""
                    continue
                self._frame = self._begin()
            piece = self._frame.decompress(compressed)
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
            pieces.append(piece)
            total += len(piece)
        return b"".join(pieces)


class _BoundedFile:
    """Refuses a file that decompresses to far more than text does.

    A few megabytes can hold terabytes of one repeated character, which would fill the disk with tokens.

    Args:
        stream: the decompressed bytes.
        file: the compressed file.
        path: its path, for messages.
    """

    def __init__(self, stream: Any, file: BinaryIO, path: str) -> None:
        self._stream, self._file, self._path = stream, file, path
        self._bytes = 0

    def read(self, size: int = -1) -> bytes:
        """Returns the next decompressed bytes, none at the end of the file.

        Raises:
            DataError: the file has decompressed to too much.
        """
        data: bytes = self._stream.read(size)
        self._bytes += len(data)
        if self._bytes > UNCHECKED_BYTES and self._bytes > MOST_RATIO * self._file.tell():
            raise DataError(
                f"{self._path} decompresses to more than {MOST_RATIO:,} times its size: {self._bytes:,} bytes out of "
                f"{self._file.tell():,} so far",
                f"files that decompress to at most {MOST_RATIO:,} times their size; text compresses to a third, or a fiftieth",
                "remove it from --input; if you know what it contains, decompress it and give the decompressed file",
            )
        return data
