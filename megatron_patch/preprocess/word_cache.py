"""Encodes each word once, for SentencePiece BPE: a text is split where no merge reaches across, and only new parts are encoded.

In: a SentencePiece tokenizer. Out: an encoder with the same ids. Text repeats its words, so that a lookup replaces nearly all merging. On
10 MB of web-sized documents Mistral's 32k model takes 1.7 times the CPU time with fastokens, and 10 times with SentencePiece itself. For
byte-level BPE fastokens is faster by far, and this is not used (benchmarks/results/preprocess_encoders-cpu-2026-11-30.json). The table is
csrc/cpu/word_cache.cpp. Without a C++ compiler there is no cache, and fastokens encodes.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_patch.preprocess.segments import merges_stay_in_words
from megatron_patch.tokenizers.base import Flat, SentencePieceTokenizer, Tokenizer
from megatron_patch.tokenizers.sentencepiece import replaces_spaces_alone

LIBRARY = Path(__file__).parent.parent / "_words.so"
_MAX_BYTES = 1 << 26  # of the table, before it is cleared: English has about 10^5 words in daily use, of about 80 bytes here

_PADDING = bytes(8)  # is read together with the last bytes of the texts
_CLASSES = 129
_SEPARATOR = "\ue000"  # of the private use area: no piece may contain it


def supports(tokenizer: Tokenizer) -> bool:
    """Returns whether texts of a tokenizer may be split into parts that are encoded separately.

    That holds for a SentencePiece BPE that writes ▁ for each space, puts one before each text, normalizes nothing else, and encodes unknown
    characters as bytes (otherwise neighboring unknown characters would become one id).
    """
    if not isinstance(tokenizer, SentencePieceTokenizer) or not merges_stay_in_words(tokenizer.backend):
        return False
    backend = tokenizer.backend
    ids = range(backend.get_piece_size())
    in_bytes = any(map(backend.is_byte, ids)) and not any(_SEPARATOR in backend.id_to_piece(index) for index in ids)
    return in_bytes and replaces_spaces_alone(backend)


def adjacent_classes(pieces: Iterable[str]) -> npt.NDArray[np.uint8]:
    """Returns uint8 [129, 129]: 1 if a character of one class is followed by one of another in a piece. Classes are the ASCII characters,
    and one class of all others.
    """
    table = np.zeros((_CLASSES, _CLASSES), np.uint8)
    for piece in pieces:
        classes = [min(ord(letter), _CLASSES - 1) for letter in piece.replace("▁", " ")]
        for pair in itertools.pairwise(classes):
            table[pair] = 1
    return table


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Loads the compiled table; None if it was not built."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("new", pointer, (pointer, ctypes.c_uint64)),
        ("delete", None, (pointer,)),
        ("scan", number, (pointer, ctypes.c_char_p, pointer, number)),
        ("new_bytes", number, (pointer,)),
        ("new_parts", None, (pointer, pointer, pointer)),
        ("learn", None, (pointer, pointer, pointer)),
        ("lengths", number, (pointer, pointer)),
        ("write", None, (pointer, pointer)),
        ("clear", None, (pointer,)),
    ):
        function = getattr(library, f"word_cache_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def is_built() -> bool:
    """Returns whether the compiled table can be loaded."""
    return _library() is not None


class WordCache:
    """Encodes with a SentencePiece tokenizer, each part of a text once.

    Args:
        tokenizer: a tokenizer that `supports` accepts.
        max_bytes: size of the table at which it is cleared. The texts of one call may exceed it.

    Raises:
        OSError: the table was not compiled.
    """

    name = "words"

    def __init__(self, tokenizer: SentencePieceTokenizer, max_bytes: int = _MAX_BYTES) -> None:
        library = _library()
        if library is None:
            raise OSError(f"{LIBRARY} cannot be loaded")
        self._tokenizer, self._library = tokenizer, library
        backend = tokenizer.backend
        ids = range(backend.get_piece_size())
        table = adjacent_classes(backend.id_to_piece(index) for index in ids if not backend.is_byte(index))
        # A new part is encoded after a separator, which takes the ▁ that SentencePiece puts before each text; its ids are removed.
        self._separator_ids = int(tokenizer.encode_flat([_SEPARATOR])[1][0])
        self._cache = ctypes.c_void_p(library.word_cache_new(_address(table), max_bytes))

    def __del__(self) -> None:
        if getattr(self, "_cache", None):
            self._library.word_cache_delete(self._cache)

    def encode_flat(self, texts: Sequence[str]) -> Flat:
        """Encodes many texts; see `Tokenizer.encode_flat`."""
        library, cache = self._library, self._cache
        encoded = [b" " + text.encode() if text else b"" for text in texts]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        count = library.word_cache_scan(cache, b"".join([*encoded, _PADDING]), _address(ends), ends.size)
        if count:
            try:
                self._learn(count)
            except BaseException:
                library.word_cache_clear(cache)  # it holds words without ids
                raise
        lengths = np.empty(ends.size, np.int64)
        ids = np.empty(library.word_cache_lengths(cache, _address(lengths)), np.uint32)
        library.word_cache_write(cache, _address(ids))
        return ids, lengths

    def _learn(self, count: int) -> None:
        """Encodes the new parts, and stores their ids."""
        parts, ends = np.empty(self._library.word_cache_new_bytes(self._cache), np.uint8), np.empty(count, np.int64)
        self._library.word_cache_new_parts(self._cache, _address(parts), _address(ends))
        data, bounds = parts.tobytes(), [0, *ends.tolist()]
        ids, lengths = self._tokenizer.encode_flat([_SEPARATOR + data[start:end].decode() for start, end in itertools.pairwise(bounds)])
        kept = np.ones(ids.size, bool)
        kept[(np.cumsum(lengths) - lengths)[:, None] + np.arange(self._separator_ids)] = False
        ids, lengths = np.ascontiguousarray(ids[kept], np.uint32), np.ascontiguousarray(lengths - self._separator_ids, np.int64)
        self._library.word_cache_learn(self._cache, _address(ids), _address(lengths))


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.ctypes.data)
