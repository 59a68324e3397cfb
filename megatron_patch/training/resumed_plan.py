"""The plan that a resumed run follows: what its first start resolved stays, and only what the user changed on purpose changes.

In: the checkpoint's plan, where it stands in it, and the plan that the present options describe with the same global batch. Out: the plan
to follow, or an error that names the flags.

More --train-tokens, and stages appended to `stages:`, extend a plan. Stages that have ended keep their tokens, and the others share the
rest as the options describe. The learning rates of the steps that are done must not depend on the old end, or the run would not be the one
that the longer plan describes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_patch.config.options import ScheduleOptions
from megatron_patch.config.plan_builder import check_schedules, whole_steps
from megatron_patch.config.resolve import RunConfig
from megatron_patch.config.stage_spec import parse_stages
from megatron_patch.errors import CheckpointError, ConfigError
from megatron_patch.stages import LrShape, Progress, StagePlan
from megatron_patch.training.lr_schedule import Segment, build_lr_schedule
from megatron_patch.utils.units import format_count

_GEOMETRY = ("patch_size", "positions", "global_batch_size", "side", "position_weights", "anneal_share", "blend")
_NOTED = ("steps", "lr_policy", "rewarm_tokens", "optimizer")
_EXTENDING = {"train_tokens", "stages"}
_LR_LENGTHS = {
    "warmup_tokens": ("lr_warmup_tokens", "lr_warmup_fraction"),
    "wsd_decay_tokens": ("lr_wsd_decay_tokens", "lr_wsd_decay_fraction"),
}
"""Lengths that the first start resolved from shares of the plan, with the options that change them on purpose; the first is also a key of
an entry of `stages:`."""

Changed = Mapping[str, tuple[Any, Any]]
"""Options that differ from the checkpoint's: name -> (value then, value now), as plain JSON values."""


class _CannotExtend(Exception):
    """The reason why a plan cannot be extended."""


@dataclass(frozen=True)
class ResumedPlan:
    """The plan of a resumed run.

    Args:
        plan: the plan to follow.
        differences: what makes the options' plan another one, which refuses the start; empty if the run can be resumed.
        changes: what differs from the checkpoint's plan on purpose, as sentences for the user.
    """

    plan: StagePlan
    differences: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()


def resume_plan(saved: StagePlan, run: RunConfig, progress: Progress, changed: Changed) -> ResumedPlan:
    """Returns the plan that a resumed run follows.

    Args:
        saved: the checkpoint's plan.
        run: the present options.
        progress: where the checkpoint stands.
        changed: the options for stages and learning rates that differ from the checkpoint's.

    Raises:
        CheckpointError: more --train-tokens or another stage cannot extend the plan, and the message says why; or nothing has changed, and
            the checkpoint's plan does not follow from its own options.
        ConfigError: the changed options give no valid plan, or the learning rates of the checkpoint's plan are not valid.
    """
    check_schedules(saved)
    described = run.plan_with_batch_of(saved)
    if not changed:
        _check_own_plan(saved, described)
        return ResumedPlan(_with_free_values(saved, described))
    differences = _differences(saved, described)
    if differences:
        return ResumedPlan(saved, tuple(differences))
    pairs = list(itertools.zip_longest(saved.stages, described.stages))
    lengths_differ = any(old is None or old.steps != new.steps for old, new in pairs)
    if lengths_differ and not _is_extension(saved, described, progress, changed):
        known = [(old, new) for old, new in pairs if old is not None and old.steps != new.steps]
        return ResumedPlan(saved, tuple(_difference(new.name, "steps", old, new) for old, new in known))
    try:
        plan = _extended(saved, described, progress) if lengths_differ else saved
        plan = _with_free_values(plan, described)
        plan = _with_schedules(plan, saved, run.reschedule(plan), progress, changed)
        check_schedules(plan)
        if lengths_differ:
            _check_past(saved, plan, progress)
    except _CannotExtend as error:
        raise _refusal(saved, run, progress, str(error)) from error
    return ResumedPlan(plan, changes=tuple(_changes(saved, plan)))


def _is_extension(saved: StagePlan, described: StagePlan, progress: Progress, changed: Changed) -> bool:
    """Returns whether only --train-tokens, `stages:` and learning rates have changed, the plan is longer, and ended stages are the same."""
    if changed.keys() - _EXTENDING - {field.name for field in dataclasses.fields(ScheduleOptions)}:
        return False
    ended = zip(saved.stages[: progress.stage_index], described.stages, strict=False)
    if "train_tokens" not in changed and any(old.steps != new.steps for old, new in ended):
        return False
    return bool(changed.keys() & _EXTENDING) and (len(described.stages) > len(saved.stages) or described.tokens > saved.tokens)


def _check_own_plan(saved: StagePlan, described: StagePlan) -> None:
    """Checks that a plan roughly follows from its own options; another version of the program may round it differently."""
    if len(saved.stages) != len(described.stages) or not 0.8 < described.tokens / saved.tokens < 1.25:
        raise CheckpointError(
            f"the checkpoint's plan has {len(saved.stages)} stages and {saved.tokens:,} tokens, but its own options describe "
            f"{len(described.stages)} stages and {described.tokens:,} tokens",
            "a checkpoint whose trainer state was not changed",
            "resume from another checkpoint",
        )


def _differences(saved: StagePlan, described: StagePlan) -> list[str]:
    """Returns what cannot change, apart from the number of steps: blocks, samples, batches and weights of the stages."""
    found = []
    if described.block_tokens != saved.block_tokens:
        found.append(f"tokens of a block {described.block_tokens:,}, {saved.block_tokens:,} in the checkpoint")
    if len(described.stages) < len(saved.stages):
        found.append(f"number of stages {len(described.stages)}, {len(saved.stages)} in the checkpoint")
    for old, new in zip(saved.stages, described.stages, strict=False):
        found += [_difference(new.name, name, old, new) for name in _GEOMETRY if getattr(old, name) != getattr(new, name)]
    return found


def _difference(stage: str, name: str, old: Any, new: Any) -> str:
    return f"stage {stage}: {name} {_text(getattr(new, name))}, {_text(getattr(old, name))} in the checkpoint"


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _with_free_values(plan: StagePlan, described: StagePlan) -> StagePlan:
    """Returns the plan with what the present options may change at any start: micro-batches, names, and what happens at a switch."""
    stages = [
        dataclasses.replace(stage, micro_batch_size=new.micro_batch_size, name=new.name, lr_policy=new.lr_policy, optimizer=new.optimizer)
        for stage, new in zip(plan.stages, described.stages, strict=True)
    ]
    return StagePlan(tuple(stages), plan.block_tokens)


def _extended(saved: StagePlan, described: StagePlan, progress: Progress) -> StagePlan:
    """Returns the plan with the tokens that the options describe: ended stages stay, the others share the rest in proportion."""
    current = progress.stage_index
    last = len(described.stages) - 1
    if progress.stage_step == saved.stages[current].steps and current < last:
        current += 1
    ended = saved.stages[:current]
    left = described.tokens - sum(stage.tokens for stage in ended)
    share = left / sum(stage.tokens for stage in described.stages[current:])
    stages = list(ended)
    for index, new in enumerate(described.stages[current:], start=current):
        wanted = new.tokens * share
        steps = whole_steps(wanted, new.tokens_per_step, saved.block_tokens if index < last else 1) if wanted > 0 else 0
        done = progress.stage_step if index == progress.stage_index else 0
        if steps < max(1, done):
            raise _CannotExtend(f"{format_count(described.tokens)} tokens leave stage {new.name} fewer steps than are done")
        stage = saved.stages[index] if index < len(saved.stages) else new
        if done and steps != stage.steps:
            blocks = saved.last_block(index) - saved.first_block(index)
            annealing = stage.anneal_share > 0 and done > stage.steps * (1 - stage.anneal_share)
            if annealing:
                raise _CannotExtend(f"the label weights of stage {stage.name} already move toward its end (anneal_share)")
            stage = dataclasses.replace(stage, earlier_ends=(*(end for end in stage.earlier_ends if end < blocks), blocks))
        stages.append(dataclasses.replace(stage, steps=steps))
    try:
        return StagePlan(tuple(stages), saved.block_tokens)
    except ConfigError as error:
        raise _CannotExtend(error.what) from error


def _with_schedules(plan: StagePlan, saved: StagePlan, rescheduled: StagePlan, progress: Progress, changed: Changed) -> StagePlan:
    """Returns the plan with the learning rates that the options describe; lengths in tokens stay unless their own options changed.

    Args:
        plan: the plan to follow.
        saved: the checkpoint's plan.
        rescheduled: `plan` with all learning rates from the present options.
        progress: where the checkpoint stands.
        changed: the options that differ from the checkpoint's.
    """
    stages = list(rescheduled.stages)
    then, now = (parse_stages(text) if isinstance(text, str) else () for text in changed.get("stages", (None, None)))
    for index, (old, new) in enumerate(zip(saved.stages, rescheduled.stages, strict=False)):
        begun = index < progress.stage_index or (index == progress.stage_index and progress.stage_step > 0)
        if not begun and plan.stages[index].steps != old.steps:
            continue
        kept = {name for name, options in _LR_LENGTHS.items() if not changed.keys() & options}
        if index < min(len(then), len(now)):
            kept -= {name for name, (key, _) in _LR_LENGTHS.items() if getattr(then[index], key) != getattr(now[index], key)}
        if old.lr.style != new.lr.style:
            kept.discard("wsd_decay_tokens")
        shape = dataclasses.replace(new.lr, **{name: getattr(old.lr, name) for name in kept})
        stages[index] = dataclasses.replace(
            new, lr=shape, rewarm_tokens=old.rewarm_tokens if "warmup_tokens" in kept else new.rewarm_tokens
        )
    return StagePlan(tuple(stages), plan.block_tokens)


def _check_past(saved: StagePlan, plan: StagePlan, progress: Progress) -> None:
    """Checks that the schedules that have begun give the steps that are done the same learning rates with the new end."""
    consumed = saved.consumed_tokens(progress)
    olds = {segment.first_tokens: segment for segment in build_lr_schedule(saved).segments}
    for new in build_lr_schedule(plan).segments:
        old = olds.get(new.first_tokens)
        if old is None or consumed <= new.first_tokens or old.last_tokens == new.last_tokens:
            continue
        if not _may_grow(new.shape, old, min(consumed, old.last_tokens) - old.first_tokens):
            raise _CannotExtend(f"the learning rate ({new.shape.style}) already depends on the end of the schedule")


def _may_grow(shape: LrShape, old: Segment, done: int) -> bool:
    """Returns whether the first `done` tokens of a schedule have the same learning rates if it ends later."""
    if shape.style in ("constant", "inverse-square-root") or shape.decay_tokens is not None:
        return True
    return shape.style == "WSD" and done <= old.last_tokens - old.first_tokens - shape.wsd_decay_tokens


def _refusal(saved: StagePlan, run: RunConfig, progress: Progress, reason: str) -> CheckpointError:
    read = saved.consumed_tokens(progress)
    blocks = -(-read // saved.block_tokens)
    return CheckpointError(
        f"more --train-tokens or stages cannot extend this run at {read:,} of {saved.tokens:,} tokens: {reason}",
        "--train-tokens and stages of the first start; more of them while the learning rate does not depend on the end (constant, "
        "inverse-square-root, or WSD before its final decay), or in a new last stage that restarts the learning rate",
        "restore the flags, or start a new run that takes the weights and continues after the tokens of this one: --finetune --load … "
        f"--save ELSEWHERE --start-tokens {run.options.stages.start_tokens + blocks * saved.block_tokens}",
    )


def _changes(saved: StagePlan, plan: StagePlan) -> list[str]:
    """Returns sentences on the stages that differ from the checkpoint's."""
    sentences = []
    for old, new in itertools.zip_longest(saved.stages, plan.stages):
        if old is None:
            sentences.append(f"new stage {new.name}, {new.steps:,} steps")
            continue
        sentences += [_change(new.name, name, old, new) for name in _NOTED if getattr(old, name) != getattr(new, name)]
        sentences += [
            _change(new.name, field.name, old.lr, new.lr, "lr: ")
            for field in dataclasses.fields(LrShape)
            if getattr(old.lr, field.name) != getattr(new.lr, field.name)
        ]
    return sentences


def _change(stage: str, name: str, old: Any, new: Any, part: str = "") -> str:
    return f"stage {stage}: {part}{name} {_text(getattr(old, name))}, now {_text(getattr(new, name))}"
