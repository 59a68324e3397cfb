"""Computes the learning rate as a function of tokens, over one stage or several.

In: a plan, whose stages restart, continue or rewarm the schedule. Out: the learning rate of each step. The rate of a step is evaluated at
its end, so that the first step is not wasted at a rate of 0 and the last step reaches the minimum.

A new style is a branch in `_decay` and a name in `stages.LrStyle`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_patch.stages import LrShape, StagePlan


@dataclass(frozen=True)
class Segment:
    """One schedule over the stages from one restart to the next.

    Args:
        first_tokens: tokens read when it begins.
        last_tokens: tokens read when it ends.
        shape: warm-up, decay and learning rates.
        rewarms: (tokens read when a rewarm begins, its length in tokens).
    """

    first_tokens: int
    last_tokens: int
    shape: LrShape
    rewarms: tuple[tuple[int, int], ...] = ()


def _decay(shape: LrShape, done: float, length: float) -> float:
    """Returns the rate after `done` of the `length` tokens that follow the warm-up."""
    span, share = shape.lr - shape.min_lr, min(1.0, done / length) if length > 0 else 1.0
    if shape.style == "constant":
        return shape.lr
    if shape.style == "linear":
        return shape.lr - span * share
    if shape.style == "cosine":
        return shape.min_lr + span * 0.5 * (1.0 + math.cos(math.pi * share))
    if shape.style == "inverse-square-root":
        # lr · sqrt(w / n) with n tokens in all and w of warm-up (Vaswani et al. 2017); without a warm-up w is one token.
        warmup = max(1, shape.warmup_tokens)
        return max(shape.min_lr, shape.lr * math.sqrt(warmup / (warmup + done)))
    if shape.style != "WSD":
        raise ValueError(f"unknown learning-rate style {shape.style!r}")
    tail = min(float(shape.wsd_decay_tokens), length)
    share = max(0.0, (done - (length - tail)) / tail) if tail > 0 else 0.0
    share = min(1.0, share)
    if shape.wsd_decay_style == "linear":
        return shape.lr - span * share
    if shape.wsd_decay_style == "cosine":
        return shape.min_lr + span * 0.5 * (1.0 + math.cos(math.pi * share))
    if shape.wsd_decay_style == "minus-sqrt":
        return shape.min_lr + span * (1.0 - math.sqrt(share))
    if shape.wsd_decay_style == "exponential":
        # Halving ten times over the decay, shifted to end at the minimum exactly.
        return shape.min_lr + span * (2.0 ** (-10.0 * share) - 2.0**-10 * share)
    raise ValueError(f"unknown style of WSD's decay {shape.wsd_decay_style!r}")


def learning_rate(segment: Segment, tokens: int) -> float:
    """Returns the learning rate of a step: linear warm-up from 0, then the decay of the shape's style.

    Args:
        segment: the schedule at that step.
        tokens: tokens that the run has read, including those of the step.
    """
    shape = segment.shape
    done = tokens - segment.first_tokens
    if shape.warmup_tokens > 0 and done < shape.warmup_tokens:
        rate = shape.lr * done / shape.warmup_tokens
    else:
        end = shape.decay_tokens if shape.decay_tokens is not None else segment.last_tokens - segment.first_tokens
        rate = _decay(shape, done - shape.warmup_tokens, end - shape.warmup_tokens)
    for begin, length in segment.rewarms:
        if begin < tokens < begin + length:
            rate *= (tokens - begin) / length
    return rate


@dataclass(frozen=True)
class LrSchedule:
    """The schedules of a run, one after another.

    Args:
        segments: the schedules, in order.
    """

    segments: Sequence[Segment]

    def at(self, tokens: int) -> float:
        """Returns the learning rate of the step after which the run has read `tokens` tokens."""
        for segment in self.segments:
            if tokens <= segment.last_tokens:
                return learning_rate(segment, tokens)
        return learning_rate(self.segments[-1], self.segments[-1].last_tokens)


def build_lr_schedule(plan: StagePlan) -> LrSchedule:
    """Returns the schedules of a plan: a stage that restarts begins a new one, other stages continue the current one."""
    segments: list[Segment] = []
    for index, stage in enumerate(plan.stages):
        first, last = plan.first_token(index), plan.first_token(index + 1)
        if stage.lr_policy == "restart" or not segments:
            segments.append(Segment(first, last, stage.lr))
            continue
        running = segments[-1]
        rewarms = (*running.rewarms, (first, stage.rewarm_tokens)) if stage.lr_policy == "rewarm" else running.rewarms
        segments[-1] = Segment(running.first_tokens, last, running.shape, rewarms)
    return LrSchedule(tuple(segments))
