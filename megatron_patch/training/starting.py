"""Where a run starts: anew, from the weights of another, or where it stood.

In: the flags, on every rank. Out: the newest sound checkpoint, the same on every rank, and whether the run goes on with it. All ranks
together read what has to be verified, each a share of the files: one of them alone would need an hour for a large model's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_patch.checkpoint_files import Found, TrainerState, checkpoints, find_newest_sound, share_of_rank, step_of, verify
from megatron_patch.config.options import CheckpointOptions
from megatron_patch.engine.distributed import broadcast_object, gather_objects
from megatron_patch.errors import CheckpointError, MegatronPatchError
from megatron_patch.parallel.grid import Grid
from megatron_patch.stages import Place, StagePlan


@dataclass(frozen=True)
class Start:
    """What a run begins with.

    Args:
        found: the checkpoint, or None.
        resuming: whether to go on with its run, and not to take its weights alone.
        begun_from: the --load that the run in --save began with, or None. Started again with the same --load, it goes on with its own.
    """

    found: Found | None = None
    resuming: bool = False
    begun_from: str | None = None


def find_start(options: CheckpointOptions, grid: Grid) -> Start:
    """What the flags ask for; every rank must call it.

    Raises:
        CheckpointError: there is no sound checkpoint where there should be one.
    """
    save = Path(options.save) if options.save is not None else None
    load = Path(options.load) if options.load is not None and options.load != options.save else None
    if load is None:
        found = newest_sound(save, grid) if save is not None else None
        return Start(found, found is not None, found.state.extra.get("begun_from") if found is not None else None)
    begun_from = os.path.abspath(load)
    if save is not None:
        own = None if options.finetune else lambda state: state.extra.get("begun_from") == begun_from
        found = newest_sound(save, grid, own)
        if found is not None:
            return Start(found, True, begun_from)
    found = newest_sound(load, grid)
    if found is None and options.finetune:
        raise CheckpointError(f"--load {load} holds no checkpoint", "a folder with step-N checkpoints", "check the path")
    return Start(found, found is not None and not options.finetune, begun_from)


def newest_sound(folder: Path, grid: Grid, wanted: Callable[[TrainerState], bool] | None = None) -> Found | None:
    """As `find_newest_sound`, by all ranks together.

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
            result = find_newest_sound(folder, wanted, check)
        except MegatronPatchError as error:
            result = error
        broadcast_object(None)
        broadcast_object(result)
    if isinstance(result, MegatronPatchError):
        raise result
    return result  # type: ignore[return-value]


def _verify_share(folder: Path, grid: Grid) -> list[str]:
    return verify(folder, lambda entries: share_of_rank({name: entry.size for name, entry in entries.items()}, grid.rank, grid.world_size))


def start_notes(start: Start, save: Path | None, plan: StagePlan, place: Place) -> list[str]:
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
        notes.append(_resumed(found, plan, place) if start.resuming else f"new run from the weights of {found.folder}")
    if save is not None and (newer := _newer_of_before(save, start)):
        notes.append(f"without --load the run would go on from {newer[0]} in {save}: move newer checkpoints away")
    return notes


def _resumed(found: Found, plan: StagePlan, place: Place) -> str:
    step, stage = plan.step(place), plan.stages[place.stage_index]
    done = " (nothing left to do)" if step == plan.steps else ""
    return f"resumed from {found.folder}: stage {stage.name}, step {step:,} of {plan.steps:,}{done}"


def _newer_of_before(save: Path, start: Start) -> list[str]:
    """Names of the run's checkpoints behind the one that --load has it go back to."""
    if start.found is None or not start.resuming or start.begun_from is None:
        return []
    return [folder.name for folder in checkpoints(save) if (step_of(folder) or 0) > start.found.state.step]
