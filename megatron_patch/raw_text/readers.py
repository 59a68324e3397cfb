"""Reads ranges of the input as batches of documents, in order.

In: `FileRange`s. Out: `Batch`es of about a megabyte: the byte range of a plain file, which a worker reads later, or the bytes if they come
from a compressed file, a table or a pipe. A batch ends where a document ends.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

from megatron_patch.errors import DataError
from megatron_patch.raw_text.compression import Notice, open_compressed, read_errors
from megatron_patch.raw_text.encodings import HEAD_BYTES, byte_order_mark
from megatron_patch.raw_text.first_lines import JUDGED_LINES, judge_first_lines
from megatron_patch.raw_text.inputs import STANDARD_INPUT, FileRange, inner_suffix, is_compressed, next_line_start, remaining_ranges
from megatron_patch.raw_text.large_documents import LARGE_BYTES, MOST_DOCUMENT_BYTES
from megatron_patch.raw_text.parquet import row_batches

BATCH_BYTES = 1 << 20
# A plain file is split into about _MAX_BATCHES batches of at most _LARGER times the usual size: fewer batches cost less to send to workers.
_LARGER, _MAX_BATCHES = 4, 256
_NEWLINE = b"\n"

Kind = Literal["lines", "text", "rows"]


@dataclass(frozen=True)
class Batch:
    """A few documents of one input.

    Args:
        source: the path of the input, for messages.
        kind: JSON lines, text (separated documents, or one), or rows of a table as an Arrow stream.
        file: index of the input.
        next_unit: the unit of the input (see `FileRange`) after this batch, from which reading can continue.
        fraction: share of the input that has been read after this batch, from 0 to 1.
        separator: bytes between documents; None: the batch is one document.
        data: the documents, if they have been read already.
        path: otherwise, the file that holds them.
        start: first byte of the documents in that file.
        end: byte after the last one.
    """

    source: str
    kind: Kind = "lines"
    file: int = 0
    next_unit: int = 0
    fraction: float = 0.0
    separator: bytes | None = _NEWLINE
    data: bytes | None = None
    path: str = ""
    start: int = 0
    end: int = 0

    @property
    def size(self) -> int:
        """The number of bytes of the batch."""
        return len(self.data) if self.data is not None else self.end - self.start

    @property
    def is_large_text(self) -> bool:
        """Whether the batch is a text file that is one document, too large to be held in memory several times."""
        return self.kind == "text" and self.data is None and self.size >= LARGE_BYTES

    def open(self) -> BinaryIO:
        """Opens the file that holds the documents.

        Raises:
            DataError: the file can no longer be read, or has become shorter.
        """
        try:
            file = open(self.path, "rb")
        except OSError as error:
            raise self.unreadable(error) from error
        if os.fstat(file.fileno()).st_size < self.end:
            raise self.became_shorter()
        return file

    def read(self) -> bytes:
        """Returns the documents as bytes.

        Raises:
            DataError: the file can no longer be read, or has become shorter.
        """
        if self.data is not None:
            return self.data
        with self.open() as file:
            file.seek(self.start)
            data = file.read(self.end - self.start)
        if len(data) < self.size:
            raise self.became_shorter()
        return data

    def became_shorter(self) -> DataError:
        """Returns the error for a file that became shorter while it was read."""
        return DataError(
            f"{self.source} became shorter while it was read",
            "files that do not change while they are preprocessed",
            "run again when no process writes to it",
        )

    def unreadable(self, error: OSError) -> DataError:
        """Returns the error for a file that can no longer be read."""
        return DataError(
            f"{self.source} cannot be read: {error.strerror or error}",
            "files that stay readable while they are preprocessed",
            "check the file and its permissions, and run again",
        )


def _too_long(source: str) -> DataError:
    return DataError(
        f"{source} has a document of more than {MOST_DOCUMENT_BYTES:,} bytes",
        f"documents of at most {MOST_DOCUMENT_BYTES:,} bytes; a .txt file that is one document may be larger",
        "remove the document or split it, or give a plain .txt file; for text without separators, check --txt-separator; "
        "of a JSON array, make one object per line with jq -c '.[]' FILE",
    )


class _StreamSplitter:
    """Splits a stream between documents.

    Args:
        source: path of the input, for messages.
        kind: lines or text.
        separator: bytes between documents; None: the stream is one document.
        file: index of the input.
    """

    def __init__(self, source: str, kind: Kind, separator: bytes | None, file: int) -> None:
        self._source, self._kind, self._separator, self._file = source, kind, separator, file
        self._pieces: list[bytes] = []
        self._judged = JUDGED_LINES

    def split(self, stream: BinaryIO, start: int, fraction_read: Callable[[], float]) -> Iterator[Batch]:
        """Yields batches from unit `start` on."""
        fresh = _skip(stream, start) if start else _head(stream)
        next_unit = read = start
        if not start and (mark := byte_order_mark(fresh, self._source)) and self._kind == "text":
            fresh = fresh[mark:]
            next_unit = read = mark
        self._judged = JUDGED_LINES if start or self._kind != "lines" else 0
        keep = len(self._separator) - 1 if self._separator is not None else 0
        carry = b""  # bytes that may be the beginning of a separator
        while fresh := fresh or stream.read(BATCH_BYTES):
            read += len(fresh)
            piece, fresh = carry + fresh, b""
            boundary = self._last_boundary(piece)
            if boundary:
                self._pieces.append(piece[:boundary])
                next_unit = read - (len(piece) - boundary)
                yield self._batch(next_unit, fraction_read())
            kept = max(boundary, len(piece) - keep)
            if kept > boundary:
                self._pieces.append(piece[boundary:kept])
            carry = piece[kept:]
            if read - next_unit > MOST_DOCUMENT_BYTES:
                raise _too_long(self._source)
        if carry:
            self._pieces.append(carry)
        last = self._batch(read, 1.0)
        if last.size:
            yield last

    def _last_boundary(self, piece: bytes) -> int:
        """Returns the position after the last separator, or 0 without one."""
        if self._separator is None:
            return 0
        if len(self._separator) == 1:
            return piece.rfind(self._separator) + 1
        # Search from the left: with overlapping separators, a search from the right finds other boundaries.
        tail = piece.split(self._separator)[-1]
        return len(piece) - len(tail) if len(tail) < len(piece) else 0

    def _batch(self, next_unit: int, fraction: float) -> Batch:
        data, self._pieces = b"".join(self._pieces), []
        if self._judged < JUDGED_LINES:
            self._judged = judge_first_lines(io.BytesIO(data), self._source, self._judged)
        return Batch(self._source, self._kind, self._file, next_unit, fraction, self._separator, data)


def _fraction_read(file: BinaryIO, path: str) -> Callable[[], float]:
    """Returns a function that gives the fraction of a file before its current position; 0 for standard input."""
    size = Path(path).stat().st_size if path != STANDARD_INPUT else 0
    return lambda: min(1.0, file.tell() / size) if size else 0.0


def _head(stream: BinaryIO) -> bytes:
    """Returns the first bytes of a stream: at least as many as show its encoding, unless it is shorter."""
    found = b""
    while len(found) < HEAD_BYTES and (piece := stream.read(BATCH_BYTES)):
        found += piece
    return found


def _byte_order_mark(path: str, lines: bool = False) -> int:
    """Returns the length of the byte-order mark of a plain file. Of a file of lines, the first ones are judged, too."""
    with open(path, "rb") as file:
        found = byte_order_mark(file.read(HEAD_BYTES), path)
        if lines:
            file.seek(0)
            judge_first_lines(file, path)
    return found


def _skip(stream: BinaryIO, count: int) -> bytes:
    """Skips bytes that were processed before. Returns any extra bytes that were read past them."""
    while count > 0:
        piece = stream.read(min(count, BATCH_BYTES))
        if not piece:
            raise EOFError("it has become shorter")
        if len(piece) > count:
            return piece[count:]
        count -= len(piece)
    return b""


def _line_batches(part: FileRange, index: int) -> Iterator[Batch]:
    """Splits a plain file at line ends without reading it, except for its beginning. A byte-order mark stays on its line."""
    _byte_order_mark(part.path, lines=True)
    size = Path(part.path).stat().st_size
    if part.end is not None and part.end > size:
        raise EOFError("it has become shorter")
    last = size if part.end is None else part.end
    start = part.start
    step = min(_LARGER * BATCH_BYTES, max(BATCH_BYTES, (last - start) // _MAX_BATCHES))
    while start < last:
        end = min(last, next_line_start(part.path, min(last, start + step)))
        if end - start > step + MOST_DOCUMENT_BYTES:
            raise _too_long(part.path)
        fraction = (end - part.start) / (last - part.start)
        yield Batch(part.path, "lines", index, end, fraction, path=part.path, start=start, end=end)
        start = end


def _batches_of(part: FileRange, index: int, keys: Sequence[str], separator: bytes | None, notice: Notice) -> Iterator[Batch]:
    if part.path == STANDARD_INPUT:
        stream = cast("BinaryIO", sys.stdin.buffer)
        splitter = _StreamSplitter("standard input", "lines", _NEWLINE, index)
        yield from splitter.split(stream, 0, _fraction_read(stream, STANDARD_INPUT))
        return
    suffix, compressed = inner_suffix(part.path), is_compressed(part.path)
    if suffix == ".parquet":
        for data, next_unit, fraction in row_batches(part.path, keys, part.start, BATCH_BYTES):
            yield Batch(part.path, "rows", index, next_unit, fraction, None, data)
        return
    text = suffix == ".txt"
    if not compressed and not text:
        yield from _line_batches(part, index)
        return
    if not compressed and separator is None:
        size, start = Path(part.path).stat().st_size, _byte_order_mark(part.path)
        if part.start < size and start < size:
            yield Batch(part.path, "text", index, size, 1.0, None, path=part.path, start=start, end=size)
        return
    with open(part.path, "rb") as file:
        splitter = _StreamSplitter(part.path, "text" if text else "lines", separator if text else _NEWLINE, index)
        stream = open_compressed(file, part.path, notice) if compressed else file
        yield from splitter.split(stream, part.start, _fraction_read(file, part.path))


def read_batches(
    parts: Sequence[FileRange],
    keys: Sequence[str] = ("text",),
    separator: bytes | None = None,
    resume: tuple[int, int | None] = (0, None),
    notice: Notice = lambda text: None,
) -> Iterator[Batch]:
    """Yields all documents of the input, in order.

    Args:
        parts: the input.
        keys: JSON keys that hold the text; of a table, only these columns are read.
        separator: bytes between the documents of a .txt file; None: each file is one document.
        resume: (index of the input, unit in it) to start at, as in a batch's `file` and `next_unit`; None: the start of the input.
        notice: receives messages for the user.

    Raises:
        DataError: a file cannot be read, or a compressed file is damaged.
    """
    errors = read_errors()
    for index, part in remaining_ranges(parts, *resume):
        try:
            yield from _batches_of(part, index, keys, separator, notice)
        except errors as error:
            raise DataError(
                f"{part.path} cannot be read: {error}",
                "readable files; compressed files that are complete",
                "repair the file or remove it from --input, and run again",
            ) from error
