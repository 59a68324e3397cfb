"""Held-out loss at K = 1 and, in a patch stage, at the stage's own K: two numbers that are never mixed.

In: the engine's weights as they are, and the held-out part of the data. Out: two mean losses over the same tokens.
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
    """Somebody asked the run to stop meanwhile; the message says who."""


def held_out_losses(
    engine: Engine, data: RunData, stage: Stage, seq_length: int, tokens: int, stop_asked: Callable[[], str | None]
) -> tuple[EvaluationResult, EvaluationResult]:
    """The loss at K = 1 in samples of `seq_length`, and the loss at the stage's K, which in a token stage is the same one.

    Args:
        engine: whose weights.
        data: with a held-out part.
        stage: the run is in.
        seq_length: positions of a sample at K = 1.
        tokens: to score at most, with each K.
        stop_asked: who wants the run to stop, if anybody; asked between batches, by all ranks alike.

    Raises:
        Stopped: `stop_asked` named somebody.
    """
    token_level = _mean_loss(engine, data.evaluation(stage, seq_length, 1, tokens), stop_asked)
    if stage.patch_size == 1:
        return token_level, token_level
    return token_level, _mean_loss(engine, data.evaluation(stage, stage.positions, stage.patch_size, tokens), stop_asked)


def _mean_loss(engine: Engine, batches: Iterator[PatchBatch], stop_asked: Callable[[], str | None]) -> EvaluationResult:
    labels, loss_sum = 0, 0.0
    while chunk := list(itertools.islice(batches, _CHUNK)):
        part = engine.evaluate(chunk)
        labels, loss_sum = labels + part.labels, loss_sum + (part.loss * part.labels if part.labels else 0.0)
        if (asked := stop_asked()) is not None:
            raise EvaluationStopped(asked)
    return EvaluationResult(loss_sum / labels if labels else float("nan"), labels)
