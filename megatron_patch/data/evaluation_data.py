"""Held-out batches: the same tokens at every patch size, spread evenly over the held-out range, in order.

In: a corpus, a range of its tokens, a patch size. Out: micro-batches, the same number on every rank. And what each corpus counts in the
held-out loss of a blend: weights decide this, not the number of tokens that are read, which is the same for each corpus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_patch.data.collate import DocumentMasking, PatchBatch, make_batch
from megatron_patch.data.corpus import Corpus, check_token_ids


@dataclass(frozen=True)
class HeldOutCorpus:
    """The held-out data of one corpus.

    Args:
        name: short name, which no other corpus of the run has.
        corpus: the corpus.
        token_range: first token of the held-out part, and the token after its last.
        weight: weight in the held-out loss; None for all corpora if the run gives no weights.
    """

    name: str
    corpus: Corpus
    token_range: tuple[int, int]
    weight: float | None = None

    @property
    def tokens(self) -> int:
        """Number of held-out tokens."""
        return self.token_range[1] - self.token_range[0]


def shares(weights: Sequence[float | None], labels: Sequence[int]) -> list[float]:
    """Returns the share of each corpus in the held-out loss, with the sum 1; all are NaN if no corpus has a label.

    Args:
        weights: weight of each corpus, or None for all of them.
        labels: number of scored labels of each corpus, which are the weights where none are given: each label then counts the same. A
            corpus without any has no loss, and its weight goes to the others.
    """
    given = [float(count) if weight is None or count == 0 else weight for weight, count in zip(weights, labels, strict=True)]
    total = sum(given) or float("nan")
    return [weight / total for weight in given]


def held_out_starts(token_range: tuple[int, int], unit_tokens: int, lookahead_tokens: int, tokens: int) -> np.ndarray:
    """Returns the first token of each unit that an evaluation reads, evenly spread over the held-out range, int64 [N].

    Args:
        token_range: first token of the held-out part, and the token after its last.
        unit_tokens: tokens of a unit, a multiple of the tokens of every sample in it.
        lookahead_tokens: tokens after a unit's end that labels need.
        tokens: number of tokens to read; at least one unit is read.
    """
    first, last = token_range
    available = max(0, (last - first - lookahead_tokens) // unit_tokens)
    count = min(available, max(1, tokens // unit_tokens))
    return first + (np.arange(count, dtype=np.int64) * available // max(1, count)) * unit_tokens


def evaluation_batches(
    corpus: Corpus,
    starts: np.ndarray,
    unit_tokens: int,
    positions: int,
    patch_size: int,
    micro_batch_size: int,
    rank: int,
    size: int,
    masking: DocumentMasking,
    vocab_size: int | None = None,
    number: int = 0,
) -> Iterator[PatchBatch]:
    """Yields this rank's batches of an evaluation.

    Args:
        corpus: the held-out corpus.
        starts: first token of each unit, as `held_out_starts` returns them.
        unit_tokens: tokens of a unit, a multiple of `positions * patch_size`.
        positions: T.
        patch_size: K.
        micro_batch_size: samples of a batch.
        rank: this rank.
        size: number of ranks that share the evaluation.
        masking: how documents are separated.
        vocab_size: all token ids must be below this; None: they are not checked.
        number: number of the corpus in the batches.

    Yields:
        Batches, the same number on every rank; the last one is padded with samples that are not scored.

    Raises:
        DataError: a token id is outside the vocabulary.
    """
    sample = positions * patch_size
    offsets = (starts[:, None] + np.arange(unit_tokens // sample, dtype=np.int64)[None, :] * sample).reshape(-1)
    per_round = micro_batch_size * size
    for begin in range(0, len(offsets), per_round):
        local = offsets[begin + rank * micro_batch_size : begin + (rank + 1) * micro_batch_size]
        tokens = np.zeros((micro_batch_size, sample + patch_size), dtype=np.int64)
        for row, start in enumerate(local):
            corpus.read_into(tokens[row], int(start))
        if vocab_size is not None:
            check_token_ids(tokens, vocab_size, [(corpus, int(start)) for start in local])
        yield make_batch(tokens, "both", positions, patch_size, masking, scored_rows=len(local))._replace(corpus=number)
