"""A tokenizer's memory for words: a text is cut where no token reaches over, and only parts that it has not met are encoded.

In: an encoder, and where its texts may be cut (`Cuts`). Out: an encoder with the same ids. Text repeats its words, so that a look at a
table takes the place of nearly all merging. The table is csrc/cpu/word_memory.cpp; without it there is no memory, and all else works.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_patch.data.preprocess.long_texts import splits_before_spaces, words_are_apart
from megatron_patch.sentencepiece_files import replaces_spaces_alone
from megatron_patch.tiktoken_files import TikTokenizer
from megatron_patch.tokenizer import Flat, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

LIBRARY = Path(__file__).parent.parent.parent / "_words.so"
_MOST_BYTES = 1 << 26  # of a table, before it begins anew: English has some 10^5 words in daily use, each some 80 bytes here

_BEHIND = bytes(8)  # is read along with a text's last bytes


class Encoder(Protocol):
    """What a memory is put before."""

    def encode_flat(self, texts: Sequence[str]) -> Flat:
        """See `Tokenizer`."""


class Cuts(enum.IntEnum):
    """In front of which spaces a text may be cut; as in csrc/cpu/word_memory.cpp."""

    BEHIND_ASCII = 0
    """Behind ASCII letters and digits: byte-level BPE over a known pattern (see long_texts.py). The part behind keeps the space."""
    BEFORE_WORDS = 1
    """Behind anything but a space or ▁: a SentencePiece BPE without pieces that go on behind a word, whose normalization makes ▁ of each
    space, puts one in front, and does nothing else. Merges are then those of the parts, which get their ▁ back in place of the space."""
    BETWEEN_ASCII = 2
    """Between ASCII letters and digits: the same with another normalization, which leaves those alone."""


def cuts_of(tokenizer: Tokenizer) -> Cuts | None:
    """Where texts may be cut for this tokenizer; None: nowhere, as far as is known."""
    if isinstance(tokenizer, (HuggingFaceTokenizer, TikTokenizer)):
        return Cuts.BEHIND_ASCII if splits_before_spaces(tokenizer) else None
    if isinstance(tokenizer, SentencePieceTokenizer) and words_are_apart(tokenizer.backend):
        # Neighbouring unknown pieces become one, which they must not do over a cut.
        mark_is_known = tokenizer.backend.piece_to_id("▁") != tokenizer.backend.unk_id()
        return Cuts.BEFORE_WORDS if mark_is_known and replaces_spaces_alone(tokenizer.backend) else Cuts.BETWEEN_ASCII
    return None


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled table; None where it was not built."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("new", pointer, (ctypes.c_int32, ctypes.c_uint64)),
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


class WordMemory:
    """An encoder that encodes each word once.

    Args:
        encoder: with the same ids for a text and for its parts one after another.
        cuts: where parts begin.
        name: of both, for summaries.
        most_bytes: of the table, after which it begins anew; texts of one call may take it beyond.

    Raises:
        OSError: the table was not compiled.
    """

    def __init__(self, encoder: Encoder, cuts: Cuts, name: str = "words", most_bytes: int = _MOST_BYTES) -> None:
        library = _library()
        if library is None:
            raise OSError(f"{LIBRARY} does not load")
        self.name = name
        self._encoder, self._library = encoder, library
        self._memory = ctypes.c_void_p(library.word_memory_new(cuts, most_bytes))

    def __del__(self) -> None:
        if getattr(self, "_memory", None):
            self._library.word_memory_delete(self._memory)

    def encode_flat(self, texts: Sequence[str]) -> Flat:
        """See `Tokenizer`."""
        library, memory = self._library, self._memory
        encoded = [text.encode() for text in texts]
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
        ids, lengths = self._encoder.encode_flat([whole[start:end].decode() for start, end in itertools.pairwise(starts)])
        ids, lengths = np.ascontiguousarray(ids, np.uint32), np.ascontiguousarray(lengths, np.int64)
        self._library.word_memory_learn(self._memory, _address(ids), _address(lengths))


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.ctypes.data)
