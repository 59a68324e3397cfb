"""The plan that a resumed run follows: what its first start resolved stays, and only what the user changed on purpose changes.

In: the checkpoint's plan, where it stands in it, and the plans that its options and the present ones describe with the same global batch.
Out: the plan to follow, and what has changed or cannot change.

More --train-tokens, and stages appended to `stages:`, extend a plan. Stages that have ended keep their tokens. Stages with their own tokens
or steps get these, and the others share the rest. The learning rates of the steps that are done must not depend on the old end, or the run
would not be the one that the longer plan describes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_patch.config.plan_builder import whole_steps
from megatron_patch.config.resolve import RunConfig
from megatron_patch.config.schedules import check_schedules
from megatron_patch.config.stage_spec import BALANCE_KEYS, StageSpec, parse_stages, stage_specs
from megatron_patch.errors import CheckpointError, ConfigError
from megatron_patch.stages import LrShape, Progress, Stage, StagePlan, position_weights
from megatron_patch.training.lr_schedule import Segment, build_lr_schedule
from megatron_patch.utils.units import format_count, plural

_GEOMETRY = ("patch_size", "positions", "global_batch_size", "side", "anneal_share")
_AT_A_SWITCH = ("lr_policy", "optimizer")
_EXTENDING = {"train_tokens", "stages"}
_LR_LENGTHS = {
    "warmup_tokens": ("lr_warmup_tokens", "lr_warmup_steps", "lr_warmup_fraction"),
    "decay_tokens": ("lr_decay_tokens", "lr_decay_steps"),
    "wsd_decay_tokens": ("lr_wsd_decay_tokens", "lr_wsd_decay_steps", "lr_wsd_decay_fraction"),
}
"""Lengths that the first start resolved from steps or shares of the plan, with the options that change them on purpose, of which those in
tokens and in steps are also keys of an entry of `stages:`."""
_LR_VALUES = [field.name for field in dataclasses.fields(LrShape) if field.name not in _LR_LENGTHS]
_EARLIER_WEIGHTS: dict[str, Callable[[int], float]] = {"exponential": lambda k: 2.0**-k}
"""Formulas of --position-weights that earlier versions had under these names. A run that began with one keeps its weights."""

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
        kept: what a new run with the same options would do differently, because the program has changed, as such sentences.
    """

    plan: StagePlan
    differences: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def resume_plan(saved: StagePlan, then: RunConfig, now: RunConfig, progress: Progress, changed: Changed) -> ResumedPlan:
    """Returns the plan that a resumed run follows.

    Args:
        saved: the checkpoint's plan.
        then: the run with the checkpoint's options for stages, learning rates and data, and the plan that they describe with the global
            batch of `saved`.
        now: the run with the present options, and the plan that these describe with that batch.
        progress: where the checkpoint stands.
        changed: the options for stages and learning rates that differ from the checkpoint's.

    Raises:
        CheckpointError: the checkpoint's plan does not follow from its own options.
        ConfigError: the changed options give no valid plan.
    """
    _check_own_plan(saved, then)
    differences = _differences(saved, then, now, progress) + _data_differences(then, now)
    if differences:
        return ResumedPlan(saved, tuple(differences))
    pairs = itertools.zip_longest(then.plan.stages, now.plan.stages)
    lengths_differ = any(old is None or old.steps != new.steps for old, new in pairs)
    specs = stage_specs(now.options.stages)
    if lengths_differ:
        differences = _shorter_or_changed(then.plan, now.plan, progress, changed, specs)
        if differences:
            return ResumedPlan(saved, tuple(differences))
    try:
        plan = _extended(saved, now.plan, progress, specs) if lengths_differ else saved
        plan = _with_free_values(plan, now.plan)
        plan = _with_schedules(plan, saved, then.plan, now.reschedule(plan), progress, changed)
        check_schedules(plan)
        _check_past(saved, plan, progress)
    except _CannotExtend as error:
        read = f"{saved.consumed_tokens(progress):,} of {saved.tokens:,} tokens"
        return ResumedPlan(saved, (f"the run cannot be extended at {read}: {error}",))
    return ResumedPlan(plan, changes=tuple(_changes(saved, plan, changed)), kept=tuple(_kept(saved, then)))


def difference(name: str, then: str, now: str) -> str:
    """Returns the words in which a start is refused because a value differs from the checkpoint's."""
    return f"{name} {now} (checkpoint: {then})"


def change(name: str, then: str, now: str) -> str:
    """Returns the words in which a value that was changed on purpose is printed."""
    return f"{name} {then}, now {now}"


def tokens_to_continue_at(plan: StagePlan, progress: Progress, window_blocks: int) -> int:
    """Returns the tokens after which no token is read that the run has read already: the end of the shuffle window, or of the stage.

    Args:
        plan: the plan of the run.
        progress: where it stands.
        window_blocks: size of its shuffle windows.
    """
    stage, first = plan.stages[progress.stage_index], plan.first_block(progress.stage_index)
    blocks = -(-progress.stage_step * stage.tokens_per_step // plan.block_tokens)
    if blocks == 0:
        return first * plan.block_tokens
    ends = (0, *stage.earlier_ends, plan.last_block(progress.stage_index) - first)
    begin, end = next((low, high) for low, high in itertools.pairwise(ends) if low < blocks <= high)
    windows = -(-(blocks - begin) // window_blocks)
    return (first + min(begin + windows * window_blocks, end)) * plan.block_tokens


def _check_own_plan(saved: StagePlan, then: RunConfig) -> None:
    """Checks that a checkpoint's plan follows from its own options; another version of the program may round lengths differently."""
    before, specs, found = then.plan, stage_specs(then.options.stages), list[str]()
    in_steps = then.options.schedule.lr_decay_steps is not None or any(spec.lr_decay_steps is not None for spec in specs)
    if len(saved.stages) != len(before.stages):
        found += [f"it has {plural(len(saved.stages), 'stage')} in place of {len(before.stages)}"]
    if saved.block_tokens != before.block_tokens:
        found.append(f"its blocks have {saved.block_tokens:,} tokens in place of {before.block_tokens:,}")
    if abs(saved.tokens - before.tokens) > _rounding(saved):
        found.append(f"it has {saved.tokens:,} tokens in place of {before.tokens:,}")
    for old, new, weights in zip(saved.stages, before.stages, _weight_names(then), strict=False):
        names = (*_GEOMETRY, *_AT_A_SWITCH, "blend")
        found += [_in_place(old.name, name, old, new) for name in names if getattr(old, name) != getattr(new, name)]
        if not _close(old.position_weights, new.position_weights) and not _close(
            old.position_weights, _earlier_weights(weights, new) or ()
        ):
            found.append(_in_place(old.name, "position_weights", old, new))
        values = _LR_VALUES if in_steps else [*_LR_VALUES, "decay_tokens"]
        found += [_in_place(old.name, name, old.lr, new.lr) for name in values if getattr(old.lr, name) != getattr(new.lr, name)]
        if min(old.lr.warmup_tokens, old.lr.wsd_decay_tokens, old.rewarm_tokens) < 0 or (old.lr.decay_tokens or 1) < 1:
            found.append(f"a length of stage {old.name}'s learning rate is negative")
    try:
        if not found:
            check_schedules(saved)
    except ConfigError as error:
        found.append(error.what)
    if found:
        raise CheckpointError(
            f"the checkpoint's plan does not follow from the options in it: {'; '.join(found)}"[:1000],
            "a trainer state as this program wrote it, and for a recipe of your own the recipe that the run began with",
            "resume from another checkpoint",
        )


def _weight_names(run: RunConfig) -> list[str | tuple[float, ...]]:
    """Returns --position-weights of each stage as given: a name or numbers."""
    return [spec.position_weights or run.options.stages.position_weights for spec in stage_specs(run.options.stages)]


def _earlier_weights(name: str | tuple[float, ...], stage: Stage) -> tuple[float, ...] | None:
    """Returns the label weights that an earlier version gave a stage by this name, or None if the name always had its present formula."""
    formula = _EARLIER_WEIGHTS.get(name) if isinstance(name, str) else None
    labels = stage.labels_per_position
    return None if formula is None else position_weights(tuple(formula(k) for k in range(labels)), labels)


def _kept(saved: StagePlan, then: RunConfig) -> list[str]:
    """Returns sentences on the stages that keep label weights of an earlier version."""
    return [
        f"--position-weights {name} has another formula in new runs; stage {old.name} keeps its weights ({_first(old.position_weights)})"
        for old, new, name in zip(saved.stages, then.plan.stages, _weight_names(then), strict=True)
        if not _close(old.position_weights, new.position_weights)
    ]


def _first(weights: Sequence[float]) -> str:
    shown = ", ".join(f"{weight:.4g}" for weight in weights[:8])
    return shown if len(weights) <= 8 else f"{shown}, …"


def _rounding(plan: StagePlan) -> int:
    """Returns the tokens by which full steps and blocks may change the length of a plan."""
    return sum(math.lcm(plan.block_tokens, stage.tokens_per_step) for stage in plan.stages)


def _in_place(stage: str, name: str, old: Any, new: Any) -> str:
    return f"{name} of stage {stage} is {_text(getattr(old, name))} in place of {_text(getattr(new, name))}"


def _differences(saved: StagePlan, then: RunConfig, run: RunConfig, progress: Progress) -> list[str]:
    """Returns what cannot change, apart from the number of steps: blocks, samples, batches, weights, and the switches that are past."""
    before, now, found = then.plan, run.plan, list[str]()
    if now.block_tokens != before.block_tokens:
        found.append(difference("tokens of a block", _text(before.block_tokens), _text(now.block_tokens)))
    if len(now.stages) < len(before.stages):
        found.append(difference("number of stages", _text(len(before.stages)), _text(len(now.stages))))
    for index, (old, new) in enumerate(zip(before.stages, now.stages, strict=False)):
        names = (*_GEOMETRY, *_AT_A_SWITCH) if _has_begun(index, progress) else _GEOMETRY
        found += [_difference(old.name, name, old, new) for name in names if getattr(old, name) != getattr(new, name)]
    weights = zip(saved.stages, now.stages, _weight_names(then), _weight_names(run), strict=False)
    found += [
        _difference(old.name, "position_weights", old, new)
        for old, new, name_then, name_now in weights
        if name_then != name_now and not _close(old.position_weights, new.position_weights)
    ]
    return found


def _has_begun(index: int, progress: Progress) -> bool:
    """Returns whether a step of the stage with this number is done."""
    return index < progress.stage_index or (index == progress.stage_index and progress.stage_step > 0)


def _data_differences(then: RunConfig, now: RunConfig) -> list[str]:
    """Returns the stages that read other corpora, or in other shares.

    A corpus is known by its number in `RunConfig.corpus_names`, so that its files may have moved; the fingerprint of the data compares
    their content.
    """
    found = []
    for old, new in zip(then.plan.stages, now.plan.stages, strict=False):
        same_corpora = [then.corpus_names.index(name) for name, _ in old.blend or ()] == [
            now.corpus_names.index(name) for name, _ in new.blend or ()
        ]
        if not same_corpora or not _close([weight for _, weight in old.blend or ()], [weight for _, weight in new.blend or ()]):
            found.append(_difference(old.name, "blend", old, new))
    if now.plan.lookahead_tokens != then.plan.lookahead_tokens:
        longest = max(stage.patch_size for stage in now.plan.stages)
        found.append(f"patches of {longest} tokens, which reserve more tokens at the end of the corpora than those of the checkpoint")
    return found


def _close(first: Sequence[float], second: Sequence[float]) -> bool:
    return len(first) == len(second) and all(math.isclose(a, b, rel_tol=1e-12) for a, b in zip(first, second, strict=True))


def _difference(stage: str, name: str, old: Any, new: Any) -> str:
    return difference(f"stage {stage}: {name}", _text(getattr(old, name)), _text(getattr(new, name)))


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _has_amount(spec: StageSpec) -> bool:
    """Returns whether an entry of `stages:` gives its own tokens or steps, so that it takes no share of the rest."""
    return spec.tokens is not None or spec.steps is not None


def _shorter_or_changed(before: StagePlan, now: StagePlan, progress: Progress, changed: Changed, specs: Sequence[StageSpec]) -> list[str]:
    """Returns why other lengths do not extend the plan; an empty list if they do."""
    last = len(before.stages) - 1
    if len(now.stages) > len(before.stages) and before.tokens % before.block_tokens and now.stages[last].steps < before.stages[last].steps:
        name, block = before.stages[last].name, before.block_tokens
        return [f"stage {name} ends inside a block of {block:,} tokens, so no stage can follow it"]
    pairs = list(zip(before.stages, now.stages, strict=False))
    longer = len(now.stages) > len(before.stages) or now.tokens > before.tokens
    if not longer or not changed.keys() & _EXTENDING or changed.keys() & {"patch_fraction", "patch_compute_share"}:
        return [_difference(old.name, "steps", old, new) for old, new in pairs if old.steps != new.steps]
    return [
        _difference(old.name, "steps", old, new)
        for index, (old, new) in enumerate(pairs)
        if _has_amount(specs[index]) and (new.steps < old.steps or (new.steps > old.steps and index < progress.stage_index))
    ]


def _with_free_values(plan: StagePlan, now: StagePlan) -> StagePlan:
    """Returns the plan with what the present options may change at any start.

    That is micro-batches, the ranks that share a sample, names, places of data, later switches, the balance of experts.
    """
    free = ("micro_batch_size", "context_parallel_size", "name", "lr_policy", "optimizer", "blend", "expert_balance")
    stages = [
        dataclasses.replace(stage, **{name: getattr(new, name) for name in free})
        for stage, new in zip(plan.stages, now.stages, strict=True)
    ]
    return StagePlan(tuple(stages), plan.block_tokens)


def _extended(saved: StagePlan, now: StagePlan, progress: Progress, specs: Sequence[StageSpec]) -> StagePlan:
    """Returns the plan with the tokens that the options describe: ended stages stay, and stages without an own amount share the rest."""
    current, last = progress.stage_index, len(now.stages) - 1
    grows = _has_amount(specs[current]) and now.stages[current].steps > saved.stages[current].steps
    if progress.stage_step == saved.stages[current].steps and current < last and not grows:
        current += 1
    stages = list(saved.stages[:current])
    rest = list(enumerate(now.stages))[current:]
    own = sum(stage.tokens for index, stage in rest if _has_amount(specs[index]))
    sharing = sum(stage.tokens for index, stage in rest if not _has_amount(specs[index]))
    left = now.tokens - sum(stage.tokens for stage in stages) - own
    for index, new in rest:
        stage = saved.stages[index] if index < len(saved.stages) else new
        done = progress.stage_step if index == progress.stage_index else 0
        wanted = new.tokens if _has_amount(specs[index]) else new.tokens * left / sharing
        steps = whole_steps(wanted, new.tokens_per_step, saved.block_tokens if index < last else 1) if wanted > 0 else 0
        if steps < (stage.steps if done else 1):
            raise _CannotExtend(f"stage {new.name} would have {plural(steps, 'step')} in place of {stage.steps:,}")
        if done and steps != stage.steps:
            if stage.anneal_share > 0 and done > stage.steps * (1 - stage.anneal_share):
                raise _CannotExtend(f"the label weights of stage {stage.name} already move toward its end (anneal_share)")
            blocks = saved.last_block(index) - saved.first_block(index)
            stage = dataclasses.replace(stage, earlier_ends=(*(end for end in stage.earlier_ends if end < blocks), blocks))
        stages.append(dataclasses.replace(stage, steps=steps))
    try:
        plan = StagePlan(tuple(stages), saved.block_tokens)
    except ConfigError as error:
        raise _CannotExtend(error.what) from error
    if abs(plan.tokens - now.tokens) > _rounding(plan):
        raise _CannotExtend(f"its stages would read {plan.tokens:,} tokens in place of {now.tokens:,}; no stage takes the difference")
    return plan


def _with_schedules(
    plan: StagePlan, saved: StagePlan, before: StagePlan, rescheduled: StagePlan, progress: Progress, changed: Changed
) -> StagePlan:
    """Returns the plan with the learning rates that the options describe; what has not changed on purpose stays.

    Args:
        plan: the plan to follow.
        saved: the checkpoint's plan.
        before: the plan that the checkpoint's options describe.
        rescheduled: `plan` with all learning rates from the present options.
        progress: where the checkpoint stands.
        changed: the options that differ from the checkpoint's.
    """
    stages = list(rescheduled.stages)
    then, now = (parse_stages(text) if isinstance(text, str) else () for text in changed.get("stages", (None, None)))
    for index, (old, new) in enumerate(zip(saved.stages, rescheduled.stages, strict=False)):
        same = [name for name in _LR_VALUES if getattr(before.stages[index].lr, name) == getattr(new.lr, name)]
        lengths: set[str] = set()
        if _has_begun(index, progress) or plan.stages[index].steps == old.steps:
            lengths = {name for name, options in _LR_LENGTHS.items() if not changed.keys() & options}
            if index < min(len(then), len(now)):
                lengths -= {name for name, options in _LR_LENGTHS.items() if _given(then[index], options) != _given(now[index], options)}
            if old.lr.style != new.lr.style:
                lengths.discard("wsd_decay_tokens")
        shape = dataclasses.replace(new.lr, **{name: getattr(old.lr, name) for name in (*same, *lengths)})
        rewarm = old.rewarm_tokens if "warmup_tokens" in lengths and old.lr_policy == new.lr_policy else new.rewarm_tokens
        stages[index] = dataclasses.replace(new, lr=shape, rewarm_tokens=rewarm)
    return StagePlan(tuple(stages), plan.block_tokens)


def _given(spec: StageSpec, options: Sequence[str]) -> list[Any]:
    """Returns the values of those options that are keys of an entry of `stages:`."""
    return [getattr(spec, name) for name in options if hasattr(spec, name)]


def _check_past(saved: StagePlan, plan: StagePlan, progress: Progress) -> None:
    """Checks that the schedules that have begun give the steps that are done the same learning rates with the new end."""
    consumed = saved.consumed_tokens(progress)
    olds = {segment.first_tokens: segment for segment in build_lr_schedule(saved).segments}
    for new in build_lr_schedule(plan).segments:
        old = olds.get(new.first_tokens)
        if old is None or consumed <= new.first_tokens or old.last_tokens == new.last_tokens:
            continue
        if any(getattr(old.shape, name) != getattr(new.shape, name) for name in ("style", "decay_tokens", "wsd_decay_tokens")):
            # The schedule has been changed on purpose, which is reported.
            continue
        if not _may_end_elsewhere(old, new, min(consumed, old.last_tokens) - old.first_tokens):
            length = format_count(old.last_tokens - old.first_tokens)
            raise _CannotExtend(f"its {new.shape.style} schedule of {length} tokens has begun, and depends on its end")


def _may_end_elsewhere(old: Segment, new: Segment, done: int) -> bool:
    """Returns whether the first `done` tokens of a schedule have the same learning rates with either end."""
    shape = new.shape
    if shape.style in ("constant", "inverse-square-root") or shape.decay_tokens is not None:
        return True
    shorter = min(old.last_tokens, new.last_tokens) - old.first_tokens
    return shape.style == "WSD" and done <= shorter - shape.wsd_decay_tokens


def _changes(saved: StagePlan, plan: StagePlan, changed: Changed) -> list[str]:
    """Returns sentences on the stages that differ from the checkpoint's."""
    sentences = []
    for old, new in itertools.zip_longest(saved.stages, plan.stages):
        if old is None:
            sentences.append(f"new stage {new.name}, {plural(new.steps, 'step')}")
            continue
        names = ("steps", "rewarm_tokens", *_AT_A_SWITCH)
        sentences += [_change(new.name, name, old, new) for name in names if getattr(old, name) != getattr(new, name)]
        if "stages" in changed:  # otherwise the changed flags say it
            then, now = old.expert_balance, new.expert_balance
            values = ((key, getattr(then, field), getattr(now, field)) for key, field in BALANCE_KEYS.items())
            sentences += [change(f"stage {new.name}: {key}", f"{was:g}", f"{value:g}") for key, was, value in values if was != value]
        sentences += [
            _change(new.name, field.name, old.lr, new.lr, "lr: ")
            for field in dataclasses.fields(LrShape)
            if new.lr_policy == "restart" and getattr(old.lr, field.name) != getattr(new.lr, field.name)
        ]
    return sentences


def _change(stage: str, name: str, old: Any, new: Any, part: str = "") -> str:
    return change(f"stage {stage}: {part}{name}", _text(getattr(old, name)), _text(getattr(new, name)))
