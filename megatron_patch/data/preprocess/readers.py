"""From input files to batches of lines, in order.

In: paths, globs, "-". Out: `Batch`es of about a megabyte: a byte range of a plain file, which a worker reads itself, or the lines
themselves where they come out of an archive or a pipe. Cuts fall on line ends, so that a batch never holds part of a document.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import lzma
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron_patch.errors import DataError

BATCH_BYTES = 1 << 20
LINE_SUFFIXES = (".jsonl", ".json")
ARCHIVE_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True)
class Batch:
    """Some lines of one input.

    Args:
        source: its path, for messages.
        start: first byte, where a worker has to read the range itself.
        end: byte behind the last.
        data: the lines, where they have been read already.
        whole: the data is one document and no JSON (.txt).
    """

    source: str
    start: int = 0
    end: int = 0
    data: bytes | None = None
    whole: bool = False

    def read(self) -> bytes:
        """The lines.

        Raises:
            DataError: the file cannot be read any more.
        """
        if self.data is not None:
            return self.data
        try:
            with open(self.source, "rb") as file:
                file.seek(self.start)
                return file.read(self.end - self.start)
        except OSError as error:
            raise DataError(f"{self.source}: {error.strerror}", "files that stay readable while they are preprocessed") from error


def expand(inputs: Sequence[str]) -> list[str]:
    """Paths and globs as a list of files: in the order given, each glob's files by name.

    Raises:
        DataError: a file that does not exist, a glob without a match, a suffix that is not known.
    """
    files: list[str] = []
    for pattern in inputs:
        if pattern == "-":
            files.append(pattern)
            continue
        matches = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        matches = [match for match in matches if Path(match).is_file()]
        if not matches:
            raise DataError(f"--input {pattern} matches no file", "files, globs in quotes, or - for standard input", "check the path")
        files += matches
    for file in files:
        path = Path(file)
        inner = path.with_suffix("") if path.suffix in ARCHIVE_SUFFIXES else path
        if file != "-" and inner.suffix not in (*LINE_SUFFIXES, ".txt"):
            raise DataError(
                f"--input {file}: unknown kind of file",
                ".jsonl, .json (one object a line) or .txt (one document a file), also as .gz, .bz2, .xz, .zst",
                "rename or convert it",
            )
    if not files:
        raise DataError("no input", "--input FILE [FILE …]")
    return files


def _open_archive(path: str) -> BinaryIO:
    suffix = Path(path).suffix
    if suffix == ".gz":
        try:
            from isal import igzip

            return cast("BinaryIO", igzip.open(path, "rb"))
        except ImportError:
            return cast("BinaryIO", gzip.open(path, "rb"))
    if suffix == ".bz2":
        return cast("BinaryIO", bz2.open(path, "rb"))
    if suffix == ".xz":
        return cast("BinaryIO", lzma.open(path, "rb"))
    return cast("BinaryIO", _ZstdFile(open(path, "rb")))


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


def _broken_archive() -> tuple[type[Exception], ...]:
    import zstandard

    return (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


def _line_batches(source: str, stream: BinaryIO) -> Iterator[Batch]:
    """Cuts a stream at line ends."""
    rest: list[bytes] = []
    while piece := stream.read(BATCH_BYTES):
        cut = piece.rfind(b"\n") + 1
        if cut:
            yield Batch(source, data=b"".join([*rest, piece[:cut]]))
            rest = [piece[cut:]] if cut < len(piece) else []
        else:
            rest.append(piece)
    if rest:
        yield Batch(source, data=b"".join(rest))


def _range_batches(path: str) -> Iterator[Batch]:
    """Cuts a plain file at line ends without reading it."""
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        start = 0
        while start < size:
            file.seek(min(size, start + BATCH_BYTES))
            file.readline()
            end = min(size, file.tell())
            yield Batch(path, start, end)
            start = end


def _file_batches(path: str) -> Iterator[Batch]:
    if path == "-":
        yield from _line_batches("standard input", cast("BinaryIO", sys.stdin.buffer))
        return
    archive = Path(path).suffix in ARCHIVE_SUFFIXES
    inner = Path(path).with_suffix("") if archive else Path(path)
    if inner.suffix == ".txt":
        with _open_archive(path) if archive else open(path, "rb") as file:
            yield Batch(path, data=file.read(), whole=True)
    elif archive:
        with _open_archive(path) as file:
            yield from _line_batches(path, file)
    else:
        yield from _range_batches(path)


def batches(files: Sequence[str]) -> Iterator[Batch]:
    """All lines of all files, in order.

    Raises:
        DataError: a file that cannot be read, or an archive that is broken.
    """
    broken = _broken_archive()
    for path in files:
        try:
            yield from _file_batches(path)
        except broken as error:
            raise DataError(
                f"{path} cannot be read: {error}", "readable files and whole archives", "repair or leave out the file, and run again"
            ) from error
