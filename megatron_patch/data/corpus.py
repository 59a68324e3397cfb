"""One corpus: the shards of a dataset as one array of tokens.

In: dataset prefixes. Out: any span of tokens, and a fingerprint of the data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_patch.data.dataset_metadata import DatasetMetadata, check_compatible, read_metadata
from megatron_patch.data.dataset_paths import expand_prefixes
from megatron_patch.data.indexed_dataset import IndexedDataset
from megatron_patch.data.local_files import FileReplacedError
from megatron_patch.errors import ConfigError, DataError

_SAMPLED_SPANS = 64
_MOST_SPANS = 1024
_SPAN_TOKENS = 4096


class Corpus(Protocol):
    """What a stream reads from: `TokenCorpus`, or tokens in memory."""

    prefixes: tuple[str, ...]
    num_tokens: int

    @property
    def name(self) -> str:
        """The name in messages."""

    @property
    def metadata(self) -> tuple[DatasetMetadata | None, ...]:
        """The metadata file of each shard, or None."""

    @property
    def patch_align(self) -> int:
        """All documents begin at multiples of this number of tokens."""

    def ranges(self, split: str) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Returns the token ranges for training, validation and test."""

    def read_into(self, out: npt.NDArray[np.int64], start: int) -> None:
        """Copies tokens `[start, start + out.size)` into an array."""

    def fetch(self, starts: npt.NDArray[np.int64], count: int) -> None:
        """Prepares reading `count` tokens at each start."""

    def fingerprint(self) -> list[dict[str, object]]:
        """Returns a fingerprint of each shard."""


class TokenCorpus:
    """The tokens of all shards, in the order of the shards.

    Args:
        prefixes: the datasets, in order.

    Raises:
        DataError: there are no shards, or one cannot be opened.
    """

    def __init__(self, prefixes: Sequence[str]) -> None:
        if not prefixes:
            raise DataError("a corpus without files", "at least one dataset prefix", "give --data-path")
        self.prefixes = tuple(prefixes)
        self.shards = [IndexedDataset(prefix) for prefix in prefixes]
        # Spans that a fingerprint samples in each shard: many of a single file, at least 4 of each of thousands.
        self.sampled_spans = max(4, min(_SAMPLED_SPANS, _MOST_SPANS // len(self.shards)))
        self._fingerprints: dict[int, dict[str, object]] = {}
        self._ends = np.cumsum([shard.num_tokens for shard in self.shards])
        self.num_tokens = int(self._ends[-1])

    @property
    def name(self) -> str:
        """The name in messages: the first prefix, and how many follow."""
        return self.prefixes[0] + (f" and {len(self.prefixes) - 1} more" if len(self.prefixes) > 1 else "")

    @cached_property
    def metadata(self) -> tuple[DatasetMetadata | None, ...]:
        """The metadata file of each shard, or None.

        Raises:
            DataError: a metadata file is damaged.
        """
        return tuple(read_metadata(prefix) for prefix in self.prefixes)

    @property
    def patch_align(self) -> int:
        """All documents begin at multiples of this number of tokens, by the metadata files; 1 without alignment.

        Raises:
            DataError: a metadata file is damaged.
        """
        return math.gcd(*(metadata.patch_align if metadata is not None else 1 for metadata in self.metadata))

    def ranges(self, split: str) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Returns the token ranges for training, validation and test, aligned as the documents are.

        Raises:
            ConfigError: see `split_ranges`.
            DataError: a metadata file is damaged.
        """
        return split_ranges(self.num_tokens, split, self.patch_align)

    def read_into(self, out: npt.NDArray[np.int64], start: int) -> None:
        """Copies tokens `[start, start + out.size)` into an array.

        Raises:
            DataError: the range is outside the corpus, or the data has changed, become shorter or been removed.
        """
        if start < 0 or start + out.size > self.num_tokens:
            raise DataError(f"tokens {start} to {start + out.size} of {self.name}", f"0 to {self.num_tokens}", "read another range")
        done = 0
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while done < out.size:
            begin = int(self._ends[shard - 1]) if shard else 0
            count = min(out.size - done, int(self._ends[shard]) - start - done)
            try:
                out[done : done + count] = self.shards[shard].tokens(start + done - begin, count)
                current = self.shards[shard].is_current()
            except FileReplacedError:
                current = False
            if not current:
                self._reopen(shard)
                continue
            done += count
            shard += 1

    def _reopen(self, number: int) -> None:
        """Opens a shard whose files were replaced during the run, for example by a copy of them.

        Raises:
            DataError: the new files have other data, or do not exist.
        """
        shard = self.shards[number]
        found = IndexedDataset(shard.prefix)
        if self._fingerprints.get(number) != found.fingerprint(self.sampled_spans):
            raise DataError(
                f"{shard.prefix} has changed since the run opened it",
                "data that does not change while it is read",
                "restore the data, and resume from the newest checkpoint",
            )
        self.shards[number] = found

    def fetch(self, starts: npt.NDArray[np.int64], count: int) -> None:
        """Loads the tokens `[start, start + count)` of each start into the cache, if the shards are remote."""
        shards = np.searchsorted(self._ends, starts, side="right")
        for number in np.unique(shards).tolist():
            begin = int(self._ends[number - 1]) if number else 0
            self.shards[number].fetch(starts[shards == number] - begin, count)

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Returns the tokens `[start, start + count)`, int64."""
        out = np.empty(count, dtype=np.int64)
        self.read_into(out, start)
        return out

    def fingerprint(self) -> list[dict[str, object]]:
        """Returns, in constant time, a fingerprint of each shard, taken at the first call."""
        for number, shard in enumerate(self.shards):
            if number not in self._fingerprints:
                self._fingerprints[number] = shard.fingerprint(self.sampled_spans)
        return [self._fingerprints[number] for number in range(len(self.shards))]


def open_corpus(word: str) -> TokenCorpus:
    """Opens the corpus that a word of --data-path names: a prefix, or a glob or list of shards.

    Raises:
        DataError: see `expand_prefixes` and `TokenCorpus`.
    """
    return TokenCorpus(expand_prefixes(word))


def split_ranges(num_tokens: int, split: str, align: int = 1) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Returns the token ranges for training, validation and test, in the order of the corpus (Megatron's --split).

    Args:
        num_tokens: number of tokens of the corpus.
        split: up to three relative sizes with commas between them, as 969,30,1.
        align: ranges begin at multiples of this.

    Raises:
        ConfigError: the split is not valid, or has no part for training.
    """
    try:
        parts = [float(part) for part in split.split(",")]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or min(parts) < 0 or parts[0] <= 0 or not sum(parts) < 1e100:
        raise ConfigError(f"--split {split}", "up to three numbers from 0, the first above 0: 969,30,1", "correct --split")
    parts += [0.0] * (3 - len(parts))
    edges = [0, *(round(num_tokens * sum(parts[: index + 1]) / sum(parts)) for index in range(3))]
    edges = [edge if edge == num_tokens else edge // align * align for edge in edges]
    return (edges[0], edges[1]), (edges[1], edges[2]), (edges[2], edges[3])


def check_vocabulary(corpus: TokenCorpus, vocab_size: int) -> None:
    """Checks that the model has all token ids of a corpus, by the metadata files or, without them, by sampled spans of the data.

    Raises:
        DataError: an id is not below `vocab_size`, or a metadata file belongs to other data.
    """
    for shard, metadata in zip(corpus.shards, corpus.metadata, strict=True):
        if metadata is not None:
            if metadata.vocab_size > vocab_size:
                raise DataError(
                    f"{shard.prefix} was tokenized with {metadata.vocab_size} ids, but the model has {vocab_size}",
                    f"--vocab-size of at least {metadata.vocab_size}",
                    "remove --vocab-size, or use data that was encoded with the model's tokenizer",
                )
            if (metadata.bin_bytes, metadata.tokens) != (shard.bin_bytes, shard.num_tokens):
                raise DataError(
                    f"{shard.prefix}.bin has {shard.bin_bytes} bytes, but its metadata file has {metadata.bin_bytes}",
                    "three files of the same dataset",
                    "copy all three files again, or preprocess the data again",
                )
            continue
        count = min(_SPAN_TOKENS, shard.num_tokens)
        starts = (shard.num_tokens - count) * np.arange(corpus.sampled_spans) // (corpus.sampled_spans - 1)
        shard.fetch(starts, count)
        for start in starts.tolist():
            span = shard.tokens(start, count)
            if span.size and (int(span.max()) >= vocab_size or int(span.min()) < 0):
                wrong = int(span.max()) if int(span.max()) >= vocab_size else int(span.min())
                raise DataError(
                    f"{shard.prefix} has token id {wrong} near token {start}, but the model has {vocab_size} ids",
                    f"ids from 0 to {vocab_size - 1}",
                    "set --vocab-size to the size of the tokenizer's vocabulary",
                )


def check_metadata(corpora: Sequence[Corpus], eod_id: int | None = None) -> list[DatasetMetadata]:
    """Checks that all data of a run has the same end-of-document token, by the metadata files.

    Args:
        corpora: the training and held-out corpora.
        eod_id: the token that the run uses; None for the one of the metadata files.

    Returns:
        The metadata files that exist.

    Raises:
        DataError: two of them differ, or one is damaged.
    """
    found = _known_metadata(corpora)
    for prefix, metadata in found:
        check_compatible(found[0][1], metadata, found[0][0], prefix, ["eod_id"])
        if eod_id not in (None, metadata.eod_id) and (metadata.append_eod or metadata.patch_align > 1):
            raise DataError(
                f"--eod-token-id {eod_id}, but the documents of {prefix} end with {metadata.eod_id}",
                f"--eod-token-id {metadata.eod_id}, as in the dataset's metadata file",
                "remove --eod-token-id, or preprocess the data again with another --eod-token",
            )
    return [metadata for _, metadata in found]


def tokenizer_notes(corpora: Sequence[Corpus]) -> list[str]:
    """Returns a note where corpora were encoded with other tokenizer files than the first one."""
    found = [(prefix, metadata) for prefix, metadata in _known_metadata(corpora) if metadata.tokenizer_xxh64]
    others = [(prefix, metadata) for prefix, metadata in found if metadata.tokenizer_xxh64 != found[0][1].tokenizer_xxh64]
    if not others:
        return []
    (prefix, first), (other_prefix, other) = found[0], others[0]
    more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
    return [
        f"{prefix} was tokenized with {first.tokenizer_model}, {other_prefix}{more} with {other.tokenizer_model}, and these files differ: "
        "make sure that an id means the same token in all data"
    ]


def _known_metadata(corpora: Sequence[Corpus]) -> list[tuple[str, DatasetMetadata]]:
    """Returns (prefix, metadata file) of all shards that have one."""
    pairs = [pair for corpus in corpora for pair in zip(corpus.prefixes, corpus.metadata, strict=True)]
    return [(prefix, metadata) for prefix, metadata in pairs if metadata is not None]


def check_token_ids(tokens: npt.NDArray[np.int64], vocab_size: int, locations: Sequence[tuple[Corpus, int]]) -> None:
    """Checks the token ids of a batch.

    Args:
        tokens: token ids, [B, L]; rows after those of `locations` are padding.
        vocab_size: all ids must be below this.
        locations: corpus and first token of each row.

    Raises:
        DataError: an id is out of range; the message gives the first one and its location.
    """
    if not tokens.size or (int(tokens.max()) < vocab_size and int(tokens.min()) >= 0):
        return
    row, column = np.argwhere((tokens >= vocab_size) | (tokens < 0))[0]
    corpus, start = locations[int(row)]
    raise DataError(
        f"token id {int(tokens[row, column])} in {corpus.name}, token {start + int(column)}",
        f"ids from 0 to {vocab_size - 1}",
        "set --vocab-size to the size of the tokenizer's vocabulary, or preprocess the data again",
    )
