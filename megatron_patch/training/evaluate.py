"""Computes the held-out loss at K = 1 and, in a patch stage, at the stage's K: two numbers that are never mixed.

In: the engine with its current weights, and the held-out data. Out: two losses over the same tokens, each also for every corpus. If the
corpora have weights, a loss is the sum over corpora of weight times the mean loss of the corpus. Otherwise it is the mean over all labels.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_patch.data.collate import PatchBatch
from megatron_patch.data.evaluation_data import HeldOutCorpus, shares
from megatron_patch.engine.interface import Engine, EvaluationResult
from megatron_patch.stages import Stage
from megatron_patch.training.callbacks.base import CorpusLoss
from megatron_patch.training.data import RunData

_CHUNK = 32


class EvaluationStopped(Exception):
    """The run was asked to stop during the evaluation.

    Args:
        reason: the reason to stop.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class HeldOutLosses:
    """The losses of an evaluation.

    Args:
        token_loss: at K = 1, in nats per token.
        patch_loss: at the stage's K, in nats per label; the same in a token stage.
        labels: number of labels that are scored at K = 1.
        corpora: the same for each corpus by its name, also if there is only one; one without labels has NaN and the weight 0.
        notes: sentences for the user about corpora without labels.
    """

    token_loss: float
    patch_loss: float
    labels: int
    corpora: dict[str, CorpusLoss]
    notes: tuple[str, ...] = ()


def held_out_losses(
    engine: Engine, data: RunData, stage: Stage, seq_length: int, tokens: int, stop_reason: Callable[[], str | None]
) -> HeldOutLosses:
    """Returns the loss at K = 1 in samples of `seq_length`, and the loss at the stage's K.

    Args:
        engine: the engine whose weights are evaluated.
        data: the data of the run.
        stage: the stage that the run is in.
        seq_length: positions of a sample at K = 1.
        tokens: largest number of tokens to score, at each K.
        stop_reason: returns the reason to stop, or None; called between batches, the same number of times on each rank.

    Raises:
        EvaluationStopped: `stop_reason` returned a reason.
    """
    at_token = at_patch = _mean_loss(engine, data.evaluation(stage, seq_length, 1, tokens), stop_reason)
    if stage.patch_size > 1:
        at_patch = _mean_loss(engine, data.evaluation(stage, stage.positions, stage.patch_size, tokens), stop_reason)
    weights = [one.weight for one in data.held_out]
    parts = [(at_token.corpora[number], at_patch.corpora[number]) for number in range(len(weights))]
    at_token_shares = shares(weights, [part.labels for part, _ in parts])
    corpora = {
        one.name: CorpusLoss(share, part.loss, patch.loss, part.labels)
        for one, share, (part, patch) in zip(data.held_out, at_token_shares, parts, strict=True)
    }
    notes = _notes_on_masked(data.held_out, {1: [part for part, _ in parts], stage.patch_size: [patch for _, patch in parts]})
    if None in weights:
        return HeldOutLosses(at_token.loss, at_patch.loss, at_token.labels, corpora, notes)
    token_loss = _weighed(at_token_shares, [part for part, _ in parts])
    # Masks may leave a corpus with labels at one K and without any at the other.
    patch_loss = _weighed(shares(weights, [patch.labels for _, patch in parts]), [patch for _, patch in parts])
    return HeldOutLosses(token_loss, patch_loss, at_token.labels, corpora, notes)


def _notes_on_masked(held_out: Sequence[HeldOutCorpus], parts: Mapping[int, Sequence[EvaluationResult]]) -> tuple[str, ...]:
    """Returns a sentence for each corpus without a scored label, by the results of the corpora at each K."""
    return tuple(
        f"the held-out loss at K = {k} has no part of {one.name}: each of its labels is masked at an end of a document"
        + ("; its weight goes to the other corpora" if one.weight is not None and any(part.labels for part in results) else "")
        for k, results in parts.items()
        for one, result in zip(held_out, results, strict=True)
        if not result.labels
    )


def _weighed(weights: Sequence[float], parts: Sequence[EvaluationResult]) -> float:
    """Returns the sum of the losses times their weights, of the corpora that have a loss; NaN if none has one."""
    found = [weight * part.loss for weight, part in zip(weights, parts, strict=True) if part.labels]
    return sum(found) if found else float("nan")


def _mean_loss(engine: Engine, batches: Iterator[PatchBatch], stop_reason: Callable[[], str | None]) -> EvaluationResult:
    """Returns the mean over the labels of all batches, and of the batches of each corpus."""
    total, parts = _Sum(), defaultdict[int, _Sum](_Sum)
    while chunk := list(itertools.islice(batches, _CHUNK)):
        result = engine.evaluate(chunk)
        total.add(result)
        for number, part in result.corpora.items():
            parts[number].add(part)
        if (reason := stop_reason()) is not None:
            raise EvaluationStopped(reason)
    return dataclasses.replace(total.mean(), corpora={number: part.mean() for number, part in parts.items()})


class _Sum:
    """Sums results of the engine."""

    def __init__(self) -> None:
        self.labels, self.loss = 0, 0.0

    def add(self, part: EvaluationResult) -> None:
        """Adds the labels of a result and their losses."""
        self.labels += part.labels
        self.loss += part.loss * part.labels if part.labels else 0.0

    def mean(self) -> EvaluationResult:
        """Returns the mean over all labels; NaN without labels."""
        return EvaluationResult(self.loss / self.labels if self.labels else float("nan"), self.labels)
