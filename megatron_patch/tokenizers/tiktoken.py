r"""Tokenizers of tiktoken. In: a file of base64 tokens and ranks, a pattern that splits text, names of special tokens. Out: a tokenizer.

The file has no pattern and no special tokens, so both are given separately. The name of a special token inside a text is encoded as text.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_patch.errors import DataError
from megatron_patch.requirements import how_to_install
from megatron_patch.tokenizers.interface import TokenizerOptions
from megatron_patch.tokenizers.library_errors import LARGEST_ID, MOST_FILE_BYTES, encode_texts, library_errors
from megatron_patch.tokenizers.special_tokens import ROLES, SpecialTokenFiles, choose
from megatron_patch.utils.console import shortened
from megatron_patch.utils.files import read_small, reason
from megatron_patch.utils.registry import lookup

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD, _MARKS, _TAIL = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)
_CL100K = rf"'(?i:[sdmt]|ll|ve|re)|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|\s+$|\s*[\r\n]|\s+(?!\S)|\s"
PATTERNS = {
    "gpt2": _GPT2,
    "cl100k": _CL100K,
    "llama3": rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|{_TAIL}",
    "qwen": rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_MARKS}|{_TAIL}",
    "o200k": _O200K,
    "v1": rf"{_WORD}|\p{{N}}|{_MARKS}|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
        rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
    ),
    **dict.fromkeys(("r50k_base", "p50k_base", "p50k_edit"), _GPT2),
    "cl100k_base": _CL100K,
    **dict.fromkeys(("o200k_base", "o200k_harmony"), _O200K),
}
"""The patterns by name: of GPT-2, GPT-4 (cl100k), Llama 3, Qwen and GPT-4o (o200k); Megatron's (v1, v2); tiktoken's encodings."""
_FOR_DECODING = "llama3"
DEFAULT_SPECIAL = ("<|endoftext|>",)
# Words alone are a name: as an expression they would match nothing but themselves.
_NAME = re.compile(r"[\w.-]+")


@dataclass
class TikTokenizer:
    """A tokenizer of tiktoken, with the regular expression that it splits text by."""

    name: str
    backend: Any
    pattern: str
    vocab_size: int
    eod_id: int | None
    bos_id: int | None
    no_eod: str = ""
    no_bos: str = ""

    def encode_flat(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Returns the token ids of several texts, without special tokens.

        Raises:
            DataError: the library cannot encode a text.
        """
        rows = encode_texts(self.name, self._encode, texts)
        lengths = np.array([len(row) for row in rows], np.int64)
        return np.concatenate([np.empty(0, np.uint32), *rows]).astype(np.uint32), lengths

    def _encode(self, texts: list[str]) -> list[npt.NDArray[np.uint32]]:
        return [self.backend.encode_to_numpy(text, disallowed_special=(), allowed_special=set()) for text in texts]

    def token_text(self, token: int) -> str:
        """Returns the name of a special token, or the text of another."""
        return self.decode([token])

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
        lines = read_small(path, MOST_FILE_BYTES).splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {reason(error)}", "a readable tiktoken file", "check the file") from error
    for number, line in enumerate(lines, start=1):
        try:
            token, rank = line.split() if line.strip() else (b"", b"")
            if token:
                ranks[base64.b64decode(token, validate=True)] = _rank(rank)
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


def _rank(word: bytes) -> int:
    """Returns a rank.

    Raises:
        ValueError: it is no whole number, or no id that a dataset can store.
    """
    if not word.isdigit() or not 0 <= int(word[:20]) <= LARGEST_ID:
        raise ValueError(f"the rank {shortened(repr(word.decode(errors='replace')))} is not a whole number from 0 to {LARGEST_ID}")
    return int(word)


def load_tiktoken(options: TokenizerOptions) -> TikTokenizer:
    """Loads a tiktoken file.

    Without a pattern the tokenizer can only decode. A special token is NAME or NAME=ID; without an id it takes the next free one.

    Raises:
        DataError: tiktoken is not installed, the file or the pattern is invalid, or a special token takes the id of another token.
    """
    model, pattern = options.model, options.tiktoken_pattern
    if model is None:
        raise DataError("TikTokenizer without --tokenizer-model", "a tiktoken file of base64 tokens and ranks", "give --tokenizer-model")
    try:
        import tiktoken
    except ImportError as error:
        raise DataError(
            "TikTokenizer needs tiktoken, which is not installed",
            "an installation with the extra [tiktoken]",
            how_to_install("tiktoken"),
        ) from error
    path = Path(model)
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise DataError(f"--tokenizer-model {model} {what}", "a tiktoken file of base64 tokens and ranks", "check the path")
    ranks = _read_ranks(path)
    special = _special_ids(options.special_tokens or DEFAULT_SPECIAL, ranks)
    expression = _expression(pattern)
    with library_errors(
        f"--tiktoken-pattern {pattern} is not valid",
        f"{', '.join(PATTERNS)}, or a regular expression",
        "give the pattern that the tokenizer was made with",
    ):
        backend = tiktoken.Encoding(path.name, pat_str=expression, mergeable_ranks=ranks, special_tokens=special)
    eod, bos = (choose(role, options, SpecialTokenFiles(), special, special) for role in ROLES)
    size = max([*ranks.values(), *special.values()]) + 1
    return TikTokenizer(model, backend, expression, size, eod.token, bos.token, eod.reason, bos.reason)


def _expression(pattern: str | None) -> str:
    """Returns the regular expression of a pattern, which is the name of a known one or an expression itself.

    Raises:
        DataError: it is a name that is not known.
    """
    if pattern is None:
        return PATTERNS[_FOR_DECODING]
    if not pattern or _NAME.fullmatch(pattern):
        return lookup(PATTERNS, pattern, "--tiktoken-pattern", error=DataError)
    return pattern


def _special_ids(names: Sequence[str], ranks: Mapping[bytes, int]) -> dict[str, int]:
    """Returns the id of each special token, given as NAME or NAME=ID."""
    taken = set(ranks.values())
    found: dict[str, int] = {}
    for word in names:
        name, equals, number = word.rpartition("=")
        if not equals or not (number.isascii() and number.isdigit()):
            name, number = word, str(max(taken) + 1)
        if len(number) > 20 or int(number) > LARGEST_ID:
            raise DataError(f"--special-tokens {shortened(word)}: the id is too large", f"ids up to {LARGEST_ID}", "choose another id")
        if int(number) in taken or name in found:
            raise DataError(
                f"--special-tokens {word}: another token has this id or name", "an id and a name that are free", "choose another id or name"
            )
        found[name] = int(number)
        taken.add(int(number))
    return found
