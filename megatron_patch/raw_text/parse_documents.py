"""Parses a batch of bytes into documents.

In: a `Batch` and the keys of the text. Out: for each document its texts, one for each key, or the reason why it is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_patch.raw_text.json_lines import key_paths, texts_of_line
from megatron_patch.raw_text.large_documents import LargeText
from megatron_patch.raw_text.parquet import texts_of_rows
from megatron_patch.raw_text.readers import Batch

_LINE_ENDS = b"\r\n"


class Document(NamedTuple):
    """One document. A tuple, because it is made in a third of the time of a dataclass, and there are millions of short documents.

    Args:
        number: its line (or row, or position among separated documents) in the batch, from 1.
        texts: one for each key; None: the document is left out.
        reason: why it is left out.
        offset: its first byte in the batch.
    """

    number: int
    texts: tuple[str | LargeText, ...] | None
    reason: str = ""
    offset: int = 0


@dataclass(frozen=True)
class ParsedBatch:
    """The texts of a batch.

    Args:
        batch: where they come from.
        columns: the texts of each key.
        lines: lines of the batch (or rows, or separated documents).
        bad: (line in the batch from 1, first byte in the batch, reason) of each line that is left out.
    """

    batch: Batch
    columns: tuple[list[str | LargeText], ...]
    lines: int
    bad: tuple[tuple[int, int, str], ...]


def iterate_documents(batch: Batch, keys: Sequence[str], line_counts: list[int]) -> Iterator[Document]:
    """Yields the documents of a batch. Blank lines are skipped.

    Args:
        batch: the batch, which is read here.
        keys: JSON keys that hold the text, with dots for nested keys. Plain text without keys is the same under every key.
        line_counts: the number of lines (or rows, or separated documents) is appended at the end.

    Raises:
        DataError: the batch cannot be read.
    """
    if batch.kind == "rows":
        columns = texts_of_rows(batch.read())
        line_counts.append(len(columns[0]))
        for number, row in enumerate(zip(*columns, strict=True), start=1):
            yield _row(number, row, keys)
        return
    if batch.is_large_text:
        line_counts.append(1)
        yield _large_text(batch, len(keys))
        return
    lines = 0
    paths = key_paths(keys)
    for number, (offset, piece) in enumerate(_split(batch.read(), batch.separator), start=1):
        lines = number
        document: Document | None = None
        if batch.kind == "text":
            text = bytes(piece) if batch.separator is None else bytes(piece).strip(_LINE_ENDS)
            if text or batch.separator is None:
                document = _plain_text(number, text, len(keys), offset)
        elif isinstance(found := texts_of_line(piece, paths), str):
            document = Document(number, None, found, offset)
        elif found is not None:
            document = Document(number, found, "", offset)
        if document is not None:
            yield document
    line_counts.append(lines)


def parse_batch(batch: Batch, keys: Sequence[str]) -> ParsedBatch:
    """Reads and parses a batch.

    Raises:
        DataError: it cannot be read.
    """
    columns: tuple[list[str | LargeText], ...] = tuple([] for _ in keys)
    bad: list[tuple[int, int, str]] = []
    line_counts: list[int] = []
    for document in iterate_documents(batch, keys, line_counts):
        if document.texts is None:
            bad.append((document.number, document.offset, document.reason))
            continue
        for column, text in zip(columns, document.texts, strict=True):
            column.append(text)
    return ParsedBatch(batch, columns, line_counts[0], tuple(bad))


def _large_text(batch: Batch, keys: int) -> Document:
    """A document that stays in its file. It is decoded once here, so that it is known to be UTF-8 before any of it is encoded."""
    text = LargeText(batch.open(), batch.size, batch.start)
    try:
        for _ in text.pieces():
            pass
    except UnicodeDecodeError as error:
        return Document(1, None, f"not UTF-8: {error}")
    except EOFError as error:
        raise batch.became_shorter() from error
    except OSError as error:
        raise batch.unreadable(error) from error
    return Document(1, (text,) * keys)


def _split(data: bytes, separator: bytes | None) -> Iterator[tuple[int, memoryview]]:
    """Yields (offset, bytes) of each piece between separators; what follows the last separator is a piece unless it is empty."""
    start, view = 0, memoryview(data)
    if separator is not None:
        while (found := data.find(separator, start)) >= 0:
            yield start, view[start:found]
            start = found + len(separator)
    if start < len(data):
        yield start, view[start:]


def _row(number: int, row: Sequence[str | bytes | None], keys: Sequence[str]) -> Document:
    texts = tuple(value for value in row if isinstance(value, str))
    if len(texts) == len(row):
        return Document(number, texts)
    key, value = next((key, value) for key, value in zip(keys, row, strict=True) if not isinstance(value, str))
    return Document(number, None, f"key {key!r} is {'null, not a string' if value is None else 'not UTF-8'}")


def _plain_text(number: int, data: bytes, keys: int, offset: int) -> Document:
    try:
        return Document(number, (data.decode("utf-8"),) * keys, offset=offset)
    except UnicodeDecodeError as error:
        return Document(number, None, f"not UTF-8: {error}", offset)
