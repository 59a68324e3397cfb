"""Decompresses files.

In: an open file. Out: a stream of the decompressed bytes. A truncated file raises an error; it is never taken for a complete file.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast


def open_compressed(file: BinaryIO, path: str) -> BinaryIO:
    """Returns a stream of the decompressed bytes of an open .gz, .bz2, .xz or .zst file.

    Raises:
        EOFError: the file is empty, which no compressed file is.
    """
    if os.fstat(file.fileno()).st_size == 0:
        raise EOFError("the file is empty; not a valid compressed file")
    suffix = Path(path).suffix
    if suffix == ".gz":
        try:
            from isal import igzip

            return cast("BinaryIO", igzip.IGzipFile(fileobj=file, mode="rb"))
        except ImportError:
            return cast("BinaryIO", gzip.GzipFile(fileobj=file, mode="rb"))
    if suffix == ".bz2":
        return cast("BinaryIO", bz2.BZ2File(file, "rb"))
    if suffix == ".xz":
        return cast("BinaryIO", lzma.LZMAFile(file, "rb"))
    return cast("BinaryIO", _ZstdFile(file))


def read_errors() -> tuple[type[Exception], ...]:
    """Returns the exceptions that reading a file may raise, damaged compressed files included."""
    import zstandard

    return (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


class _ZstdFile:
    """Decompresses consecutive zstd frames. A truncated last frame raises an error; zstandard's own reader ends without one."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._file = file
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._compressed = b""

    def read(self, size: int = -1) -> bytes:
        """Returns about `size` decompressed bytes, none at the end of the file.

        Raises:
            EOFError: the file ends inside a frame.
        """
        pieces, total = [], 0
        while size < 0 or total < size:
            compressed = self._compressed or self._file.read(1 << 17)
            if not compressed:
                if self._frame is not None:
                    raise EOFError("the last zstd frame is truncated")
                break
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            piece = self._frame.decompress(compressed)
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
            pieces.append(piece)
            total += len(piece)
        return b"".join(pieces)

    def __enter__(self) -> _ZstdFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
