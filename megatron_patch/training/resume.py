"""Decides how a run starts: as a new run, as a new run from another run's weights, or as a resumed run.

In: the options, on every rank. Out: `StartPoint`, the same on every rank, or an error that names what differs between the checkpoint and
the options (`resume_checks`). All ranks verify a checkpoint together, each rank a share of the files, because one rank would need an hour
for a large model.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.checkpoint.commit import ValidCheckpoint, find_newest_valid, list_checkpoints, share_of_rank, step_of, verify
from megatron_patch.checkpoint.trainer_state import HeldOutName, TrainerState
from megatron_patch.config.options import CheckpointOptions
from megatron_patch.config.resolve import RunConfig
from megatron_patch.config.stage_spec import parse_blend
from megatron_patch.data.corpus_names import corpus_names
from megatron_patch.data.same_dataset import real_path
from megatron_patch.engine.distributed import broadcast_object, gather_objects
from megatron_patch.errors import CheckpointError, ConfigError, DataError, MegatronPatchError
from megatron_patch.parallel.grid import Grid
from megatron_patch.stages import Progress, Stage, StagePlan
from megatron_patch.training.resume_checks import check_resume, check_weights_of, progress_problems
from megatron_patch.utils.console import one_line
from megatron_patch.utils.files import same_path


@dataclass(frozen=True)
class StartPoint:
    """Where a run starts.

    Args:
        plan: the plan to follow.
        progress: the progress to start at.
        checkpoint: the checkpoint to load weights from; None: initial weights.
        resuming: whether the checkpoint's run is resumed; False: at most its weights are taken.
        begun_from: path, without symbolic links, of the --load folder that the run first started from, or None. A later start with the
            same --load resumes the run's own checkpoints in --save.
        changes: what the options changed since the checkpoint, as sentences for the user.
    """

    plan: StagePlan
    progress: Progress
    checkpoint: ValidCheckpoint | None = None
    resuming: bool = False
    begun_from: str | None = None
    changes: tuple[str, ...] = ()

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
        CheckpointError: there are checkpoints, but none is valid; or the checkpoint belongs to another run.
    """
    found, resuming, begun_from = _find_checkpoint(run.options.checkpoint, grid)
    if found is None or not resuming:
        if found is not None:
            check_weights_of(found.state, run)
        return StartPoint(run.plan, Progress(0, 0), found, False, begun_from)
    resumed = check_resume(found.state, run)
    progress = Progress(found.state.stage_index, found.state.stage_step)
    return StartPoint(resumed.plan, progress, found, True, begun_from, resumed.changes)


def _find_checkpoint(options: CheckpointOptions, grid: Grid) -> tuple[ValidCheckpoint | None, bool, str | None]:
    """Returns the checkpoint to start from, whether its run is resumed, and the --load folder that the run first started from."""
    save = Path(options.save) if options.save is not None else None
    load = Path(options.load) if options.load is not None else None
    if load is None or (save is not None and same_path(load, save)):
        found = find_newest_valid_together(save, grid) if save is not None else None
        return found, found is not None, found.state.begun_from if found is not None else None
    begun_from = os.path.realpath(load)
    if save is not None:

        def began_from_load(state: TrainerState) -> bool:
            return state.begun_from is not None and same_path(state.begun_from, load)

        found = find_newest_valid_together(save, grid, None if options.finetune else began_from_load)
        if found is not None and began_from_load(found.state):
            return found, True, begun_from
        goes_back = same_path(load.resolve().parent, save) and load.is_dir()
        if found is None and not goes_back:
            found = find_newest_valid_together(save, grid)
        if found is not None:
            raise CheckpointError(
                f"--load {load} with --save {save}, which holds a run that began from {found.state.begun_from or 'initial weights'}",
                f"a --save without checkpoints, or with those of a run that began from --load {load}; or a --load inside of --save, to go "
                "back to an earlier step of the same run",
                "choose another --save; or remove --load and --finetune to resume the run in --save",
            )
    if load.exists() and not load.is_dir():
        raise CheckpointError(f"--load {load} is not a folder", "a run's folder, or one of its step-N folders", "check the path")
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
            result = find_newest_valid(folder, wanted, check, progress_problems)
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
        notes.append("new run" if start.begun_from is None else f"new run, because {start.begun_from} (--load) contains no checkpoint")
    else:
        notes += [f"skipped the checkpoint {folder}: {reason}" for folder, reason in found.skipped]
        notes.append(_resumed_note(start, found) if start.resuming else f"new run from the weights of {found.folder}")
        notes += [f"changed since the checkpoint: {change}" for change in start.changes]
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


def make_trainer_state(
    run: RunConfig,
    start: StartPoint,
    progress: Progress,
    fingerprint: Mapping[str, Any],
    guard: Mapping[str, Any],
    stage_end: bool,
    engine: Mapping[str, Any],
    held_out: tuple[HeldOutName, ...] = (),
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
        held_out: the names under which the run has evaluated corpora so far.
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
        kept_config=start.checkpoint.state.kept_config if start.checkpoint is not None else {},
        held_out=held_out,
        own_model=run.own_model.name if run.own_model else None,
    )


def held_out_names(state: TrainerState | None) -> tuple[HeldOutName, ...]:
    """Returns the names under which a run has evaluated corpora; of checkpoints that do not record them, those that its options give."""
    if state is None:
        return ()
    if state.held_out:
        return tuple(dataclasses.replace(one, name=one_line(one.name)) for one in state.held_out)
    options = state.config["options"]
    words = options.get("valid_data_path") or options.get("data_path")
    try:
        blend = parse_blend([str(word) for word in words]) if isinstance(words, list) else ()
    except (ConfigError, DataError):
        return ()
    given = [word for word, _ in blend]
    return tuple(HeldOutName(name, real_path(word)) for name, word in zip(corpus_names(given), given, strict=True))
