"""Splits a large text into segments whose ids, one after another, are the ids of the text.

It lets a .txt file of gigabytes be encoded without holding it in memory (see raw_text/large_documents.py for what that saves). Two kinds
of tokenizers allow it:

- Byte-level BPE first splits text by a pattern, and merges within each match. In the patterns known here no match contains a letter
  or a digit that is followed by a space, and later matches do not depend on the text before. NFC normalization, which Qwen uses, never
  combines a space with the character before it (Unicode Standard Annex 15: a space is a starter and part of no composition).
- SentencePiece's BPE: in every piece, ▁ occurs only at the start, so no merge crosses the start of a word. The space before the
  second segment is left out, because SentencePiece puts one before every text.

For any other tokenizer a large text is encoded as one string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from megatron_patch.tokenizers.base import HuggingFaceTokenizer, NullTokenizer, SentencePieceTokenizer, Tokenizer
from megatron_patch.tokenizers.tiktoken import PATTERNS, TikTokenizer

_HUGGING_FACE_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KNOWN_PATTERNS = {*PATTERNS.values(), _HUGGING_FACE_LLAMA3, _HUGGING_FACE_LLAMA3.replace("{1,3}", "")}
_CROSSES_WORDS = re.compile("[^▁]▁")

SplitPoint = Callable[[str], tuple[int, int] | None]
"""For a text: where its first segment may end and where the next one then starts, as late as possible; None: it cannot be split."""


def segments(pieces: Iterable[str], split_point: SplitPoint) -> Iterator[str]:
    """Yields segments of a text, which is given in pieces: the ids of the segments, one after another, are the ids of the text."""
    rest = ""
    for piece in pieces:
        rest += piece
        if (found := split_point(rest)) is not None:
            yield rest[: found[0]]
            rest = rest[found[1] :]
    if rest:
        yield rest


def split_point_of(tokenizer: Tokenizer) -> SplitPoint | None:
    """Returns the function that finds where texts may be split for a tokenizer; None: they may not, or it is not known."""
    if isinstance(tokenizer, NullTokenizer):
        return _before_space
    if isinstance(tokenizer, (HuggingFaceTokenizer, TikTokenizer)):
        return _before_space if _splits_before_spaces(tokenizer) else None
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _at_space if merges_stay_in_words(tokenizer.backend) else None
    return None


def _before_space(text: str) -> tuple[int, int] | None:
    index = text.rfind(" ")
    while index > 0:
        if text[index - 1].isalnum():
            return index, index
        index = text.rfind(" ", 0, index)
    return None


def _at_space(text: str) -> tuple[int, int] | None:
    index = text.rfind(" ", 0, max(0, len(text) - 1))
    while index > 0:
        if all(letter.isascii() and letter.isalnum() for letter in (text[index - 1], text[index + 1])):
            return index, index + 1
        index = text.rfind(" ", 0, index)
    return None


def _splits_before_spaces(tokenizer: HuggingFaceTokenizer | TikTokenizer) -> bool:
    """Returns whether this is a byte-level BPE over a known pattern, without special tokens that match white space."""
    if isinstance(tokenizer, TikTokenizer):
        return has_known_pattern(tokenizer)
    backend = tokenizer.backend
    normalizer = json.loads(backend.normalizer.__getstate__()) if backend.normalizer is not None else None
    if type(backend.model).__name__ != "BPE" or normalizer not in (None, {"type": "NFC"}):
        return False
    tokens = backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip or re.search(r"\s", token.content) for token in tokens):
        return False
    return has_known_pattern(tokenizer)


def has_known_pattern(tokenizer: Tokenizer) -> bool:
    """Returns whether a tokenizer splits text by a pattern that is known here, or, as those of SentencePiece, by none."""
    if isinstance(tokenizer, TikTokenizer):
        return tokenizer.pattern in _KNOWN_PATTERNS
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return True
    own = tokenizer.backend.pre_tokenizer
    pre_tokenizer: dict[str, Any] = json.loads(own.__getstate__()) if own is not None else {}
    steps: Sequence[dict[str, Any]] = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return False
    if len(steps) == 1:
        return bool(last.get("use_regex", True))
    split = steps[0]
    known = split.get("type") == "Split" and split.get("behavior") == "Isolated" and not split.get("invert")
    return len(steps) == 2 and not last.get("use_regex", True) and known and split["pattern"].get("Regex") in _KNOWN_PATTERNS


def merges_stay_in_words(backend: Any) -> bool:
    """Returns whether a SentencePiece model is a BPE that puts a ▁ before every text and whose merges never cross the start of a word."""
    if backend.normalize("a b") != "▁a▁b" or backend.normalize("a") != "▁a":
        return False
    pieces = [backend.id_to_piece(number) for number in range(backend.get_piece_size())]
    scores = [backend.get_score(number) for number in range(backend.get_piece_size())]
    # The scores of a BPE number its merges; those of a unigram model, which optimizes over the full text, are log-probabilities.
    return not any(map(_CROSSES_WORDS.search, pieces)) and all(score == int(score) for score in scores)
