"""May this run go on from that checkpoint?

In: the run and a checkpoint's trainer state. Out: the plan to go on with, or the reason why not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_patch.checkpoint_files import TrainerState
from megatron_patch.config.parsing import option_values
from megatron_patch.config.resolve import RunConfig
from megatron_patch.errors import CheckpointError, ConfigError
from megatron_patch.model.shape import ModelShape
from megatron_patch.stages import Stage, StagePlan

_GEOMETRY = ("patch_size", "positions", "global_batch_size", "steps", "side", "position_weights", "anneal_share", "blend")
_FREE_OPTIONS = {"micro_batch_size"}


def _first_difference(saved: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    for key in sorted({*saved, *given}):
        if saved.get(key) != given.get(key):
            return f"{key} = {saved.get(key)!r} in the checkpoint, {given.get(key)!r} now"
    return None


def check_model(state: TrainerState, run: RunConfig, weights_only: bool = False) -> None:
    """The checkpoint's model must be this run's.

    Args:
        state: of the checkpoint.
        run: this run.
        weights_only: a new run begins from the weights, for which initial weights and the longest rotary context mean nothing.

    Raises:
        CheckpointError: naming the first difference, or that there is no run to go on with.
    """
    if not weights_only and state.extra.get("weights_only"):
        raise CheckpointError(
            "the checkpoint holds weights alone, without a run to go on with",
            "a checkpoint of a run, or --finetune",
            "start a new run from the weights with --finetune --load … --save ELSEWHERE",
        )
    defaults = {f.name: f.default for f in dataclasses.fields(ModelShape) if f.default is not dataclasses.MISSING}
    saved, given = {**defaults, **state.model}, dataclasses.asdict(run.shape)
    free = {"padded_vocab_size"}  # which belongs to the layout
    if weights_only:
        free |= {"init_std"} | ({"max_positions"} if run.shape.position_embedding == "rope" else set())
    saved, given = ({name: value for name, value in values.items() if name not in free} for values in (saved, given))
    difference = _first_difference(saved, given)
    if difference:
        raise CheckpointError(
            f"the checkpoint is of another model: {difference}",
            "the model's flags that the checkpoint was made with",
            "change the flags or --load",
        )


def check_data(state: TrainerState, fingerprint: Mapping[str, Any]) -> None:
    """The data must not have changed since the checkpoint.

    Raises:
        CheckpointError: naming what changed.
    """
    difference = _first_difference(state.data_fingerprint, fingerprint)
    if difference:
        raise CheckpointError(
            f"the data has changed since the checkpoint: {difference}",
            "the very files that the run began with, in the same blend and split",
            "restore them, or start a new run from the weights with --finetune --load … --save ELSEWHERE",
        )


def _same_request(state: TrainerState, run: RunConfig) -> bool:
    """Whether the options that make the plan are those of the checkpoint, so that plans differ by rounding to ranks alone."""
    names = [f.name for f in dataclasses.fields(run.options.stages) if f.name not in _FREE_OPTIONS]
    now = option_values(run.options)
    saved = state.config.get("options", {})
    return all(saved.get(name) == now[name] for name in names)


def plan_to_resume(state: TrainerState, run: RunConfig) -> StagePlan:
    """The plan to go on with: the checkpoint's batches and steps, this run's learning rates and micro-batches.

    A global batch given in tokens was rounded to the ranks of the first start; it stays what it was on any number of ranks.

    Raises:
        CheckpointError: the flags ask for another plan.
    """
    try:
        saved = StagePlan.from_json(state.plan)
    except ConfigError as error:
        raise CheckpointError(
            f"the checkpoint's plan cannot be read: {error.what}", "a checkpoint of this version", "use the version that wrote it"
        ) from error
    given = run.plan

    def geometry(plan: StagePlan) -> dict[str, Any]:
        values: dict[str, Any] = {"block_tokens": plan.block_tokens, "number of stages": len(plan.stages)}
        for stage in plan.stages:
            values.update({f"stage {stage.name}: {name}": getattr(stage, name) for name in _GEOMETRY})
        return values

    difference = _first_difference(geometry(saved), geometry(given))
    if difference and not _same_request(state, run):
        raise CheckpointError(
            f"the checkpoint is of another plan: {difference}",
            "the flags for stages, batch and tokens that the run began with (micro-batch, learning rate and layout may change)",
            "restore them, or start a new run from the weights with --finetune --load … --save ELSEWHERE",
        )

    def merge(old: Stage, new: Stage) -> Stage:
        return dataclasses.replace(new, **{name: getattr(old, name) for name in ("steps", "global_batch_size")})

    return StagePlan(tuple(merge(old, new) for old, new in zip(saved.stages, given.stages, strict=True)), saved.block_tokens)
