"""One corpus: shards laid end to end as one virtual array of tokens.

In: prefixes. Out: any span of tokens, and what identifies the data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from megatron_patch.data.dataset_metadata import DatasetMetadata, check_compatible, read_metadata
from megatron_patch.data.dataset_paths import expand_prefixes
from megatron_patch.data.indexed_dataset import IndexedDataset
from megatron_patch.errors import ConfigError, DataError
from megatron_patch.utils.files import allow_open_files

_SAMPLED_SPANS = 64
_MOST_SPANS = 1024
_SPAN_TOKENS = 4096


class TokenCorpus:
    """Shards as one array.

    Args:
        prefixes: datasets, in order.

    Raises:
        DataError: no shards, or one that cannot be opened.
    """

    def __init__(self, prefixes: Sequence[str]) -> None:
        if not prefixes:
            raise DataError("a corpus without files", "at least one dataset prefix", "give --data-path")
        self.prefixes = tuple(prefixes)
        # Each shard is two files that stay open.
        allow_open_files(2 * len(self.prefixes) + 1024)
        self.shards = [IndexedDataset(prefix) for prefix in prefixes]
        # Spans to look at in each shard: many of one file, at least some of each of thousands.
        self.sampled_spans = max(4, min(_SAMPLED_SPANS, _MOST_SPANS // len(self.shards)))
        self._fingerprints: dict[int, dict[str, object]] = {}
        self._ends = np.cumsum([shard.num_tokens for shard in self.shards])
        self.num_tokens = int(self._ends[-1])

    @property
    def name(self) -> str:
        """For messages."""
        return self.prefixes[0] + (f" and {len(self.prefixes) - 1} more" if len(self.prefixes) > 1 else "")

    @cached_property
    def infos(self) -> tuple[DatasetMetadata | None, ...]:
        """Each shard's side file, where it has one.

        Raises:
            DataError: a damaged side file.
        """
        return tuple(read_metadata(prefix) for prefix in self.prefixes)

    @property
    def patch_align(self) -> int:
        """Documents begin at multiples of this (1: anywhere), as the side files say.

        Raises:
            DataError: a damaged side file.
        """
        return math.gcd(*(info.patch_align if info is not None else 1 for info in self.infos))

    def ranges(self, split: str) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """The corpus' ranges for training, validation and test; where documents are aligned to patches, so is each range.

        Raises:
            ConfigError: as `split_ranges`.
            DataError: a damaged side file.
        """
        return split_ranges(self.num_tokens, split, self.patch_align)

    def read_into(self, out: npt.NDArray[np.int64], start: int) -> None:
        """Copies tokens `[start, start + out.size)` into an array.

        Raises:
            DataError: outside the corpus; the data has changed, has become shorter or has vanished.
        """
        if start < 0 or start + out.size > self.num_tokens:
            raise DataError(f"tokens {start} to {start + out.size} of {self.name}", f"0 to {self.num_tokens}")
        done = 0
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while done < out.size:
            begin = int(self._ends[shard - 1]) if shard else 0
            count = min(out.size - done, int(self._ends[shard]) - start - done)
            out[done : done + count] = self.shards[shard].tokens(start + done - begin, count)
            if not self.shards[shard].is_current():
                self._open_again(shard)
                continue
            done += count
            shard += 1

    def _open_again(self, number: int) -> None:
        """Goes on with what has taken a shard's place, where it holds the same.

        Raises:
            DataError: it does not, or there is nothing.
        """
        shard = self.shards[number]
        found = IndexedDataset(shard.prefix)
        if self._fingerprints.get(number) != found.fingerprint(self.sampled_spans):
            raise DataError(
                f"{shard.prefix} has changed since the run opened it",
                "data that stays as it is while it is read",
                "restore it, and go on from the last checkpoint",
            )
        self.shards[number] = found

    def fetch(self, starts: npt.NDArray[np.int64], count: int) -> None:
        """Makes ready tokens `[start, start + count)` of each start, where they have to come from elsewhere, many at a time."""
        shards = np.searchsorted(self._ends, starts, side="right")
        for number in np.unique(shards).tolist():
            begin = int(self._ends[number - 1]) if number else 0
            self.shards[number].fetch(starts[shards == number] - begin, count)

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """A copy of tokens `[start, start + count)`."""
        out = np.empty(count, dtype=np.int64)
        self.read_into(out, start)
        return out

    def fingerprint(self) -> list[dict[str, object]]:
        """What tells this data from other data, in constant time: each shard's, as it was when this was first asked."""
        for number, shard in enumerate(self.shards):
            if number not in self._fingerprints:
                self._fingerprints[number] = shard.fingerprint(self.sampled_spans)
        return [self._fingerprints[number] for number in range(len(self.shards))]


def open_corpus(word: str) -> TokenCorpus:
    """The corpus that a word of --data-path names: a prefix, or a glob or list of shards, which are one corpus, laid end to end.

    Raises:
        DataError: as `expand_prefixes` and `TokenCorpus`.
    """
    return TokenCorpus(expand_prefixes(word))


def split_ranges(num_tokens: int, split: str, align: int = 1) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Token ranges for training, validation and test, in the order of the corpus (Megatron's --split).

    Args:
        num_tokens: size of the corpus.
        split: up to three numbers with commas, in any unit: 969,30,1.
        align: ranges begin at multiples of this.

    Raises:
        ConfigError: no such numbers, or no part for training.
    """
    try:
        parts = [float(part) for part in split.split(",")]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or min(parts) < 0 or parts[0] <= 0 or not np.isfinite(parts).all():
        raise ConfigError(f"--split {split}", "up to three numbers from 0, the first above it: 969,30,1")
    parts += [0.0] * (3 - len(parts))
    edges = [0, *(round(num_tokens * sum(parts[: index + 1]) / sum(parts)) for index in range(3))]
    edges = [edge if edge == num_tokens else edge // align * align for edge in edges]
    return (edges[0], edges[1]), (edges[1], edges[2]), (edges[2], edges[3])


def check_vocabulary(corpus: TokenCorpus, vocab_size: int) -> None:
    """The model must have a row for every id: by the side files, else by spans of the data.

    Raises:
        DataError: it has not.
    """
    for shard, info in zip(corpus.shards, corpus.infos, strict=True):
        if info is not None:
            if info.vocab_size > vocab_size:
                raise DataError(
                    f"{shard.prefix} was tokenized with {info.vocab_size} ids, the model has {vocab_size}",
                    f"--vocab-size of at least {info.vocab_size}",
                    "leave --vocab-size out, or use data of the model's tokenizer",
                )
            if (info.bin_bytes, info.tokens) != (shard.bin_bytes, shard.num_tokens):
                raise DataError(
                    f"{shard.prefix}.bin has {shard.bin_bytes} bytes, its side file says {info.bin_bytes}",
                    "files of one dataset",
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
                    f"{shard.prefix} holds token id {wrong} near token {start}; the model has {vocab_size} ids",
                    f"ids from 0 to {vocab_size - 1}",
                    "give the tokenizer's --vocab-size",
                )


def check_metadata(corpora: Sequence[TokenCorpus], eod_id: int | None = None) -> list[DatasetMetadata]:
    """All that a run reads must have the same end-of-document token, as far as side files tell.

    Args:
        corpora: for training and held-out.
        eod_id: what the run takes for it; None: what the side files say.

    Returns:
        The side files.

    Raises:
        DataError: two differ, or one is damaged.
    """
    found = _found_infos(corpora)
    for prefix, info in found:
        check_compatible(found[0][1], info, found[0][0], prefix, ["eod_id"])
        if eod_id not in (None, info.eod_id) and (info.append_eod or info.patch_align > 1):
            raise DataError(
                f"--eod-token-id {eod_id}, but the documents of {prefix} end with {info.eod_id}",
                "what the side file says",
                "leave --eod-token-id out, or preprocess the data again with another --eod-token",
            )
    return [info for _, info in found]


def tokenizer_notes(corpora: Sequence[TokenCorpus]) -> list[str]:
    """Which corpora were made with other tokenizer files than the first, in sentences."""
    found = [(prefix, info) for prefix, info in _found_infos(corpora) if info.tokenizer_xxh64]
    others = [(prefix, info) for prefix, info in found if info.tokenizer_xxh64 != found[0][1].tokenizer_xxh64]
    if not others:
        return []
    (prefix, first), (other_prefix, other) = found[0], others[0]
    more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
    return [
        f"{prefix} was tokenized with {first.tokenizer_model}, {other_prefix}{more} with {other.tokenizer_model}, whose files are not the "
        "same: one id must mean one thing in all that is read"
    ]


def _found_infos(corpora: Sequence[TokenCorpus]) -> list[tuple[str, DatasetMetadata]]:
    return [(prefix, info) for corpus in corpora for prefix, info in zip(corpus.prefixes, corpus.infos, strict=True) if info is not None]


def check_ids(tokens: npt.NDArray[np.int64], vocab_size: int, places: Sequence[tuple[TokenCorpus, int]]) -> None:
    """The cheap check of every batch.

    Args:
        tokens: [B, L], rows beyond `places` being padding.
        vocab_size: ids must be below it.
        places: corpus and first token of each row.

    Raises:
        DataError: naming the first wrong id and where it lies.
    """
    if not tokens.size or (int(tokens.max()) < vocab_size and int(tokens.min()) >= 0):
        return
    row, column = np.argwhere((tokens >= vocab_size) | (tokens < 0))[0]
    corpus, start = places[int(row)]
    raise DataError(
        f"token id {int(tokens[row, column])} in {corpus.name}, token {start + int(column)}",
        f"ids from 0 to {vocab_size - 1}",
        "give the tokenizer's --vocab-size, or preprocess the data again",
    )
