"""Converts a tiktoken tokenizer to a tokenizer.json, which transformers and vLLM read.

In: the encoder, whose file has the ranks of tokens but no merges. Out: the same byte-level BPE as a tokenizer of the library `tokenizers`.
The merge of a token is found by encoding its bytes with the lower ranks; a token that is not the merge of two others is only matched as a
complete word, as tiktoken does.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

from megatron_patch.tokenizers.byte_level import byte_letters
from megatron_patch.tokenizers.tiktoken import TikTokenizer

_END = re.compile(r"(?<!\\)\$(?![^\[]*\])")
"""Matches an unescaped $ of a pattern outside of a character class."""


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Returns the parts of a token after all merges of lower rank: two for a token that is a merge."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [(ranks.get(a + b, ranks[token]), place) for place, (a, b) in enumerate(itertools.pairwise(parts))]
        rank, place = min(pairs)
        if rank >= ranks[token]:
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def tokenizer_json(tokenizer: TikTokenizer) -> Any:
    """Returns the same tokenizer, as a tokenizer of the library `tokenizers`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = byte_letters()

    def name(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    ranks = {token: tokenizer.backend.encode_single_token(token) for token in tokenizer.backend.token_byte_values()}
    tokens = sorted(ranks, key=lambda token: ranks[token])
    halves = [_halves(token, ranks) for token in tokens if len(token) > 1]
    merges = [(name(parts[0]), name(parts[1])) for parts in halves if len(parts) == 2]
    special = {word: tokenizer.backend.encode_single_token(word) for word in tokenizer.backend.special_tokens_set}
    # Special tokens get their ids from the vocabulary; added tokens would get the next free ids.
    vocabulary = {name(token): ranks[token] for token in tokens} | special
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    # In the regular expressions of `tokenizers`, $ matches the end of every line.
    split = pre_tokenizers.Split(Regex(_END.sub(r"\\z", tokenizer.pattern)), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return backend
