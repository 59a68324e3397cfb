"""The learning-rate schedules of a plan: lengths that are given in tokens, in steps or as a share become tokens.

In: a plan, its stages as described, and the schedule options. Out: the plan with complete schedules, or an error that names the flag or
the key. A stage's own length overrides that of the run, whatever the unit of either.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_patch.config.option_types import flag_of
from megatron_patch.config.options import ScheduleOptions
from megatron_patch.config.stage_spec import StageSpec
from megatron_patch.errors import ConfigError
from megatron_patch.stages import LrShape, Stage, StagePlan, steps_of_tokens, tokens_of_steps
from megatron_patch.utils.units import format_count, plural


@dataclass(frozen=True)
class _Length:
    """A length as given, in one unit; without any, it was not given.

    Args:
        tokens: the length in tokens.
        steps: the length in optimizer steps.
        share: the length as a share.
        name: the flag or the key that gives it, for errors.
    """

    tokens: int | None = None
    steps: int | None = None
    share: float | None = None
    name: str = ""


def _length(spec: StageSpec, schedule: ScheduleOptions, kind: str) -> _Length:
    """Returns a length of a stage, else of the run. Of "lr_warmup", "lr_decay" and "lr_wsd_decay", `kind` names the one."""
    of_stage = _Length(getattr(spec, f"{kind}_tokens"), getattr(spec, f"{kind}_steps"), name=f"{kind}_steps")
    if of_stage.tokens is not None or of_stage.steps is not None:
        return of_stage
    tokens, steps = getattr(schedule, f"{kind}_tokens"), getattr(schedule, f"{kind}_steps")
    # A warm-up of 0 tokens is the default of --lr-warmup-tokens, so it is not given.
    return _Length(tokens or None, steps, getattr(schedule, f"{kind}_fraction", None), flag_of(f"{kind}_steps"))


def _check_steps(length: _Length, stage: Stage, what: str, most: Fraction, smallest: int = 0) -> None:
    """Checks a length that is given in steps.

    Args:
        length: the length.
        stage: the first stage that it covers.
        what: what has this length, such as "a warm-up".
        most: the most steps that it can have.
        smallest: the fewest steps that it can have.
    """
    if length.steps is None:
        return
    if length.steps < smallest:
        raise ConfigError(
            f"stage {stage.name!r}: {length.name} is {length.steps}", f"whole numbers from {smallest}", f"raise {length.name}"
        )
    if length.steps > most:
        raise ConfigError(
            f"stage {stage.name!r}: {what} of {plural(length.steps, 'step')} in a schedule of {_format_steps(most)}",
            f"{what} that is not longer than the schedule",
            f"lower {length.name} or raise --train-tokens",
        )


def _format_steps(steps: Fraction) -> str:
    """Returns a number of steps as text, with one decimal where a length ends inside a step: "2,000 steps", "317.9 steps"."""
    if steps.denominator == 1:
        return plural(int(steps), "step")
    return f"{float(steps):,.1f} steps"


def _lr_shape(spec: StageSpec, schedule: ScheduleOptions) -> LrShape:
    """Returns a stage's learning-rate schedule: what the stage sets, else what the run sets; only with lengths that are given in tokens."""

    def first(of_stage: Any, of_run: Any) -> Any:
        return of_run if of_stage is None else of_stage

    return LrShape(
        lr=first(spec.lr, schedule.lr),
        min_lr=first(spec.min_lr, schedule.min_lr),
        warmup_tokens=_length(spec, schedule, "lr_warmup").tokens or 0,
        style=first(spec.lr_decay_style, schedule.lr_decay_style or "cosine"),
        decay_tokens=_length(spec, schedule, "lr_decay").tokens,
        wsd_decay_tokens=_length(spec, schedule, "lr_wsd_decay").tokens or 0,
        wsd_decay_style=first(spec.lr_wsd_decay_style, schedule.lr_wsd_decay_style),
    )


def with_schedules(plan: StagePlan, specs: Sequence[StageSpec], schedule: ScheduleOptions, decay_fraction: float) -> StagePlan:
    """Returns the plan with the learning rates that are described for its stages, all lengths in tokens.

    Args:
        plan: the stages with their steps.
        specs: the stages as described.
        schedule: the learning rates, for stages that set none.
        decay_fraction: share of a schedule's steps over which WSD decays where no other length is given.

    Raises:
        ConfigError: the learning rates do not fit the stages.
    """
    stages = [dataclasses.replace(stage, lr=_lr_shape(spec, schedule)) for stage, spec in zip(plan.stages, specs, strict=True)]
    for first, covered in lr_schedules(plan):
        shape = _resolved(stages[first].lr, covered, specs[first], schedule, decay_fraction)
        stages[first] = dataclasses.replace(stages[first], lr=shape)
        for offset, stage in enumerate(covered):
            index = first + offset
            rewarm = _rewarm_tokens(covered[offset:], specs[index], schedule) if stage.lr_policy == "rewarm" else 0
            stages[index] = dataclasses.replace(stages[index], rewarm_tokens=rewarm)
    result = StagePlan(tuple(stages), plan.block_tokens)
    check_schedules(result)
    return result


def _resolved(shape: LrShape, covered: Sequence[Stage], spec: StageSpec, schedule: ScheduleOptions, decay_fraction: float) -> LrShape:
    """Returns a schedule with all lengths in tokens.

    Args:
        shape: the schedule with the lengths that are given in tokens.
        covered: the stages that it covers.
        spec: the first of them as described.
        schedule: the learning rates of the run.
        decay_fraction: as for `with_schedules`.
    """
    tokens, steps = sum(stage.tokens for stage in covered), Fraction(sum(stage.steps for stage in covered))
    warmup, decay, tail = (_length(spec, schedule, kind) for kind in ("lr_warmup", "lr_decay", "lr_wsd_decay"))
    _check_steps(warmup, covered[0], "a warm-up", steps)
    if warmup.steps is not None:
        shape = dataclasses.replace(shape, warmup_tokens=round(tokens_of_steps(covered, warmup.steps)))
    elif warmup.share is not None and warmup.tokens is None:
        _check_share(warmup.share)
        shape = dataclasses.replace(shape, warmup_tokens=round(tokens * warmup.share))
    # A decay may end after the run, as in Megatron.
    _check_steps(decay, covered[0], "a decay", Fraction(decay.steps or 0), smallest=1)
    if decay.steps is not None:
        shape = dataclasses.replace(shape, decay_tokens=round(tokens_of_steps(covered, decay.steps)))
    if shape.style != "WSD":
        return shape
    if tail.steps is not None:
        end = Fraction(tokens if shape.decay_tokens is None else shape.decay_tokens)
        last = steps_of_tokens(covered, end)
        _check_steps(tail, covered[0], "a final decay", last, smallest=1)
        shape = dataclasses.replace(shape, wsd_decay_tokens=round(end - tokens_of_steps(covered, last - tail.steps)))
        _check_both(shape, covered, end, warmup, tail)
    elif not tail.tokens:
        share = decay_fraction if tail.share is None else tail.share
        # As a fraction of decimals: 0.1 of 30 steps in floating point is more than 3, which would round up to 4.
        before = steps - math.ceil(steps * Fraction(str(share)))
        shape = dataclasses.replace(shape, wsd_decay_tokens=tokens - round(tokens_of_steps(covered, before)))
    return shape


def _check_both(shape: LrShape, covered: Sequence[Stage], end: Fraction, warmup: _Length, tail: _Length) -> None:
    """Checks that warm-up and final decay fit into a schedule that ends after `end` tokens; the final decay is given in steps."""
    if shape.warmup_tokens + shape.wsd_decay_tokens <= end:
        return
    warm, last, most = (steps_of_tokens(covered, tokens) for tokens in (shape.warmup_tokens, end - shape.wsd_decay_tokens, end))
    raise ConfigError(
        f"stage {covered[0].name!r}: a warm-up of {_format_steps(warm)} and a final decay of {_format_steps(most - last)} in a schedule "
        f"of {_format_steps(most)}",
        "a warm-up and a final decay that are together not longer than the schedule",
        f"lower {tail.name} or {'the warm-up' if warmup.steps is None else warmup.name}, or raise --train-tokens",
    )


def _check_share(share: float) -> None:
    if not 0.0 <= share < 1.0:
        raise ConfigError(f"--lr-warmup-fraction {share}", "a share from 0 to below 1", "give 0.01, for example")


def _rewarm_tokens(rest: Sequence[Stage], spec: StageSpec, schedule: ScheduleOptions) -> int:
    """Returns the length of the rewarm of the first of these stages; the others continue its schedule."""
    length = _length(spec, schedule, "lr_warmup")
    _check_steps(length, rest[0], "a warm-up", Fraction(sum(stage.steps for stage in rest)))
    if length.steps is not None:
        return round(tokens_of_steps(rest, length.steps))
    if length.tokens is not None:
        return length.tokens
    _check_share(length.share or 0.0)
    return round(rest[0].tokens * (length.share or 0.0))


def check_given_lengths(plan: StagePlan, specs: Sequence[StageSpec]) -> None:
    """Checks that no stage gives a final decay of length 0, which would be no decay or that of the run, depending on who reads it.

    Only options of this start are checked so: a run of an earlier version, which accepted it, resumes without the key.

    Args:
        plan: the plan.
        specs: its stages as described.

    Raises:
        ConfigError: a stage does; the message names it.
    """
    for stage, spec in zip(plan.stages, specs, strict=True):
        for key in ("lr_wsd_decay_tokens", "lr_wsd_decay_steps"):
            if getattr(spec, key) == 0:
                raise ConfigError(f"stage {stage.name!r}: {key} is 0", "whole numbers from 1", f"raise {key}, or remove it")


def schedule_notes(plan: StagePlan, specs: Sequence[StageSpec], schedule: ScheduleOptions) -> list[str]:
    """Returns notes on lengths that have no effect, or not the whole one.

    Args:
        plan: the plan, with complete schedules.
        specs: its stages as described.
        schedule: the learning rates of the run.
    """
    styles = {stage.lr.style for stage in plan.stages if stage.lr_policy == "restart"}
    given = [name for name in _READ_BY if getattr(schedule, name) is not None and not styles.intersection(_READ_BY[name])]
    notes = [_idle(flag_of(name), name, sorted(styles)) for name in given]
    for first, covered in lr_schedules(plan):
        stage, spec, shape = covered[0], specs[first], covered[0].lr
        keys = [key for key in _READ_BY if getattr(spec, key, None) is not None and shape.style not in _READ_BY[key]]
        notes += [_idle(f"stage {stage.name}: {key}", key, [shape.style]) for key in keys]
        end = sum(part.tokens for part in covered) if shape.decay_tokens is None else shape.decay_tokens
        left = end - shape.warmup_tokens
        # Shares and rounding may differ by less than a step.
        if shape.style == "WSD" and shape.wsd_decay_tokens - left >= covered[-1].tokens_per_step:
            notes.append(
                f"stage {stage.name}: the final decay has {format_count(left)} tokens instead of {format_count(shape.wsd_decay_tokens)}, "
                f"because its schedule ends after {format_count(end)} tokens"
                + (f" and warms up for {format_count(shape.warmup_tokens)}" if shape.warmup_tokens else "")
            )
    return notes


_DECAYING = ("linear", "cosine", "WSD")
_READ_BY: dict[str, tuple[str, ...]] = {
    "lr_decay_tokens": _DECAYING,
    "lr_decay_steps": _DECAYING,
    "lr_wsd_decay_tokens": ("WSD",),
    "lr_wsd_decay_steps": ("WSD",),
    "lr_wsd_decay_fraction": ("WSD",),
}
"""Lengths that only schedules of some styles read: name -> the styles."""


def _idle(given: str, name: str, styles: Sequence[str]) -> str:
    """Returns the note on a length that no schedule reads.

    Args:
        given: the flag, or the stage and its key.
        name: the option or key.
        styles: the styles of the schedules.
    """
    style = flag_of("lr_decay_style") if given.startswith("--") else "lr_decay_style"
    *others, last = _READ_BY[name]
    readers = f"{', '.join(others)} and {last} read" if others else f"{last} reads"
    return f"{given} has no effect: {style} is {' and '.join(styles)}, and only {readers} it"


def lr_schedules(plan: StagePlan) -> list[tuple[int, Sequence[Stage]]]:
    """Returns, for each learning-rate schedule of a plan, the index of the stage that begins it and the stages that it covers."""
    starts = [index for index, stage in enumerate(plan.stages) if stage.lr_policy == "restart"]
    return [(start, plan.stages[start:end]) for start, end in zip(starts, [*starts[1:], len(plan.stages)], strict=True)]


def check_schedules(plan: StagePlan) -> None:
    """Checks that the learning-rate schedules of a plan fit the stages that they cover.

    Raises:
        ConfigError: a schedule does not fit; the message names its first stage.
    """
    for _, covered in lr_schedules(plan):
        _check_lr(covered[0], covered[0].lr, sum(stage.tokens for stage in covered))
    for stage in plan.stages:
        if stage.lr_policy == "rewarm" and stage.rewarm_tokens == 0:
            raise ConfigError(
                f"stage {stage.name!r} has lr_policy: rewarm but no warm-up",
                "lr_warmup_steps or lr_warmup_tokens in the stage, --lr-warmup-steps, --lr-warmup-tokens, or --lr-warmup-fraction "
                "(a share of the stage's tokens)",
                "give one of them, or use lr_policy: continue",
            )


def _check_lr(stage: Stage, shape: LrShape, tokens: int) -> None:
    """Checks the learning-rate schedule that begins with a stage and lasts for `tokens` tokens."""
    if not (shape.lr > 0.0 and math.isfinite(shape.lr)) or not 0.0 <= shape.min_lr <= shape.lr:
        raise ConfigError(
            f"stage {stage.name!r}: lr {shape.lr}, min_lr {shape.min_lr}", "lr above 0 and min_lr from 0 to lr", "change --lr or --min-lr"
        )
    if shape.warmup_tokens > tokens:
        raise ConfigError(
            f"stage {stage.name!r}: a warm-up of {format_count(shape.warmup_tokens)} tokens in a schedule of {format_count(tokens)}",
            "a warm-up that is not longer than the schedule",
            "lower --lr-warmup-tokens or raise --train-tokens",
        )
    if shape.style == "inverse-square-root" and shape.warmup_tokens == 0:
        raise ConfigError(
            f"stage {stage.name!r}: lr_decay_style inverse-square-root, lr · sqrt(warm-up / tokens), without a warm-up",
            "a warm-up above 0",
            "give --lr-warmup-steps, --lr-warmup-tokens or --lr-warmup-fraction",
        )
    decays = shape.style not in ("constant", "inverse-square-root")
    if decays and shape.decay_tokens is not None and shape.decay_tokens <= shape.warmup_tokens:
        raise ConfigError(
            f"stage {stage.name!r}: the decay ends after {format_count(shape.decay_tokens)} tokens, the warm-up after "
            f"{format_count(shape.warmup_tokens)}",
            "a decay that ends above the warm-up; both are counted from the schedule's start",
            "raise --lr-decay-tokens or --lr-decay-steps, or remove it to decay until the schedule's end",
        )
    # A decay may end after the run, and a final decay then also begin before it.
    end = max(tokens, shape.decay_tokens or 0)
    if shape.wsd_decay_tokens > end:
        raise ConfigError(
            f"stage {stage.name!r}: a final decay of {format_count(shape.wsd_decay_tokens)} tokens in a schedule of {format_count(end)}",
            "a decay that is not longer than the schedule",
            "lower --lr-wsd-decay-tokens or raise --train-tokens",
        )
