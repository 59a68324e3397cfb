"""Estimates how long a run will spend on evaluations and saves: durations measured so far, times the number that are still to come.

In: the plan, the intervals of the options, and the duration of each evaluation and save of this start. Out: seconds in which no step is
taken, until the next switch and until the end. No torch here.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from megatron_patch.config.options import Options
from megatron_patch.stages import StagePlan

_KEPT = 4  # durations: the first may include compilation, and a file system's speed changes


@dataclass(frozen=True)
class Interval:
    """After which steps something is done: at the end of every stage, and every `steps` steps, or else every `tokens` tokens.

    Args:
        steps: an interval in steps of the run, or None.
        tokens: an interval in tokens of the run, or None.
    """

    steps: int | None
    tokens: int | None

    def count(self, plan: StagePlan, index: int, after: int) -> int:
        """Returns how often it is done in a stage.

        Args:
            plan: the plan.
            index: number of the stage.
            after: steps of the stage that do not count, from its beginning.
        """
        stage = plan.stages[index]
        if after >= stage.steps:
            return 0
        due = self._due(plan, index, after, stage.steps)
        at_end = self._due(plan, index, stage.steps - 1, stage.steps)
        return due + (not at_end)

    def _due(self, plan: StagePlan, index: int, first: int, last: int) -> int:
        """Returns how often an interval ends in the steps `(first, last]` of a stage."""
        if self.steps is not None:
            before = plan.first_step(index)
            return (before + last) // self.steps - (before + first) // self.steps
        if self.tokens is None:
            return 0
        step_tokens, begin = plan.stages[index].tokens_per_step, plan.first_token(index)
        ends = (begin + last * step_tokens) // self.tokens - (begin + first * step_tokens) // self.tokens
        return min(ends, last - first)  # once a step, also if several intervals end in it


class Pauses:
    """The evaluations and saves of a run.

    Args:
        plan: the plan that the run follows.
        options: its options.
    """

    def __init__(self, plan: StagePlan, options: Options) -> None:
        self._plan = plan
        self._evaluation = Interval(options.logging.eval_interval, options.logging.eval_interval_tokens)
        self._save = Interval(options.checkpoint.save_interval, options.checkpoint.save_interval_tokens)
        # Seconds of an evaluation over its passes through the model: one at K = 1, and 1 / K of one at the stage's K.
        self._pass_seconds: deque[float] = deque(maxlen=_KEPT)
        self._sample_seconds: deque[float] = deque(maxlen=_KEPT)
        self._save_seconds: deque[float] = deque(maxlen=_KEPT)
        self._evaluated_at = self._saved_at = -1

    def add_evaluation(self, step: int, patch_size: int, seconds: float) -> None:
        """Adds the duration of an evaluation after a step, in a stage with this K."""
        self._evaluated_at = step
        self._pass_seconds.append(seconds / _passes(patch_size))

    def add_samples(self, seconds: float) -> None:
        """Adds the time in which the samples of an evaluation were generated."""
        self._sample_seconds.append(seconds)

    def add_save(self, step: int, seconds: float) -> None:
        """Adds the time for which training waited for the checkpoint of a step."""
        self._saved_at = step
        self._save_seconds.append(seconds)

    def ahead(self, step: int, stage_index: int) -> tuple[float, float]:
        """Returns the seconds until the next switch, and until the end; 0 for what was not measured yet.

        Args:
            step: steps taken so far; its own evaluation and save count until they are added.
            stage_index: number of the stage of that step.
        """
        switch = self._stage_seconds(stage_index, step)
        return switch, switch + sum(self._stage_seconds(index, 0) for index in range(stage_index + 1, len(self._plan.stages)))

    def _stage_seconds(self, index: int, step: int) -> float:
        """Returns the seconds in a stage, after a step of the run or after the steps before the stage."""
        plan = self._plan
        done = max(0, step - plan.first_step(index))
        evaluations, saves = (
            interval.count(plan, index, done - (done > 0 and at != step))
            for interval, at in ((self._evaluation, self._evaluated_at), (self._save, self._saved_at))
        )
        seconds = _mean(self._pass_seconds) * _passes(plan.stages[index].patch_size) + _mean(self._sample_seconds)
        return evaluations * seconds + saves * _mean(self._save_seconds)


def _passes(patch_size: int) -> float:
    return 1.0 if patch_size == 1 else 1.0 + 1.0 / patch_size


def _mean(values: deque[float]) -> float:
    return sum(values) / len(values) if values else 0.0
