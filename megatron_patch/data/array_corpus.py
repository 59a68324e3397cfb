"""Tokens in memory, or in a memory-mapped file of one's own, as a corpus. In: an array. Out: what a stream reads from."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_patch.data.corpus import split_ranges
from megatron_patch.data.dataset_metadata import DatasetMetadata
from megatron_patch.errors import DataError

_SPAN_TOKENS = 4096
_SPANS = 64


class ArrayCorpus:
    """A corpus of token ids in an array.

    Args:
        tokens: whole numbers from 0, [N]; nothing is copied.

    Raises:
        DataError: it has another number of dimensions, or no whole numbers.
    """

    prefixes: tuple[str, ...] = ()
    patch_align = 1
    metadata: tuple[DatasetMetadata | None, ...] = ()
    name = "the array"

    def __init__(self, tokens: npt.NDArray[Any]) -> None:
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise DataError(f"tokens are an array of {tokens.dtype} {list(tokens.shape)}", "whole numbers [N]", "give one row of token ids")
        self._tokens = tokens
        self.num_tokens = int(tokens.size)

    def ranges(self, split: str) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Returns the token ranges for training, validation and test.

        Raises:
            ConfigError: see `split_ranges`.
        """
        return split_ranges(self.num_tokens, split)

    def read_into(self, out: npt.NDArray[np.int64], start: int) -> None:
        """Copies tokens `[start, start + out.size)` into an array.

        Raises:
            DataError: the range is outside the corpus.
        """
        if start < 0 or start + out.size > self.num_tokens:
            raise DataError(f"tokens {start} to {start + out.size} of {self.name}", f"0 to {self.num_tokens}", "read another range")
        out[:] = self._tokens[start : start + out.size]

    def fetch(self, starts: npt.NDArray[np.int64], count: int) -> None:
        """Does nothing: the tokens are here."""

    def fingerprint(self) -> list[dict[str, object]]:
        """Returns, in constant time, the number of tokens and a checksum of sampled spans."""
        digest = xxhash.xxh64()
        for number in range(_SPANS):
            start = max(0, self.num_tokens - _SPAN_TOKENS) * number // (_SPANS - 1)
            digest.update(np.ascontiguousarray(self._tokens[start : start + _SPAN_TOKENS]).tobytes())
        return [{"dtype": str(self._tokens.dtype), "tokens": self.num_tokens, "sampled": digest.hexdigest()}]
