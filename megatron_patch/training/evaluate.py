"""Computes the held-out loss at K = 1 and, in a patch stage, at the stage's K: two numbers that are never mixed.

In: the engine with its current weights, and the held-out data. Out: two mean losses over the same tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from megatron_patch.data.collate import PatchBatch
from megatron_patch.engine.interface import Engine, EvaluationResult
from megatron_patch.stages import Stage
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


def held_out_losses(
    engine: Engine, data: RunData, stage: Stage, seq_length: int, tokens: int, stop_reason: Callable[[], str | None]
) -> tuple[EvaluationResult, EvaluationResult]:
    """Returns the loss at K = 1 in samples of `seq_length`, and the loss at the stage's K, which is the same in a token stage.

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
    token_level = _mean_loss(engine, data.evaluation(stage, seq_length, 1, tokens), stop_reason)
    if stage.patch_size == 1:
        return token_level, token_level
    return token_level, _mean_loss(engine, data.evaluation(stage, stage.positions, stage.patch_size, tokens), stop_reason)


def _mean_loss(engine: Engine, batches: Iterator[PatchBatch], stop_reason: Callable[[], str | None]) -> EvaluationResult:
    labels, loss_sum = 0, 0.0
    while chunk := list(itertools.islice(batches, _CHUNK)):
        part = engine.evaluate(chunk)
        labels, loss_sum = labels + part.labels, loss_sum + (part.loss * part.labels if part.labels else 0.0)
        if (reason := stop_reason()) is not None:
            raise EvaluationStopped(reason)
    return EvaluationResult(loss_sum / labels if labels else float("nan"), labels)
