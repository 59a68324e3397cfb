r"""Tokenizers of tiktoken. In: a file of base64 tokens and ranks, a pattern that splits text, names of special tokens. Out: a tokenizer.

The file has no pattern and no special tokens, so both are given separately. The name of a special token inside a text is encoded as text.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_patch.errors import DataError
from megatron_patch.tokenizers.interface import TokenizerOptions

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD, _MARKS, _TAIL = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": rf"'(?i:[sdmt]|ll|ve|re)|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|\s+$|\s*[\r\n]|\s+(?!\S)|\s",
    "llama3": rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|{_TAIL}",
    "qwen": rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_MARKS}|{_TAIL}",
    "o200k": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
    ),
}
"""The patterns by name: of GPT-2, GPT-4 (cl100k), Llama 3, Qwen and GPT-4o (o200k)."""
_FOR_DECODING = "llama3"
DEFAULT_SPECIAL = ("<|endoftext|>",)
_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>")
_EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


@dataclass
class TikTokenizer:
    """A tokenizer of tiktoken, with the regular expression that it splits text by."""

    name: str
    backend: Any
    pattern: str
    vocab_size: int
    eod_id: int | None
    bos_id: int | None

    def encode_flat(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Returns the token ids of several texts, without special tokens."""
        rows = [self.backend.encode_to_numpy(text, disallowed_special=(), allowed_special=set()) for text in texts]
        lengths = np.array([len(row) for row in rows], np.int64)
        return np.concatenate([np.empty(0, np.uint32), *rows]).astype(np.uint32), lengths

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids; ids without a token become <ID>."""
        pieces = []
        for token in ids:
            try:
                pieces.append(self.backend.decode_single_token_bytes(int(token)))
            except KeyError:
                pieces.append(f"<{int(token)}>".encode())
        return b"".join(pieces).decode("utf-8", errors="replace")


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Returns the rank of each token of a tiktoken file; a rank is the token's id."""
    ranks: dict[bytes, int] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "a readable tiktoken file", "check its permissions") from error
    for number, line in enumerate(lines, start=1):
        try:
            token, rank = line.split() if line.strip() else (b"", b"")
            if token:
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(
                f"{path} is not a tiktoken file: line {number}: {error}",
                "lines of a base64 token and its rank",
                "give another --tokenizer-model",
            ) from error
    if len(set(ranks.values())) < len(ranks) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise DataError(
            f"{path} is not a tiktoken file: ranks repeat, or single bytes are missing",
            "all 256 single bytes, and a different rank for each token",
            "give another --tokenizer-model",
        )
    return ranks


def load_tiktoken(options: TokenizerOptions) -> TikTokenizer:
    """Loads a tiktoken file.

    Without a pattern the tokenizer can only decode. A special token is NAME or NAME=ID; without an id it takes the next free one.

    Raises:
        DataError: tiktoken is not installed, the file or the pattern is invalid, or a special token takes the id of another token.
    """
    model, eod_token, pattern = options.model, options.eod_token, options.tiktoken_pattern
    if model is None:
        raise DataError("TikTokenizer without --tokenizer-model", "a tiktoken file of base64 tokens and ranks", "give --tokenizer-model")
    try:
        import tiktoken
    except ImportError as error:
        raise DataError(
            "TikTokenizer needs the package tiktoken, which is not installed",
            "an environment with tiktoken",
            "pip install 'megatron_patch[tiktoken]'",
        ) from error
    path = Path(model)
    if not path.is_file():
        raise DataError(f"--tokenizer-model {model} does not exist", "a tiktoken file of base64 tokens and ranks", "check the path")
    ranks = _read_ranks(path)
    special = _special_ids(options.special_tokens or DEFAULT_SPECIAL, ranks)
    expression = PATTERNS.get(pattern or _FOR_DECODING, pattern or "")
    try:
        backend = tiktoken.Encoding(path.name, pat_str=expression, mergeable_ranks=ranks, special_tokens=special)
    except ValueError as error:
        raise DataError(
            f"--tiktoken-pattern {pattern} is not valid: {error}",
            f"{', '.join(PATTERNS)}, or a regular expression",
            "give the pattern that the tokenizer was made with",
        ) from error
    if eod_token is not None and eod_token not in special:
        raise DataError(f"--eod-token {eod_token} is not in the vocabulary", f"a special token: {', '.join(special)}", "check its spelling")
    names = (eod_token,) if eod_token is not None else _EOD_NAMES
    eod = next((special[name] for name in names if name in special), None)
    bos = next((special[name] for name in _BOS_NAMES if name in special), None)
    return TikTokenizer(model, backend, expression, max([*ranks.values(), *special.values()]) + 1, eod, bos)


def _special_ids(names: Sequence[str], ranks: Mapping[bytes, int]) -> dict[str, int]:
    """Returns the id of each special token, given as NAME or NAME=ID."""
    taken = set(ranks.values())
    found: dict[str, int] = {}
    for word in names:
        name, equals, number = word.rpartition("=")
        if not equals or not number.isdigit():
            name, number = word, str(max(taken) + 1)
        if int(number) in taken or name in found:
            raise DataError(
                f"--special-tokens {word}: another token has this id or name", "an id and a name that are free", "choose another id or name"
            )
        found[name] = int(number)
        taken.add(int(number))
    return found
