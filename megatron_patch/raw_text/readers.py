"""From spans of the input to batches of documents, in order.

In: `Span`s. Out: `Batch`es of a megabyte or some: a byte range of a plain file, which a worker reads itself, or the bytes themselves where
they come out of an archive, a table or a pipe. Cuts fall between documents. A document too long for memory to hold several times goes
through a file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

from megatron_patch.errors import DataError
from megatron_patch.raw_text.compression import broken_archive, open_compressed
from megatron_patch.raw_text.inputs import STANDARD_INPUT, Span, after, inner_suffix, is_compressed, line_start
from megatron_patch.raw_text.large_documents import LARGE_BYTES
from megatron_patch.raw_text.parquet import row_batches

BATCH_BYTES = 1 << 20
# Of a plain file, which is cut without being read: fewer and larger batches for large files, so that handing them out costs little.
_LARGER, _PIECES = 4, 256
_NEWLINE = b"\n"

Kind = Literal["lines", "text", "rows"]


@dataclass(frozen=True)
class Batch:
    """Some documents of one input.

    Args:
        source: its path, for messages.
        kind: JSON lines, text (separated documents, or one), or rows of a table as an Arrow stream.
        file: number of the input.
        upto: the unit of the input (see `Span`) behind this batch, where reading can go on.
        share: how much of the input has been read then, from 0 to 1.
        separator: what stands between documents; None: it is one.
        data: the documents, where they have been read already.
        path: the file that holds them otherwise.
        start: first byte there.
        end: byte behind the last.
        temporary: the file is removed when it has been read.
        scratch: folder for what is too long for memory.
    """

    source: str
    kind: Kind = "lines"
    file: int = 0
    upto: int = 0
    share: float = 0.0
    separator: bytes | None = _NEWLINE
    data: bytes | None = None
    path: str = ""
    start: int = 0
    end: int = 0
    temporary: bool = False
    scratch: str = ""

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.data) if self.data is not None else self.end - self.start

    @property
    def is_long(self) -> bool:
        """Whether it is too large to be held in memory several times."""
        return self.data is None and self.size >= LARGE_BYTES

    def open(self) -> BinaryIO:
        """The file that holds the documents.

        Raises:
            DataError: it cannot be read any more, or has become shorter.
        """
        try:
            file = open(self.path, "rb")
            if self.temporary:
                os.unlink(self.path)
        except OSError as error:
            raise DataError(f"{self.source}: {error.strerror}", "files that stay readable while they are preprocessed") from error
        if os.fstat(file.fileno()).st_size < self.end:
            raise self.shorter()
        return file

    def read(self) -> bytes:
        """The documents.

        Raises:
            DataError: as `open`.
        """
        if self.data is not None:
            return self.data
        with self.open() as file:
            file.seek(self.start)
            data = file.read(self.end - self.start)
        if len(data) < self.size:
            raise self.shorter()
        return data

    def shorter(self) -> DataError:
        """What to tell of a file that has become shorter."""
        return DataError(
            f"{self.source} has become shorter while it was read", "files that stay as they are", "run again when nothing writes to it"
        )


def no_scratch(folder: str | Path, error: OSError) -> DataError:
    """What to tell where documents that are too long for memory cannot be written."""
    return DataError(
        f"cannot write to {folder}, where long documents stand while they are encoded: {error.strerror or error}",
        "a writable folder with free space",
        "free space or change --output-prefix",
    )


class _Spill:
    """Pieces of one document, in memory as long as there are few."""

    def __init__(self, scratch: Path | None) -> None:
        self._scratch, self._count = scratch, 0
        self._pieces: list[bytes] = []
        self._size = 0
        self._file: BinaryIO | None = None
        self._path = ""

    def add(self, piece: bytes) -> None:
        self._size += len(piece)
        self._pieces.append(piece)
        if self._scratch is not None and self._size >= LARGE_BYTES:
            try:
                self._write(self._scratch)
            except OSError as error:
                raise no_scratch(self._scratch, error) from error

    def _write(self, folder: Path) -> None:
        if self._file is None:
            folder.mkdir(parents=True, exist_ok=True)
            self._path = str(folder / f"long-{self._count}")
            self._count += 1
            self._file = open(self._path, "wb", buffering=0)
        for piece in self._pieces:
            view = memoryview(piece)
            while view:
                view = view[self._file.write(view) :]
        self._pieces = []

    def take(self) -> tuple[bytes | None, str, int]:
        """(the bytes, or the file that holds them, its size), and begins anew."""
        pieces, size, file = self._pieces, self._size, self._file
        self._pieces, self._size, self._file = [], 0, None
        if file is None:
            return b"".join(pieces), "", 0
        file.close()
        return None, self._path, size


class _Cutter:
    """Cuts a stream between documents.

    Args:
        source: for messages.
        kind: lines or text.
        separator: what stands between documents; None: the stream is one.
        file: number of the input.
        scratch: folder for long documents.
    """

    def __init__(self, source: str, kind: Kind, separator: bytes | None, file: int, scratch: Path | None) -> None:
        self._source, self._kind, self._separator, self._file = source, kind, separator, file
        self._rest, self._scratch = _Spill(scratch), str(scratch or "")

    def batches(self, stream: BinaryIO, start: int, share: Share) -> Iterator[Batch]:
        """Batches from unit `start` on."""
        fresh = _skip(stream, start)
        upto = read = start
        keep = len(self._separator) - 1 if self._separator is not None else 0
        carry = b""  # bytes that may be the beginning of a separator
        while fresh := fresh or stream.read(BATCH_BYTES):
            read += len(fresh)
            piece, fresh = carry + fresh, b""
            cut = self._last_cut(piece)
            if cut:
                self._rest.add(piece[:cut])
                upto = read - (len(piece) - cut)
                yield self._batch(upto, share())
            body = max(cut, len(piece) - keep)
            if body > cut:
                self._rest.add(piece[cut:body])
            carry = piece[body:]
        if carry:
            self._rest.add(carry)
        last = self._batch(read, 1.0)
        if last.size:
            yield last

    def _last_cut(self, piece: bytes) -> int:
        """Behind the last separator, as one finds them from the left: where they can overlap, from the right they are others."""
        if self._separator is None:
            return 0
        if len(self._separator) == 1:
            return piece.rfind(self._separator) + 1
        tail = piece.split(self._separator)[-1]
        return len(piece) - len(tail) if len(tail) < len(piece) else 0

    def _batch(self, upto: int, share: float) -> Batch:
        data, path, size = self._rest.take()
        return Batch(
            self._source,
            self._kind,
            self._file,
            upto,
            share,
            self._separator,
            data,
            path,
            end=size,
            temporary=data is None,
            scratch=self._scratch,
        )


class Share:
    """How much of a file has been read, by the position in it."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self._file = file
        self._size = Path(path).stat().st_size if path != STANDARD_INPUT else 0

    def __call__(self) -> float:
        """From 0 to 1."""
        return min(1.0, self._file.tell() / self._size) if self._size else 0.0


def _skip(stream: BinaryIO, count: int) -> bytes:
    """Reads over what has been dealt with. Returns what came with it, from streams that give more than they are asked for."""
    while count > 0:
        piece = stream.read(min(count, BATCH_BYTES))
        if not piece:
            raise EOFError("it has become shorter")
        if len(piece) > count:
            return piece[count:]
        count -= len(piece)
    return b""


def _range_batches(span: Span, number: int, scratch: Path | None) -> Iterator[Batch]:
    """Cuts a plain file at line ends without reading it."""
    size = Path(span.path).stat().st_size
    if span.end is not None and span.end > size:
        raise EOFError("it has become shorter")
    last = size if span.end is None else span.end
    start = span.start
    step = min(_LARGER * BATCH_BYTES, max(BATCH_BYTES, (last - start) // _PIECES))
    while start < last:
        end = min(last, line_start(span.path, min(last, start + step)))
        share = (end - span.start) / (last - span.start)
        yield Batch(span.path, "lines", number, end, share, path=span.path, start=start, end=end, scratch=str(scratch or ""))
        start = end


def _span_batches(span: Span, number: int, keys: Sequence[str], separator: bytes | None, scratch: Path | None) -> Iterator[Batch]:
    if span.path == STANDARD_INPUT:
        cutter = _Cutter("standard input", "lines", _NEWLINE, number, scratch)
        yield from cutter.batches(cast("BinaryIO", sys.stdin.buffer), 0, Share(cast("BinaryIO", sys.stdin.buffer), STANDARD_INPUT))
        return
    suffix, archive = inner_suffix(span.path), is_compressed(span.path)
    if suffix == ".parquet":
        for data, upto, share in row_batches(span.path, keys, span.start, BATCH_BYTES):
            yield Batch(span.path, "rows", number, upto, share, None, data)
        return
    text = suffix == ".txt"
    if not archive and not text:
        yield from _range_batches(span, number, scratch)
        return
    if not archive and separator is None:
        size = Path(span.path).stat().st_size
        if span.start < size:
            yield Batch(span.path, "text", number, size, 1.0, None, path=span.path, end=size, scratch=str(scratch or ""))
        return
    with open(span.path, "rb") as packed:
        cutter = _Cutter(span.path, "text" if text else "lines", separator if text else _NEWLINE, number, scratch)
        stream = open_compressed(packed, span.path) if archive else packed
        yield from cutter.batches(stream, span.start, Share(packed, span.path))


def batches(
    spans: Sequence[Span],
    keys: Sequence[str] = ("text",),
    separator: bytes | None = None,
    resume: tuple[int, int | None] = (0, None),
    scratch: Path | None = None,
) -> Iterator[Batch]:
    """All documents of all spans, in order.

    Args:
        spans: the input.
        keys: of the text, for tables, of which only these columns are read.
        separator: what stands between the documents of a .txt; None: each is one document.
        resume: (number of the span, unit in it) to begin at, as a batch's `file` and `upto` say; None: its start.
        scratch: folder for documents that are too long for memory.

    Raises:
        DataError: a file that cannot be read, or an archive that is broken.
    """
    broken = broken_archive()
    for number, span in after(spans, *resume):
        try:
            yield from _span_batches(span, number, keys, separator, scratch)
        except broken as error:
            raise DataError(
                f"{span.path} cannot be read: {error}", "readable files and whole archives", "repair or leave out the file, and run again"
            ) from error
