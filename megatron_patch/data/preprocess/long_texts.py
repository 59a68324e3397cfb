"""Documents that are too long to be held in memory several times: read, unescaped and cut piece by piece.

In: a range of a file that holds documents. Out: short documents as bytes, long ones as `LongText`, whose pieces are texts. Of a long line
of JSON the strings that make it long are cut out, and only the rest is parsed as a whole.

Where a long text may be cut, so that its parts, encoded one after another, give the ids of the whole:

- Byte-level BPE: text is first split by a pattern, and merges happen inside of what it matches. In the patterns that are known here
  nothing that ends in a letter or a digit goes on with a space, and what follows does not look back.
- SentencePiece's BPE: no piece has a ▁ behind anything but ▁, so no merge reaches over the beginning of a word. The space in front of
  the second part is left out, since every text gets one.

Tokenizers that are neither get long texts as a whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import orjson

from megatron_patch.tiktoken_files import PATTERNS, TikTokenizer
from megatron_patch.tokenizer import HuggingFaceTokenizer, NullTokenizer, SentencePieceTokenizer, Tokenizer

LONG_BYTES = 1 << 25
_PIECE_BYTES = 1 << 22
_HUGGING_FACE_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KNOWN_PATTERNS = {*PATTERNS.values(), _HUGGING_FACE_LLAMA3, _HUGGING_FACE_LLAMA3.replace("{1,3}", "")}
_BEYOND_WORD = re.compile("[^▁]▁")

Cutter = Callable[[str], tuple[int, int] | None]
"""Of a text: where its first part may end and where the second then begins, as far back as possible; None: nowhere."""


@dataclass(frozen=True)
class LongText:
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


def whole(text: str | LongText) -> str:
    """A text in memory.

    Raises:
        ValueError, OSError, EOFError: as `LongText.pieces`.
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
        if len(rest) >= LONG_BYTES or len(rest) < read - begin:
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


def long_strings(file: BinaryIO, start: int, end: int) -> tuple[bytes, dict[str, LongText]]:
    """Cuts the long strings out of a line of JSON.

    Returns:
        The rest of the line, with a mark inside the quotes of each; the strings by their marks, which are not checked yet.
    """
    name = os.urandom(8).hex()
    kept: list[bytes] = []
    found: dict[str, LongText] = {}
    opened: int | None = None  # inside a string: its first byte
    copied = start
    for place in _quotes(file, start, end):
        if opened is None:
            opened = place + 1
            continue
        if place - opened >= LONG_BYTES // 4:
            mark = f"{name}-{len(found)}"
            kept += [*_pieces(file, copied, opened), mark.encode()]
            found[mark] = LongText(file, opened, place, escaped=True)
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


def segments(pieces: Iterable[str], cut: Cutter) -> Iterator[str]:
    """Texts that, encoded one after another, give the ids of all pieces together."""
    rest = ""
    for piece in pieces:
        rest += piece
        if (place := cut(rest)) is not None:
            yield rest[: place[0]]
            rest = rest[place[1] :]
    if rest:
        yield rest


def cutter_of(tokenizer: Tokenizer) -> Cutter | None:
    """Where this tokenizer's texts may be cut; None: nowhere, as far as is known."""
    if isinstance(tokenizer, NullTokenizer):
        return _before_space
    if isinstance(tokenizer, (HuggingFaceTokenizer, TikTokenizer)):
        return _before_space if splits_before_spaces(tokenizer) else None
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _at_space if words_are_apart(tokenizer.backend) else None
    return None


def _before_space(text: str) -> tuple[int, int] | None:
    place = text.rfind(" ")
    while place > 0:
        if text[place - 1].isalnum():
            return place, place
        place = text.rfind(" ", 0, place)
    return None


def _at_space(text: str) -> tuple[int, int] | None:
    place = text.rfind(" ", 0, max(0, len(text) - 1))
    while place > 0:
        if all(letter.isascii() and letter.isalnum() for letter in (text[place - 1], text[place + 1])):
            return place, place + 1
        place = text.rfind(" ", 0, place)
    return None


def splits_before_spaces(tokenizer: HuggingFaceTokenizer | TikTokenizer) -> bool:
    """Whether this is a byte-level BPE over a known pattern, without tokens that reach over spaces."""
    if isinstance(tokenizer, TikTokenizer):
        return tokenizer.pattern in _KNOWN_PATTERNS
    whole: dict[str, Any] = orjson.loads(tokenizer.backend.to_str())
    if whole["model"].get("type") != "BPE" or whole["normalizer"] is not None:
        return False
    if any(token["lstrip"] or token["rstrip"] or re.search(r"\s", token["content"]) for token in whole["added_tokens"]):
        return False
    before = whole["pre_tokenizer"] or {}
    steps: Sequence[dict[str, Any]] = before.get("pretokenizers", [before])
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return False
    if len(steps) == 1:
        return bool(last.get("use_regex", True))
    split = steps[0]
    known = split.get("type") == "Split" and split.get("behavior") == "Isolated" and not split.get("invert")
    return len(steps) == 2 and not last.get("use_regex", True) and known and split["pattern"].get("Regex") in _KNOWN_PATTERNS


def words_are_apart(backend: Any) -> bool:
    """Whether a SentencePiece model is a BPE that puts a ▁ in front of every text and merges nothing over the beginning of a word."""
    if backend.normalize("a b") != "▁a▁b" or backend.normalize("a") != "▁a":
        return False
    pieces = [backend.id_to_piece(number) for number in range(backend.get_piece_size())]
    scores = [backend.get_score(number) for number in range(backend.get_piece_size())]
    # Merges of a BPE are numbered; a unigram model, which weighs a text as a whole, has logarithms of probabilities.
    return not any(map(_BEYOND_WORD.search, pieces)) and all(score == int(score) for score in scores)
