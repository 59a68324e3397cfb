"""Decides how a run starts: as a new run, as a new run from another run's weights, or as a resumed run.

In: the options, on every rank. Out: `StartPoint`, the same on every rank, or an error that names the first difference between the
checkpoint and the options. All ranks verify a checkpoint together, each rank a share of the files, because one rank would need an hour for
a large model.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.checkpoint.commit import ValidCheckpoint, find_newest_valid, list_checkpoints, share_of_rank, step_of, verify
from megatron_patch.checkpoint.trainer_state import TrainerState
from megatron_patch.config.options import CheckpointOptions
from megatron_patch.config.parsing import option_values
from megatron_patch.config.resolve import RunConfig
from megatron_patch.engine.distributed import broadcast_object, gather_objects
from megatron_patch.errors import CheckpointError, ConfigError, MegatronPatchError
from megatron_patch.model.shape import ModelShape
from megatron_patch.parallel.grid import Grid
from megatron_patch.stages import Progress, Stage, StagePlan

_START_NEW = "start a new run from the weights with --finetune --load … --save ELSEWHERE"


@dataclass(frozen=True)
class StartPoint:
    """Where a run starts.

    Args:
        plan: the plan to follow.
        progress: the progress to start at.
        checkpoint: the checkpoint to load weights from; None: initial weights.
        resuming: whether the checkpoint's run is resumed; False: at most its weights are taken.
        begun_from: absolute path of the --load folder that the run first started from, or None. A later start with the same --load
            resumes the run's own checkpoints in --save.
    """

    plan: StagePlan
    progress: Progress
    checkpoint: ValidCheckpoint | None = None
    resuming: bool = False
    begun_from: str | None = None

    @property
    def stage(self) -> Stage:
        """The stage to start in."""
        return self.plan.stages[self.progress.stage_index]

    @property
    def resumed(self) -> TrainerState | None:
        """The trainer state to resume; None for a new run."""
        return self.checkpoint.state if self.checkpoint is not None and self.resuming else None


def find_start_point(run: RunConfig, grid: Grid) -> StartPoint:
    """Returns where the options --save, --load and --finetune start the run; every rank must call it.

    Raises:
        CheckpointError: there are checkpoints, but none is valid; or the checkpoint has another model or plan than the run.
    """
    found, resuming, begun_from = _find_checkpoint(run.options.checkpoint, grid)
    if found is not None:
        check_model(found.state, run, weights_only=not resuming)
    if found is None or not resuming:
        return StartPoint(run.plan, Progress(0, 0), found, False, begun_from)
    progress = Progress(found.state.stage_index, found.state.stage_step)
    return StartPoint(plan_to_resume(found.state, run), progress, found, True, begun_from)


def _find_checkpoint(options: CheckpointOptions, grid: Grid) -> tuple[ValidCheckpoint | None, bool, str | None]:
    """Returns the checkpoint to start from, whether its run is resumed, and the --load folder that the run first started from."""
    save = Path(options.save) if options.save is not None else None
    load = Path(options.load) if options.load is not None and options.load != options.save else None
    if load is None:
        found = find_newest_valid_together(save, grid) if save is not None else None
        return found, found is not None, found.state.begun_from if found is not None else None
    begun_from = os.path.abspath(load)
    if save is not None:
        started_from_load = None if options.finetune else lambda state: state.begun_from == begun_from
        found = find_newest_valid_together(save, grid, started_from_load)
        if found is not None:
            return found, True, begun_from
    found = find_newest_valid_together(load, grid)
    if found is None and options.finetune:
        raise CheckpointError(f"--load {load} contains no checkpoint", "a run's folder, or one of its step-N folders", "check the path")
    return found, found is not None and not options.finetune, begun_from


def find_newest_valid_together(folder: Path, grid: Grid, wanted: Callable[[TrainerState], bool] | None = None) -> ValidCheckpoint | None:
    """Returns what `find_newest_valid` finds on rank 0, verified by all ranks together; every rank must call it.

    Args:
        folder: the folder of a run or of one checkpoint.
        grid: coordinates of this rank.
        wanted: whether a checkpoint with this state may be returned; only rank 0's is called.

    Raises:
        CheckpointError: there are checkpoints, but none is valid.
    """
    if grid.rank > 0:
        while (candidate := broadcast_object(None)) is not None:
            gather_objects(_verify_share(Path(str(candidate)), grid))
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


def start_notes(start: StartPoint, save: Path | None) -> list[str]:
    """Returns sentences for the user about where the run starts.

    Args:
        start: the start point.
        save: the run's folder (--save), or None.
    """
    found, notes = start.checkpoint, []
    if found is None:
        notes.append("new run")
    else:
        notes += [f"skipped the checkpoint {folder}: {reason}" for folder, reason in found.skipped]
        notes.append(_resumed_note(start, found) if start.resuming else f"new run from the weights of {found.folder}")
    if save is not None and (newer := _newer_than_start(save, start)):
        notes.append(f"without --load the run would resume from {newer[0]} in {save}; move newer checkpoints away to prevent this")
    return notes


def _resumed_note(start: StartPoint, found: ValidCheckpoint) -> str:
    step, total = start.plan.step(start.progress), start.plan.steps
    done = " (nothing left to do)" if step == total else ""
    return f"resumed from {found.folder}: stage {start.stage.name}, step {step:,} of {total:,}{done}"


def _newer_than_start(save: Path, start: StartPoint) -> list[str]:
    """Returns the names of checkpoints in --save that are newer than the one that --load made the run return to."""
    if start.resumed is None or start.begun_from is None:
        return []
    return [folder.name for folder in list_checkpoints(save) if (step_of(folder) or 0) > start.resumed.step]


_GEOMETRY = ("patch_size", "positions", "global_batch_size", "steps", "side", "position_weights", "anneal_share", "blend")
_FREE_OPTIONS = {"micro_batch_size"}


def _first_difference(saved: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    for key in sorted({*saved, *given}):
        if saved.get(key) != given.get(key):
            return f"{key} = {saved.get(key)!r} in the checkpoint, {given.get(key)!r} now"
    return None


def check_model(state: TrainerState, run: RunConfig, weights_only: bool = False) -> None:
    """Checks that a checkpoint has the same model as this run.

    Args:
        state: the checkpoint's trainer state.
        run: this run.
        weights_only: whether a new run takes only the weights; the scale of initial weights may then differ, and with rotary position
            embeddings the context length, too.

    Raises:
        CheckpointError: the models differ (the first difference is named), or the checkpoint holds only weights and cannot be resumed.
    """
    if not weights_only and state.weights_only:
        raise CheckpointError(
            "the checkpoint holds only weights, so there is no run to resume",
            "a checkpoint of a run, or --finetune",
            _START_NEW,
        )
    defaults = {f.name: f.default for f in dataclasses.fields(ModelShape) if f.default is not dataclasses.MISSING}
    saved, given = {**defaults, **state.model}, dataclasses.asdict(run.shape)
    free = {"padded_vocab_size"}  # depends on the layout
    if weights_only:
        free |= {"init_std"} | ({"max_positions"} if run.shape.position_embedding == "rope" else set())
    saved, given = ({name: value for name, value in values.items() if name not in free} for values in (saved, given))
    difference = _first_difference(saved, given)
    if difference:
        raise CheckpointError(
            f"the checkpoint has another model: {difference}",
            "the model flags that the checkpoint was written with",
            "change the flags or --load",
        )


def check_data(state: TrainerState, fingerprint: Mapping[str, Any]) -> None:
    """Checks that the data is the same as when the checkpoint was written.

    Args:
        state: the checkpoint's trainer state.
        fingerprint: fingerprint of this run's training stream.

    Raises:
        CheckpointError: the data differs; the first difference is named.
    """
    difference = _first_difference(state.data_fingerprint, fingerprint)
    if difference:
        raise CheckpointError(
            f"the data or its order differs from the checkpoint's: {difference}",
            "the files that the run began with, and the same blend, --split, --seed, --shuffle-window-blocks and --start-tokens",
            f"restore them, or {_START_NEW}",
        )


def _same_request(state: TrainerState, run: RunConfig) -> bool:
    """Returns whether the options that make the plan equal the checkpoint's; the plans then differ at most by rounding to ranks."""
    names = [f.name for f in dataclasses.fields(run.options.stages) if f.name not in _FREE_OPTIONS]
    now = option_values(run.options)
    saved = state.config.get("options", {})
    return all(saved.get(name) == now[name] for name in names)


def plan_to_resume(state: TrainerState, run: RunConfig) -> StagePlan:
    """Returns the plan to resume with: batches and steps from the checkpoint, learning rates and micro-batches from this run.

    A global batch given in tokens was rounded to the ranks of the first start; it keeps that size on any number of ranks.

    Raises:
        CheckpointError: the flags describe another plan.
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
            f"the checkpoint has another plan: {difference}",
            "the flags for stages, batch and tokens that the run began with (micro-batch, learning rate and layout may change)",
            f"restore them, or {_START_NEW}",
        )

    def merge(old: Stage, new: Stage) -> Stage:
        return dataclasses.replace(new, **{name: getattr(old, name) for name in ("steps", "global_batch_size")})

    return StagePlan(tuple(merge(old, new) for old, new in zip(saved.stages, given.stages, strict=True)), saved.block_tokens)


def make_trainer_state(
    run: RunConfig,
    start: StartPoint,
    progress: Progress,
    fingerprint: Mapping[str, Any],
    guard: Mapping[str, Any],
    stage_end: bool,
    engine: Mapping[str, Any],
) -> TrainerState:
    """Returns what a checkpoint records, the counterpart of `find_start_point`.

    Args:
        run: the run.
        start: the start point of this process.
        progress: the progress to save.
        fingerprint: fingerprint of the training stream.
        guard: the step guard's state (`StepGuard.state`).
        stage_end: whether this is the checkpoint that ends the stage.
        engine: the engine's state (`Snapshot.state`).
    """
    plan, stage = start.plan, start.plan.stages[progress.stage_index]
    return TrainerState(
        step=plan.step(progress),
        stage_index=progress.stage_index,
        stage_step=progress.stage_step,
        stage_name=stage.name,
        consumed_tokens=plan.consumed_tokens(progress),
        consumed_samples=progress.stage_step * stage.global_batch_size,
        plan=plan.to_json(),
        config=run.to_json(),
        data_fingerprint=fingerprint,
        engine=dict(engine),
        model=dataclasses.asdict(run.shape),
        stage_end=stage_end,
        guard=guard,
        begun_from=start.begun_from,
        data_metadata=dataclasses.asdict(run.data_metadata) if run.data_metadata else None,
    )
