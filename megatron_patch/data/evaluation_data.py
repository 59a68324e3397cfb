"""Held-out batches: the same tokens at every patch size, spread evenly over the held-out range, never shuffled.

In: a corpus, a range of it, a patch size. Out: micro-batches, the same number on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_patch.data.collate import DocumentMasking, PatchBatch, make_batch
from megatron_patch.data.corpus import TokenCorpus, check_ids


def held_out_starts(token_range: tuple[int, int], unit_tokens: int, lookahead_tokens: int, tokens: int) -> np.ndarray:
    """First tokens of the units that an evaluation reads: as many as make up `tokens` (at least one), evenly spread over the range.

    Args:
        token_range: first and last token of the held-out part.
        unit_tokens: size of a unit, a multiple of every sample that is cut from it.
        lookahead_tokens: labels beyond a unit's end.
        tokens: how many to read.
    """
    first, last = token_range
    available = max(0, (last - first - lookahead_tokens) // unit_tokens)
    count = min(available, max(1, tokens // unit_tokens))
    return first + (np.arange(count, dtype=np.int64) * available // max(1, count)) * unit_tokens


def evaluation_batches(
    corpus: TokenCorpus,
    starts: np.ndarray,
    unit_tokens: int,
    positions: int,
    patch_size: int,
    micro_batch_size: int,
    rank: int,
    size: int,
    masking: DocumentMasking,
    vocab_size: int | None = None,
) -> Iterator[PatchBatch]:
    """This rank's batches of an evaluation.

    Args:
        corpus: held-out data.
        starts: as `held_out_starts` gives them.
        unit_tokens: size of a unit, a multiple of `positions * patch_size`.
        positions: T.
        patch_size: K.
        micro_batch_size: samples of a batch.
        rank: this rank.
        size: ranks that share the evaluation.
        masking: how documents are kept apart.
        vocab_size: ids from here on are an error; None: not checked.

    Yields:
        Batches; the last is filled up with unscored samples, and every rank gets the same number.

    Raises:
        DataError: a token id outside the vocabulary, with its place.
    """
    sample = positions * patch_size
    offsets = (starts[:, None] + np.arange(unit_tokens // sample, dtype=np.int64)[None, :] * sample).reshape(-1)
    per_round = micro_batch_size * size
    for begin in range(0, len(offsets), per_round):
        mine = offsets[begin + rank * micro_batch_size : begin + (rank + 1) * micro_batch_size]
        tokens = np.zeros((micro_batch_size, sample + patch_size), dtype=np.int64)
        for row, start in enumerate(mine):
            corpus.read_into(tokens[row], int(start))
        if vocab_size is not None:
            check_ids(tokens, vocab_size, [(corpus, int(start)) for start in mine])
        yield make_batch(tokens, "both", positions, patch_size, masking, scored_rows=len(mine))
