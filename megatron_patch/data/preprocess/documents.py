"""From a batch of bytes to texts. In: a `Batch` and keys. Out: for each document its texts, one for each key, or why it is left out."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import orjson

from megatron_patch.data.preprocess.readers import Batch
from megatron_patch.data.preprocess.tables import texts_of_rows

_LINE_ENDS = b"\r\n"


@dataclass(frozen=True)
class Document:
    """One document.

    Args:
        number: its line (or row, or place among separated documents) in the batch, from 1.
        texts: one for each key; None: it is left out.
        reason: why.
        offset: its first byte in the batch.
    """

    number: int
    texts: tuple[str, ...] | None
    reason: str = ""
    offset: int = 0


def documents(batch: Batch, keys: Sequence[str], counted: list[int]) -> Iterator[Document]:
    """The documents of a batch; blank lines are none.

    Args:
        batch: read here.
        keys: of the text, with dots for nested ones. Text without keys is the same under every one.
        counted: gets the number of lines (or rows, or separated documents).

    Raises:
        DataError: the batch cannot be read.
    """
    data = batch.read()
    if batch.kind == "rows":
        assert isinstance(data, bytes)
        columns = texts_of_rows(data, keys)
        counted.append(len(columns[0]))
        for number, row in enumerate(zip(*columns, strict=True), start=1):
            yield _row(number, row, keys)
        return
    lines = 0
    for number, (offset, piece) in enumerate(_pieces(data, batch.separator), start=1):
        lines = number
        if batch.kind == "text":
            piece = piece.strip(_LINE_ENDS) if batch.separator is not None else piece
            if piece or batch.separator is None:
                yield _plain(number, piece, len(keys), offset)
        elif piece.strip():
            yield _parse(number, piece, keys, offset)
    counted.append(lines)


def _pieces(data: bytes | mmap.mmap, separator: bytes | None) -> Iterator[tuple[int, bytes]]:
    """(first byte, bytes) of each piece between separators; what is behind the last one is a piece if there is anything."""
    start, end = (0, len(data)) if isinstance(data, bytes) else (data.tell(), len(data))
    begin = start
    if separator is not None:
        while (found := data.find(separator, start)) >= 0:
            yield start - begin, data[start:found]
            start = found + len(separator)
    if start < end:
        yield start - begin, data[start:end]


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


def _parse(number: int, line: bytes, keys: Sequence[str], offset: int) -> Document:
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return Document(number, None, f"no valid JSON: {error}", offset)
    texts = []
    for key in keys:
        value = document
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if not isinstance(value, str):
            kind = "is missing" if value is None else f"is a {type(value).__name__}"
            return Document(number, None, f"key {key!r} {kind}, not a string", offset)
        texts.append(value)
    return Document(number, tuple(texts), offset=offset)
