"""Counts the bytes that ids stand for, so that no document can lose text unseen. In: texts and their ids. Out: which texts have lost bytes.

The ids of tiktoken, and of a byte-level tokenizer.json without a normalizer, stand for bytes of the text: each byte is kept or lost, and
none is added. A table of each token's bytes tells whether all are kept, at about a nanosecond a token. For a tokenizer.json white space
does not count: its steps may remove it, put it before a text, or let an added token take it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from megatron_patch.tokenizers.base import HuggingFaceTokenizer, Tokenizer
from megatron_patch.tokenizers.byte_level import byte_letters
from megatron_patch.tokenizers.tiktoken import TikTokenizer

_SPACES = bytes(byte for byte in range(128) if chr(byte).isspace())
_OTHER_SPACE = re.compile(r"[^\S\x00-\x7f]")
_MOST_IDS_OF_TABLE = 1 << 24  # larger ids are looked up by bisection
# Steps before the model that split text, and may leave parts out, but add nothing except white space.
_SPLITTING = {
    *("BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "FixedLength", "Punctuation", "Split", "UnicodeScripts"),
    *("Whitespace", "WhitespaceSplit"),
}


class ByteCounts:
    """Counts the bytes of texts and of their ids.

    Args:
        every: bytes of each token by its id (of those that no text has, any number); None where white space may be added to a text.
        others: returns the same without white space, when a text has lost bytes; None where losing white space is a loss.
    """

    def __init__(self, every: Mapping[int, int] | None, others: Callable[[], Mapping[int, int]] | None) -> None:
        self._every = None if every is None else _Sizes(every, _size)
        self._make_others = others

    @functools.cached_property
    def _others(self) -> _Sizes | None:
        return None if self._make_others is None else _Sizes(self._make_others(), _size_without_spaces)

    def lost(self, texts: Sequence[str], ids: npt.NDArray[np.uint32], lengths: npt.NDArray[np.int64]) -> dict[int, int]:
        """Returns the texts that have lost bytes.

        Args:
            texts: the texts.
            ids: their ids, one after another.
            lengths: int64, the number of ids of each text.

        Returns:
            The number of bytes lost, by the text's index.
        """
        # Counting all bytes takes a quarter of the time, and is enough where none is lost.
        found = {} if self._every is None else self._every.lost(texts, ids, lengths)
        if (self._every is not None and not found) or self._others is None:
            return found
        return self._others.lost(texts, ids, lengths)


class _Sizes:
    """The bytes of each token, and how those of a text are counted."""

    def __init__(self, sizes: Mapping[int, int], size: Callable[[str], int]) -> None:
        self._size = size
        ids, values = np.array(sorted(sizes.items()), np.int64).T
        self._ids = ids if ids[-1] >= _MOST_IDS_OF_TABLE else None
        self._sizes = values.astype(np.int32)
        if self._ids is None:
            self._sizes = np.zeros(int(ids[-1]) + 1, np.int32)
            self._sizes[ids] = values

    def lost(self, texts: Sequence[str], ids: npt.NDArray[np.uint32], lengths: npt.NDArray[np.int64]) -> dict[int, int]:
        """See `ByteCounts.lost`."""
        expected = np.fromiter(map(self._size, texts), np.int64, len(texts))
        sizes = np.take(self._sizes, ids if self._ids is None else np.searchsorted(self._ids, ids), mode="clip")
        if int(expected.sum()) == int(sizes.sum(dtype=np.int64)):
            return {}
        sums = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        ends = np.cumsum(lengths)
        missing = expected - (sums[ends] - sums[ends - lengths])
        return {index: int(missing[index]) for index in np.flatnonzero(missing).tolist()}


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _size_without_spaces(text: str) -> int:
    return len(text.encode().translate(None, _SPACES))


def may_be_spaces(text: str, count: int) -> bool:
    """Returns whether so many lost bytes of a text may be white space that `ByteCounts` counts: that outside of ASCII."""
    return sum(len(space.encode()) for space in _OTHER_SPACE.findall(text)) >= count


def make_byte_counts(tokenizer: Tokenizer) -> ByteCounts | None:
    """Returns what counts the bytes of a tokenizer's ids; None where its ids do not stand for the bytes of a text."""
    if isinstance(tokenizer, TikTokenizer):
        backend = tokenizer.backend
        return ByteCounts({backend.encode_single_token(token): len(token) for token in backend.token_byte_values()}, None)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _counts_of_json(tokenizer.backend)
    return None


def _counts_of_json(backend: Any) -> ByteCounts | None:
    """Returns what counts the bytes of a byte-level tokenizer.json; None where those of a token are not known exactly."""
    model, own = backend.model, backend.pre_tokenizer
    if backend.normalizer is not None or own is None or type(model).__name__ != "BPE":
        return None
    steps = _steps(orjson.loads(own.__getstate__()))
    if not {str(step["type"]) for step in steps} <= _SPLITTING or sum(step["type"] == "ByteLevel" for step in steps) != 1:
        return None
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    vocabulary, letters = backend.get_vocab(with_added_tokens=False), byte_letters()
    stand_in = model.byte_fallback or (model.unk_token is not None and backend.token_to_id(model.unk_token) is not None)
    if stand_in and not all(letter in vocabulary for letter in letters):
        return None
    added = {number: token.content for number, token in backend.get_added_tokens_decoder().items()}
    # The id of such a token may stand for its own text, or for the bytes that its letters stand for.
    if any(not text.isascii() and text in vocabulary and set(text) <= set(letters) for text in added.values()):
        return None
    without_spaces = str.maketrans("", "", "".join(letters[byte] for byte in _SPACES))

    def others() -> dict[int, int]:
        sizes = {number: len(piece.translate(without_spaces)) for piece, number in backend.get_vocab(with_added_tokens=False).items()}
        return sizes | {number: _size_without_spaces(text) for number, text in added.items()}

    if any(step.get("add_prefix_space") for step in steps):
        return ByteCounts(None, others)
    every = {number: len(piece) for piece, number in vocabulary.items()}
    return ByteCounts(every | {number: _size(text) for number, text in added.items()}, others)


def _steps(pre_tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the steps before the model, one after another."""
    if pre_tokenizer["type"] == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in _steps(part)]
    return [pre_tokenizer]
