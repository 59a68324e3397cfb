"""The interface of a tokenizer, and the options that its loader receives.

In: nothing. Out: `Tokenizer`, `TokenizerOptions`, and helpers on them.

No tokenizer adds beginning-of-sequence or end-of-document ids by itself; preprocessing adds them where they are requested.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Flat = tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]
"""The token ids of a batch of texts one after another (uint32), and the number of ids of each text (int64)."""


class Tokenizer(Protocol):
    """A tokenizer, whatever its library.

    Args:
        name: how messages call it: its file, or its type.
        vocab_size: all token ids are below this.
        eod_id: id of the end-of-document token, or None.
        bos_id: id of the beginning-of-sequence token, or None.
    """

    name: str
    vocab_size: int
    eod_id: int | None
    bos_id: int | None

    def encode_flat(self, texts: Sequence[str]) -> Flat:
        """Returns the token ids of several texts, without special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids; bytes that do not form complete characters become U+FFFD."""
        ...


@dataclass(frozen=True)
class TokenizerOptions:
    """What a loader in `TOKENIZERS` is given: the values of the flags, None where a flag is not given.

    Args:
        model: --tokenizer-model, a local file or folder; for NullTokenizer it may be the size of the vocabulary.
        vocab_file: --vocab-file, vocab.json of GPT2BPETokenizer.
        merge_file: --merge-file, merges.txt of GPT2BPETokenizer.
        vocab_size: --vocab-size, for NullTokenizer.
        eod_token: --eod-token, the end-of-document token where the tokenizer does not name it.
        bos_token: --bos-token, the beginning-of-sequence token where the tokenizer does not name it.
        eod_id: the id of the end-of-document token where it is known already, as for data that has been made.
        bos_id: the id of the beginning-of-sequence token where it is known already.
        tiktoken_pattern: --tiktoken-pattern of TikTokenizer, see `tokenizers.tiktoken`.
        special_tokens: --special-tokens of TikTokenizer, see `tokenizers.tiktoken`.
    """

    model: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    vocab_size: int | None = None
    eod_token: str | None = None
    bos_token: str | None = None
    eod_id: int | None = None
    bos_id: int | None = None
    tiktoken_pattern: str | None = None
    special_tokens: Sequence[str] | None = None


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the token ids of one text."""
    return [int(token) for token in tokenizer.encode_flat([text])[0]]


def flatten(rows: Sequence[Sequence[int]]) -> Flat:
    """Returns the token ids of several texts, one list for each, as `Flat`."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    ids = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.uint32, count=int(lengths.sum()))
    return ids, lengths
