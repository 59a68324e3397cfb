"""A tokenizer's memory for words: a text is cut where no token reaches over, and only parts that it has not met are encoded.

In: an encoder, and where its texts may be cut (`Cuts`). Out: an encoder with the same ids. Text repeats its words, so that a look at a
table takes the place of nearly all merging. The table is csrc/cpu/word_memory.cpp; without it there is no memory, and all else works.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from megatron_patch.preprocess.segments import splits_before_spaces, words_are_apart
from megatron_patch.tokenizers.base import Flat, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from megatron_patch.tokenizers.sentencepiece import replaces_spaces_alone
from megatron_patch.tokenizers.tiktoken import TikTokenizer

LIBRARY = Path(__file__).parent.parent / "_words.so"
_MOST_BYTES = 1 << 26  # of a table, before it begins anew: English has some 10^5 words in daily use, each some 80 bytes here

_BEHIND = bytes(8)  # is read along with a text's last bytes
_CLASSES = 129
_STRANGER = "\x01"  # stands in no piece


class Encoder(Protocol):
    """What a memory is put before."""

    def encode_flat(self, texts: Sequence[str]) -> Flat:
        """See `Tokenizer`."""


class Cuts(enum.IntEnum):
    """Where a text may be cut; as in csrc/cpu/word_memory.cpp."""

    BEHIND_ASCII = 0
    """In front of a space behind an ASCII letter or digit: byte-level BPE over a known pattern (see long_texts.py)."""
    BETWEEN_ASCII = 1
    """At a space between ASCII letters or digits: a SentencePiece BPE without pieces that go on behind a word. The part behind gets its ▁
    back in place of the space."""
    BETWEEN_STRANGERS = 2
    """Between characters that stand side by side in no piece, so that no merge reaches over: a SentencePiece BPE that makes ▁ of each
    space, puts one in front and normalizes nothing else, and spells unknown characters in bytes."""


def cuts_of(tokenizer: Tokenizer) -> Cuts | None:
    """Where texts may be cut for this tokenizer; None: nowhere, as far as is known."""
    if isinstance(tokenizer, (HuggingFaceTokenizer, TikTokenizer)):
        return Cuts.BEHIND_ASCII if splits_before_spaces(tokenizer) else None
    if isinstance(tokenizer, SentencePieceTokenizer) and words_are_apart(tokenizer.backend):
        backend = tokenizer.backend
        # Unknown characters that are not spelled become one id with their neighbours.
        numbers = range(backend.get_piece_size())
        in_bytes = any(map(backend.is_byte, numbers)) and not any(_STRANGER in backend.id_to_piece(number) for number in numbers)
        return Cuts.BETWEEN_STRANGERS if in_bytes and replaces_spaces_alone(backend) else Cuts.BETWEEN_ASCII
    return None


def neighbours(pieces: Iterable[str]) -> npt.NDArray[np.uint8]:
    """[129, 129]: 1 where a character of one class stands in front of one of another in a piece; classes are ASCII and all else."""
    table = np.zeros((_CLASSES, _CLASSES), np.uint8)
    for piece in pieces:
        classes = [min(ord(letter), _CLASSES - 1) for letter in piece.replace("▁", " ")]
        for pair in itertools.pairwise(classes):
            table[pair] = 1
    return table


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled table; None where it was not built."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("new", pointer, (ctypes.c_int32, pointer, ctypes.c_uint64)),
        ("delete", None, (pointer,)),
        ("scan", number, (pointer, ctypes.c_char_p, pointer, number)),
        ("new_bytes", number, (pointer,)),
        ("new_parts", None, (pointer, pointer, pointer)),
        ("learn", None, (pointer, pointer, pointer)),
        ("lengths", number, (pointer, pointer)),
        ("write", None, (pointer, pointer)),
        ("forget", None, (pointer,)),
    ):
        function = getattr(library, f"word_memory_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def is_built() -> bool:
    """Whether there is a compiled table."""
    return _library() is not None


class WordCache:
    """An encoder that encodes each word once.

    Args:
        tokenizer: whose ids it gives.
        encoder: what encodes words; the tokenizer, or what gives its ids.
        cuts: where parts begin.
        name: of both, for summaries.
        most_bytes: of the table, after which it begins anew; texts of one call may take it beyond.

    Raises:
        OSError: the table was not compiled.
    """

    def __init__(self, tokenizer: Tokenizer, encoder: Encoder, cuts: Cuts, name: str = "words", most_bytes: int = _MOST_BYTES) -> None:
        library = _library()
        if library is None:
            raise OSError(f"{LIBRARY} does not load")
        self.name = name
        self._encoder, self._library = encoder, library
        # Put in front of a text, which then is cut anywhere; and of a part, whose own ids follow those of this.
        self._front, self._stranger, self._stranger_ids = b"", "", 0
        table = None
        if cuts == Cuts.BETWEEN_STRANGERS:
            backend = cast("SentencePieceTokenizer", tokenizer).backend
            pieces = [backend.id_to_piece(number) for number in range(backend.get_piece_size()) if not backend.is_byte(number)]
            table = neighbours(pieces)
            self._front, self._stranger = b" ", _STRANGER
            self._stranger_ids = int(encoder.encode_flat([_STRANGER])[1][0])
        self._memory = ctypes.c_void_p(library.word_memory_new(cuts, None if table is None else _address(table), most_bytes))

    def __del__(self) -> None:
        if getattr(self, "_memory", None):
            self._library.word_memory_delete(self._memory)

    def encode_flat(self, texts: Sequence[str]) -> Flat:
        """See `Tokenizer`."""
        library, memory, front = self._library, self._memory, self._front
        encoded = [front + text.encode() if text else b"" for text in texts] if front else [text.encode() for text in texts]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        count = library.word_memory_scan(memory, b"".join([*encoded, _BEHIND]), _address(ends), ends.size)
        if count:
            try:
                self._learn(count)
            except BaseException:
                library.word_memory_forget(memory)  # of words that it has no ids for
                raise
        lengths = np.empty(ends.size, np.int64)
        ids = np.empty(library.word_memory_lengths(memory, _address(lengths)), np.uint32)
        library.word_memory_write(memory, _address(ids))
        return ids, lengths

    def _learn(self, count: int) -> None:
        """Encodes what is new."""
        parts, ends = np.empty(self._library.word_memory_new_bytes(self._memory), np.uint8), np.empty(count, np.int64)
        self._library.word_memory_new_parts(self._memory, _address(parts), _address(ends))
        whole, starts = parts.tobytes(), [0, *ends.tolist()]
        ids, lengths = self._encoder.encode_flat([self._stranger + whole[start:end].decode() for start, end in itertools.pairwise(starts)])
        lengths = np.ascontiguousarray(lengths, np.int64)
        if self._stranger_ids:
            own = np.ones(ids.size, bool)
            own[(np.cumsum(lengths) - lengths)[:, None] + np.arange(self._stranger_ids)] = False
            ids, lengths = ids[own], lengths - self._stranger_ids
        ids = np.ascontiguousarray(ids, np.uint32)
        self._library.word_memory_learn(self._memory, _address(ids), _address(lengths))


class Warming:
    """The reference, until it has encoded so much that loading something faster pays.

    Args:
        reference: encodes at first.
        make: gives what then encodes in its place, or None.
        most_bytes: that the reference encodes.
    """

    def __init__(self, reference: Encoder, make: Callable[[], Encoder | None], most_bytes: int) -> None:
        self._encoder, self._make, self._left = reference, make, most_bytes

    def encode_flat(self, texts: Sequence[str]) -> Flat:
        """See `Tokenizer`."""
        if self._left > 0:
            self._left -= sum(map(len, texts))
            if self._left <= 0:
                self._encoder = self._make() or self._encoder
        return self._encoder.encode_flat(texts)


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.ctypes.data)
