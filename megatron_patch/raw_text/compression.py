"""Packed files as streams of bytes. In: a path. Out: what is inside; a file that is cut short is an error, never just its end."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast


def open_compressed(file: BinaryIO, path: str) -> BinaryIO:
    """A stream of what is inside an open .gz, .bz2, .xz or .zst.

    Raises:
        EOFError: the file is empty, which is what is left of an archive, and none.
    """
    if os.fstat(file.fileno()).st_size == 0:
        raise EOFError("it is empty, and no archive")
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


def broken_archive() -> tuple[type[Exception], ...]:
    """What reading a broken file may raise."""
    import zstandard

    return (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


class _ZstdFile:
    """Frames of zstd, one after another, unpacked; a last frame that is cut short is an error, where zstandard's own reader just ends."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._file = file
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._packed = b""

    def read(self, size: int = -1) -> bytes:
        """Unpacked bytes, about `size` of them; none at the end.

        Raises:
            EOFError: the file ends inside a frame.
        """
        pieces, total = [], 0
        while size < 0 or total < size:
            packed = self._packed or self._file.read(1 << 17)
            if not packed:
                if self._frame is not None:
                    raise EOFError("the last zstd frame is cut short")
                break
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            piece = self._frame.decompress(packed)
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
            pieces.append(piece)
            total += len(piece)
        return b"".join(pieces)

    def __enter__(self) -> _ZstdFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
