"""Where a long text may be cut, so that its parts, encoded one after another, give the ids of the whole:

- Byte-level BPE: text is first split by a pattern, and merges happen inside of what it matches. In the patterns that are known here
  nothing that ends in a letter or a digit goes on with a space, and what follows does not look back.
- SentencePiece's BPE: no piece has a ▁ behind anything but ▁, so no merge reaches over the beginning of a word. The space in front of
  the second part is left out, since every text gets one.

Tokenizers that are neither get long texts as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import orjson

from megatron_patch.tokenizers.base import HuggingFaceTokenizer, NullTokenizer, SentencePieceTokenizer, Tokenizer
from megatron_patch.tokenizers.tiktoken import PATTERNS, TikTokenizer

_HUGGING_FACE_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KNOWN_PATTERNS = {*PATTERNS.values(), _HUGGING_FACE_LLAMA3, _HUGGING_FACE_LLAMA3.replace("{1,3}", "")}
_BEYOND_WORD = re.compile("[^▁]▁")

Cutter = Callable[[str], tuple[int, int] | None]
"""Of a text: where its first part may end and where the second then begins, as far back as possible; None: nowhere."""


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
