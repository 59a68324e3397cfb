"""Documents that are too long to be held in memory several times: read, unescaped and cut piece by piece.

In: a range of a file that holds documents. Out: short documents as bytes, long ones as `LargeText`, whose pieces are texts. Of a long line
of JSON the strings that make it long are cut out, and only the rest is parsed as a whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import orjson

LARGE_BYTES = 1 << 25
_PIECE_BYTES = 1 << 22


@dataclass(frozen=True)
class LargeText:
    """A text in a file.

    Args:
        file: open; read at any place.
        start: first byte.
        end: byte behind the last.
        escaped: it is the inside of a JSON string, and not plain UTF-8.
    """

    file: BinaryIO
    start: int
    end: int
    escaped: bool

    def pieces(self) -> Iterator[str]:
        """The text, some megabytes at a time.

        Raises:
            ValueError: it is no UTF-8, or no JSON string.
            OSError: the file cannot be read.
            EOFError: the file has become shorter.
        """
        raw = b""
        for piece in _pieces(self.file, self.start, self.end):
            raw += piece
            if (cut := self._cut(raw)) > 0:
                yield self._text(raw[:cut])
                raw = raw[cut:]
        if raw:
            yield self._text(raw)

    def _cut(self, raw: bytes) -> int:
        """The last place that is inside no character and no escape: in front of a space, or of a line's end."""
        space = raw.rfind(b" ")
        if space > 0 or not self.escaped:
            return max(space, raw.rfind(b"\n"))
        line = raw.rfind(b"\\n")
        return line if raw[line - 1 : line] != b"\\" else 0

    def _text(self, raw: bytes) -> str:
        return str(orjson.loads(b'"%b"' % raw)) if self.escaped else raw.decode("utf-8")


def whole(text: str | LargeText) -> str:
    """A text in memory.

    Raises:
        ValueError, OSError, EOFError: as `LargeText.pieces`.
    """
    return text if isinstance(text, str) else "".join(text.pieces())


def documents_in_file(file: BinaryIO, start: int, end: int, separator: bytes | None) -> Iterator[tuple[int, memoryview | tuple[int, int]]]:
    """What stands between separators in a range of a file: (first byte, the bytes, or of long ones the range they take).

    Raises:
        OSError: the file cannot be read.
        EOFError: it has become shorter.
    """
    begin = start  # of the document
    read = start  # what has been taken from the file
    rest = b""  # the document so far; of a long one the end, which may be the beginning of a separator
    for piece in _pieces(file, start, end):
        read += len(piece)
        rest += piece
        taken = 0
        while separator is not None and (found := rest.find(separator, taken)) >= 0:
            at = read - len(rest) + found
            yield begin, memoryview(rest)[taken:found] if at - begin == found - taken else (begin, at)
            taken = found + len(separator)
            begin = at + len(separator)
        rest = rest[taken:]
        if len(rest) >= LARGE_BYTES or len(rest) < read - begin:
            rest = rest[len(rest) - len(separator) + 1 :] if separator is not None else b""
    if begin < end:
        yield begin, memoryview(rest) if len(rest) == end - begin else (begin, end)


def _pieces(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    while start < end:
        piece = os.pread(file.fileno(), min(_PIECE_BYTES, end - start), start)
        if not piece:
            raise EOFError("it has become shorter")
        start += len(piece)
        yield piece


def long_strings(file: BinaryIO, start: int, end: int) -> tuple[bytes, dict[str, LargeText]]:
    """Cuts the long strings out of a line of JSON.

    Returns:
        The rest of the line, with a mark inside the quotes of each; the strings by their marks, which are not checked yet.
    """
    name = os.urandom(8).hex()
    kept: list[bytes] = []
    found: dict[str, LargeText] = {}
    opened: int | None = None  # inside a string: its first byte
    copied = start
    for place in _quotes(file, start, end):
        if opened is None:
            opened = place + 1
            continue
        if place - opened >= LARGE_BYTES // 4:
            mark = f"{name}-{len(found)}"
            kept += [*_pieces(file, copied, opened), mark.encode()]
            found[mark] = LargeText(file, opened, place, escaped=True)
            copied = place
        opened = None
    kept += _pieces(file, copied, end)
    return b"".join(kept), found


def _quotes(file: BinaryIO, start: int, end: int) -> Iterator[int]:
    """Where quotes stand that are not escaped."""
    begin, before = start, 0  # backslashes right before the piece
    for piece in _pieces(file, start, end):
        place = piece.find(b'"')
        while place >= 0:
            slashes = _backslashes(piece, place, before)
            if slashes % 2 == 0:
                yield begin + place
            place = piece.find(b'"', place + 1)
        before = _backslashes(piece, len(piece), before)
        begin += len(piece)


def _backslashes(piece: bytes, place: int, before: int) -> int:
    """How many stand right in front of a place; `before` of them in front of the piece."""
    first = place
    while first and piece[first - 1] == 0x5C:
        first -= 1
    return place - first + (before if first == 0 else 0)
