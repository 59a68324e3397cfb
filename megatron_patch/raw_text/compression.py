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
from megatron_patch.utils.units import plural

MOST_RATIO = 500
"""Largest ratio of decompressed to compressed bytes of a file."""
UNCHECKED_BYTES = 1 << 30
"""Decompressed bytes up to which any ratio is allowed, because they do no harm."""
MOST_WINDOW_BYTES = 1 << 31
"""Largest window of a .zst file, which is that of zstd --long=31; decompressing takes as much memory."""
_USUAL_WINDOW_BYTES = 1 << 27  # what zstd decompresses without being asked to
_XZ_MEMORY = 1 << 29
_PIECE_BYTES = 1 << 13  # a block of zstd can hold 128 KiB in 4 bytes, so a piece can become 256 MiB

Notice = Callable[[str], None]


def open_compressed(file: BinaryIO, path: str, notice: Notice = lambda text: None) -> BinaryIO:
    """Returns a stream of the decompressed bytes of an open .gz, .bz2, .xz or .zst file.

    Args:
        file: the compressed file.
        path: its path.
        notice: receives a message for the user if the file takes much memory.

    Raises:
        EOFError: the file is empty, which no compressed file is.
    """
    if os.fstat(file.fileno()).st_size == 0:
        raise EOFError("the file is empty; not a valid compressed file")
    return cast("BinaryIO", _BoundedFile(_decompressed(file, path, notice), file, path))


def _decompressed(file: BinaryIO, path: str, notice: Notice) -> Any:
    suffix = Path(path).suffix
    if suffix == ".gz":
        try:
            from isal import igzip

            return igzip.IGzipFile(fileobj=file, mode="rb")
        except ImportError:
            return gzip.GzipFile(fileobj=file, mode="rb")
    if suffix == ".bz2":
        return _FramedFile(file, lambda head: bz2.BZ2Decompressor(), padding=1)
    if suffix == ".xz":
        return _FramedFile(file, lambda head: lzma.LZMADecompressor(memlimit=_XZ_MEMORY), padding=4)
    return _FramedFile(file, _ZstdFrames(path, notice).begin, head_bytes=18)


def read_errors() -> tuple[type[Exception], ...]:
    """Returns the exceptions that reading a file may raise, damaged compressed files included."""
    import zstandard

    return (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


class _ZstdFrames:
    """Begins to decompress frames of zstd, after a look at the memory that each one takes.

    Args:
        path: path of the file, for messages.
        notice: receives a message at the first frame that takes much memory.
    """

    def __init__(self, path: str, notice: Notice) -> None:
        import zstandard

        self._path, self._notice, self._noticed = path, notice, False
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW_BYTES)

    def begin(self, head: bytes) -> Any:
        """Returns a decompressor of the frame that begins with these bytes.

        Raises:
            DataError: its window is too large, or it needs a dictionary.
        """
        import zstandard

        try:
            frame = zstandard.get_frame_parameters(head)
            window, content, dictionary = frame.window_size, frame.content_size, frame.dict_id
        except zstandard.ZstdError:  # the decompressor says what is wrong
            window = content = dictionary = 0
        if dictionary:
            raise DataError(
                f"{self._path} was compressed with a dictionary (its id is {dictionary}), without which it cannot be decompressed",
                "files of zstd without a dictionary",
                "compress it again without one: zstd -dc -D DICTIONARY FILE | zstd > NEW.zst",
            )
        if window > MOST_WINDOW_BYTES:
            raise DataError(
                f"{self._path} declares a window of {window:,} bytes, and decompressing would take as much memory",
                f"windows of up to {MOST_WINDOW_BYTES:,} bytes, which is zstd --long=31",
                "compress it again with a smaller window, or remove it from --input",
            )
        if min(window, content) > _USUAL_WINDOW_BYTES and not self._noticed:
            self._noticed = True
            self._notice(f"{self._path} has a window of {window >> 20:,} MiB: decompressing it takes up to that much memory")
        return self._decompressor.decompressobj()


class _FramedFile:
    """Decompresses consecutive frames, of which each needs its own decompressor.

    A truncated frame, and anything but padding after a frame, raise an error. Python's own readers of .bz2, .xz and .zst files end there
    without one, so that the rest of a damaged file would be lost; and `lzma.LZMAFile` has no limit of memory.

    Args:
        file: the compressed file.
        begin: returns a decompressor of the frame that begins with the given bytes.
        head_bytes: how many bytes `begin` is given, unless the file ends before.
        padding: after a frame, the number of zero bytes must be a multiple of this; 0: there may be none.
    """

    def __init__(self, file: BinaryIO, begin: Callable[[bytes], Any], head_bytes: int = 1, padding: int = 0) -> None:
        self._file, self._begin, self._head_bytes, self._padding = file, begin, head_bytes, padding
        self._frame: Any = None
        self._compressed = b""
        self._is_start = True

    def read(self, size: int = -1) -> bytes:
        """Returns about `size` decompressed bytes, none at the end of the file.

        Raises:
            EOFError: the file ends inside a frame, or inside the padding.
        """
        pieces, total = [], 0
        while size < 0 or total < size:
            if self._frame is None and not self._begin_frame():
                break
            compressed = self._compressed or self._file.read(_PIECE_BYTES)
            if not compressed:
                raise EOFError("the last frame is truncated")
            piece = self._frame.decompress(compressed)
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
            pieces.append(piece)
            total += len(piece)
        return b"".join(pieces)

    def _begin_frame(self) -> bool:
        """Begins the next frame, after the padding before it. Returns whether there is one."""
        head, zeros = self._compressed, 0
        while True:
            if self._padding and not self._is_start:
                begun = head.lstrip(b"\0")
                zeros += len(head) - len(begun)
                head = begun
            if len(head) >= self._head_bytes or not (piece := self._file.read(_PIECE_BYTES)):
                break
            head += piece
        if self._padding and zeros % self._padding:
            raise EOFError(f"{plural(zeros, 'zero byte')} after a frame, not a multiple of {self._padding}")
        self._compressed, self._is_start = head, False
        self._frame = self._begin(head) if head else None
        return bool(head)


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
            DataError: the file has decompressed to too much, or needs too much memory.
        """
        errors: tuple[type[Exception], ...] = (MemoryError, *read_errors())
        try:
            data: bytes = self._stream.read(size)
        except errors as error:
            if isinstance(error, MemoryError) or "memory" in str(error).lower():
                raise self._needs_memory(error) from error
            raise
        self._bytes += len(data)
        if self._bytes > UNCHECKED_BYTES and self._bytes > MOST_RATIO * self._file.tell():
            raise DataError(
                f"{self._path} decompresses to more than {MOST_RATIO:,} times its size: {self._bytes:,} bytes out of "
                f"{self._file.tell():,} so far",
                f"files that decompress to at most {MOST_RATIO:,} times their size; text compresses to a third, or a fiftieth",
                "remove it from --input; if you know what it contains, decompress it and give the decompressed file",
            )
        return data

    def _needs_memory(self, error: BaseException) -> DataError:
        if isinstance(error, lzma.LZMAError):
            return DataError(
                f"{self._path} needs more than {_XZ_MEMORY >> 20} MiB of memory to be decompressed: its dictionary is larger",
                f"files that need at most {_XZ_MEMORY >> 20} MiB; those of xz -9 need 65 MiB",
                "compress it again: xz -dc FILE | xz -9 > NEW.xz",
            )
        return DataError(
            f"{self._path} cannot be decompressed: there is not enough memory",
            f"free memory of the size of the file's window, which is at most {MOST_WINDOW_BYTES:,} bytes",
            "free memory, or compress the file again with a smaller window",
        )
