"""From a batch of bytes to texts. In: a `Batch` and keys. Out: for each document its texts, one for each key, or why it is left out; long
texts stay where they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import orjson

from megatron_patch.raw_text.large_documents import LargeText, documents_in_file, long_strings
from megatron_patch.raw_text.parquet import texts_of_rows
from megatron_patch.raw_text.readers import Batch

_LINE_ENDS = b"\r\n"

KeyPath = tuple[str, list[str]]
"""A key, and the names in it that lead to the text."""


class Document(NamedTuple):
    """One document; of short ones there are millions, and a tuple is made in a third of a dataclass' time.

    Args:
        number: its line (or row, or place among separated documents) in the batch, from 1.
        texts: one for each key; None: it is left out.
        reason: why.
        offset: its first byte in the batch.
    """

    number: int
    texts: tuple[str | LargeText, ...] | None
    reason: str = ""
    offset: int = 0


@dataclass(frozen=True)
class Texts:
    """A batch, read.

    Args:
        batch: where it came from.
        columns: the texts of each key.
        lines: lines of the batch (or rows, or separated documents).
        bad: (line in the batch from 1, first byte in the batch, reason) of lines left out.
    """

    batch: Batch
    columns: tuple[list[str | LargeText], ...]
    lines: int
    bad: tuple[tuple[int, int, str], ...]


def documents(batch: Batch, keys: Sequence[str], counted: list[int]) -> Iterator[Document]:
    """The documents of a batch; blank lines are none.

    Args:
        batch: read here.
        keys: of the text, with dots for nested ones. Text without keys is the same under every one.
        counted: gets the number of lines (or rows, or separated documents).

    Raises:
        DataError: the batch cannot be read.
    """
    if batch.kind == "rows":
        columns = texts_of_rows(batch.read(), keys)
        counted.append(len(columns[0]))
        for number, row in enumerate(zip(*columns, strict=True), start=1):
            yield _row(number, row, keys)
        return
    lines = 0
    paths = [(key, key.split(".")) for key in keys]
    file = batch.open() if batch.is_long else None
    pieces = _pieces(batch.read(), batch.separator) if file is None else documents_in_file(file, batch.start, batch.end, batch.separator)
    first = 0 if file is None else batch.start
    try:
        for number, (place, piece) in enumerate(pieces, start=1):
            lines = number
            document: Document | None = None
            if isinstance(piece, tuple):
                assert file is not None
                document = _long(batch, file, number, piece, paths)
            elif batch.kind == "text":
                text = bytes(piece) if batch.separator is None else bytes(piece).strip(_LINE_ENDS)
                if text or batch.separator is None:
                    document = _plain(number, text, len(keys), place - first)
            else:
                document = _parse(number, piece, paths, place - first)
            if document is not None:
                yield document
    except EOFError as error:
        raise batch.shorter() from error
    counted.append(lines)


def read_texts(batch: Batch, keys: Sequence[str]) -> Texts:
    """Reads a batch.

    Raises:
        DataError: it cannot be read.
    """
    columns: tuple[list[str | LargeText], ...] = tuple([] for _ in keys)
    bad: list[tuple[int, int, str]] = []
    lines: list[int] = []
    for document in documents(batch, keys, lines):
        if document.texts is None:
            bad.append((document.number, document.offset, document.reason))
            continue
        for column, text in zip(columns, document.texts, strict=True):
            column.append(text)
    return Texts(batch, columns, lines[0], tuple(bad))


def _long(batch: Batch, file: BinaryIO, number: int, where: tuple[int, int], paths: Sequence[KeyPath]) -> Document | None:
    """A document that is left in its file. Its text is read once here, so that what is wrong with it is known before any of it is used."""
    start, end = where
    offset = start - batch.start
    strings: dict[str, LargeText] = {}
    if batch.kind == "text":
        texts: tuple[str | LargeText, ...] = (LargeText(file, start, end, escaped=False),) * len(paths)
    else:
        line, strings = long_strings(file, start, end)
        document = _parse(number, line, paths, offset)
        if document is None or document.texts is None:
            return document
        texts = tuple(strings.get(text, text) if isinstance(text, str) else text for text in document.texts)
    try:
        for text in {*(text for text in texts if isinstance(text, LargeText)), *strings.values()}:
            for _ in text.pieces():
                pass
    except ValueError as error:
        return Document(number, None, f"not UTF-8: {error}" if batch.kind == "text" else f"no valid JSON: {error}", offset)
    return Document(number, texts, offset=offset)


def _pieces(data: bytes, separator: bytes | None) -> Iterator[tuple[int, memoryview]]:
    """(first byte, bytes) of each piece between separators; what is behind the last one is a piece if there is anything."""
    start, view = 0, memoryview(data)
    if separator is not None:
        while (found := data.find(separator, start)) >= 0:
            yield start, view[start:found]
            start = found + len(separator)
    if start < len(data):
        yield start, view[start:]


def _row(number: int, row: Sequence[str | None], keys: Sequence[str]) -> Document:
    for key, value in zip(keys, row, strict=True):
        if value is None:
            return Document(number, None, f"key {key!r} is missing, or no UTF-8")
    return Document(number, tuple(value for value in row if value is not None))


def _plain(number: int, data: bytes, keys: int, offset: int) -> Document:
    try:
        return Document(number, (data.decode("utf-8"),) * keys, offset=offset)
    except UnicodeDecodeError as error:
        return Document(number, None, f"not UTF-8: {error}", offset)


def _as_python_reads(line: bytes) -> Any:
    """What Python's own parser makes of a line: it takes what `json.dumps` writes beyond the standard (NaN, Infinity); None: nothing."""
    try:
        found = json.loads(line.decode("utf-8"))
        json.dumps(found, ensure_ascii=False).encode("utf-8")  # no half of a surrogate pair
    except (ValueError, RecursionError):
        return None
    return found


def _parse(number: int, line: bytes | memoryview, paths: Sequence[KeyPath], offset: int) -> Document | None:
    """A line of JSON; None where it is blank."""
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if not bytes(line).strip():
            return None
        document = _as_python_reads(bytes(line))
        if document is None:
            return Document(number, None, f"no valid JSON: {error}", offset)
    texts = []
    for key, names in paths:
        value = document
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        if not isinstance(value, str):
            kind = "is missing" if value is None else f"is a {type(value).__name__}"
            return Document(number, None, f"key {key!r} {kind}, not a string", offset)
        texts.append(value)
    return Document(number, tuple(texts), "", offset)
