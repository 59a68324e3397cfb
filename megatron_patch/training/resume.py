"""Where a run starts, and whether it may: a new run, a run from another's weights, or a resumed run.

In: the flags, on every rank. Out: the newest valid checkpoint, the same on every rank; whether the run resumes it; and the plan to go on
with, or the reason why that is refused. All ranks verify checkpoints together, each a share of the files: one rank alone would need an
hour for those of a large model.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.checkpoint.commit import FoundCheckpoint, find_newest_valid, list_checkpoints, share_of_rank, step_of, verify
from megatron_patch.checkpoint.trainer_state import TrainerState
from megatron_patch.config.options import CheckpointOptions
from megatron_patch.config.parsing import option_values
from megatron_patch.config.resolve import RunConfig
from megatron_patch.engine.distributed import broadcast_object, gather_objects
from megatron_patch.errors import CheckpointError, ConfigError, MegatronPatchError
from megatron_patch.model.shape import ModelShape
from megatron_patch.parallel.grid import Grid
from megatron_patch.stages import Progress, Stage, StagePlan


@dataclass(frozen=True)
class StartPoint:
    """What a run begins with.

    Args:
        found: the checkpoint, or None.
        resuming: whether to go on with its run, and not to take its weights alone.
        begun_from: the --load that the run in --save began with, or None. Started again with the same --load, it goes on with its own.
    """

    found: FoundCheckpoint | None = None
    resuming: bool = False
    begun_from: str | None = None


def find_start_point(options: CheckpointOptions, grid: Grid) -> StartPoint:
    """What the flags ask for; every rank must call it.

    Raises:
        CheckpointError: there is no sound checkpoint where there should be one.
    """
    save = Path(options.save) if options.save is not None else None
    load = Path(options.load) if options.load is not None and options.load != options.save else None
    if load is None:
        found = newest_valid(save, grid) if save is not None else None
        return StartPoint(found, found is not None, found.state.begun_from if found is not None else None)
    begun_from = os.path.abspath(load)
    if save is not None:
        own = None if options.finetune else lambda state: state.begun_from == begun_from
        found = newest_valid(save, grid, own)
        if found is not None:
            return StartPoint(found, True, begun_from)
    found = newest_valid(load, grid)
    if found is None and options.finetune:
        raise CheckpointError(f"--load {load} holds no checkpoint", "a folder with step-N checkpoints", "check the path")
    return StartPoint(found, found is not None and not options.finetune, begun_from)


def newest_valid(folder: Path, grid: Grid, wanted: Callable[[TrainerState], bool] | None = None) -> FoundCheckpoint | None:
    """As `find_newest_valid`, by all ranks together.

    Args:
        folder: of a run, or of one checkpoint.
        grid: this rank.
        wanted: looks at no others; rank 0's counts.
    """
    if grid.rank > 0:
        while (asked := broadcast_object(None)) is not None:
            gather_objects(_verify_share(Path(str(asked)), grid))
        result = broadcast_object(None)
    else:

        def check(candidate: Path) -> list[str]:
            broadcast_object(str(candidate))
            parts = gather_objects(_verify_share(candidate, grid))
            return list(dict.fromkeys(problem for part in parts for problem in part))  # type: ignore[attr-defined]

        try:
            result = find_newest_valid(folder, wanted, check)
        except MegatronPatchError as error:
            result = error
        broadcast_object(None)
        broadcast_object(result)
    if isinstance(result, MegatronPatchError):
        raise result
    return result  # type: ignore[return-value]


def _verify_share(folder: Path, grid: Grid) -> list[str]:
    return verify(folder, lambda entries: share_of_rank({name: entry.size for name, entry in entries.items()}, grid.rank, grid.world_size))


def start_notes(start: StartPoint, save: Path | None, plan: StagePlan, progress: Progress) -> list[str]:
    """What people are told of where the run starts.

    Args:
        start: what was found.
        save: the run's folder, or None.
        plan: of the run.
        place: where in it the run stands.
    """
    found, notes = start.found, []
    if found is None:
        notes.append("new run")
    else:
        notes += [f"skipped the checkpoint {folder}: {reason}" for folder, reason in found.skipped]
        notes.append(_resumed(found, plan, progress) if start.resuming else f"new run from the weights of {found.folder}")
    if save is not None and (newer := _newer_of_before(save, start)):
        notes.append(f"without --load the run would go on from {newer[0]} in {save}: move newer checkpoints away")
    return notes


def _resumed(found: FoundCheckpoint, plan: StagePlan, progress: Progress) -> str:
    step, stage = plan.step(progress), plan.stages[progress.stage_index]
    done = " (nothing left to do)" if step == plan.steps else ""
    return f"resumed from {found.folder}: stage {stage.name}, step {step:,} of {plan.steps:,}{done}"


def _newer_of_before(save: Path, start: StartPoint) -> list[str]:
    """Names of the run's checkpoints behind the one that --load has it go back to."""
    if start.found is None or not start.resuming or start.begun_from is None:
        return []
    return [folder.name for folder in list_checkpoints(save) if (step_of(folder) or 0) > start.found.state.step]


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
    if not weights_only and state.weights_only:
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
