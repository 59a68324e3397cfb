"""Commits checkpoints over all ranks, while training waits or in the background.

In: every rank's snapshot. Out: a checkpoint in the run's folder, published by rank 0 once the files of all ranks are on disk and verified.

With --async-save the snapshot is a copy in host memory, and a thread writes it while training continues. The ranks agree on their progress
by one small all-reduce for each step, which is started at the end of a step and read after the next, so that no rank waits for it. An error
on any rank is raised on all ranks, at the same step. Both modes write the same files.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_patch.checkpoint import commit
from megatron_patch.checkpoint.commit import ManifestEntry
from megatron_patch.checkpoint.lock import SaveLock
from megatron_patch.checkpoint.retention import Retention, prune
from megatron_patch.checkpoint.trainer_state import TrainerState
from megatron_patch.config.resolve import RunConfig
from megatron_patch.engine.distributed import broadcast_object, gather_objects
from megatron_patch.engine.interface import Engine
from megatron_patch.errors import CheckpointError, MegatronPatchError
from megatron_patch.parallel.grid import Grid
from megatron_patch.stages import StagePlan
from megatron_patch.training.callbacks.base import SaveRecord
from megatron_patch.training.faults.stop_requests import StopRequests
from megatron_patch.training.faults.watchdog import Watchdog
from megatron_patch.utils.console import make_console

_FAILED, _BUSY, _WRITTEN, _PUBLISHED = range(-1, 3)
_LOCK_SECONDS = 0.5  # between two looks at the lock of another job


@dataclass
class _Attempt:
    """A checkpoint that is not published yet, as this rank sees it."""

    step: int
    folder: Path
    began: float
    progress: int = _BUSY
    stall: float = 0.0
    entries: dict[str, ManifestEntry] = field(default_factory=dict)
    failure: str | None = None
    thread: threading.Thread | None = None
    reduction: tuple[torch.Tensor, Any] | None = None


class Checkpointer:
    """Saves the checkpoints of one run; every rank has one and calls the same methods at the same steps.

    Args:
        save: the run's folder.
        lock: the lock of that folder on rank 0, None on other ranks.
        rank: this rank.
        ranks: number of ranks.
        device: device of the tensors that ranks reduce.
        retention: which checkpoints are kept.
        asynchronous: whether training continues while files are written.
    """

    def __init__(
        self, save: Path, lock: SaveLock | None, rank: int, ranks: int, device: torch.device, retention: Retention, asynchronous: bool
    ) -> None:
        self._save, self._lock, self._rank, self._ranks, self._device = save, lock, rank, ranks, device
        self._retention, self._asynchronous = retention, asynchronous
        self._attempt: _Attempt | None = None

    def save(self, step: int, engine: Engine, state: Callable[[Mapping[str, Any]], TrainerState]) -> list[SaveRecord]:
        """Starts a checkpoint once the previous one is committed.

        Args:
            step: steps taken so far.
            engine: the engine whose weights and optimizer state are saved.
            state: makes the trainer state from the engine's state (`Snapshot.state`).

        Returns:
            The checkpoints committed by this call: the previous one if it was still being written, and this one unless it is written in
            the background.

        Raises:
            CheckpointError: on every rank, if any rank could not write; earlier checkpoints are untouched.
        """
        began = time.perf_counter()
        records = self.wait()
        folder = self._save / str(on_first_rank(self._rank, self._save, lambda: commit.prepare(self._save, step).name))
        attempt = self._attempt = _Attempt(step, folder, began)
        snapshot = engine.snapshot(to_host=self._asynchronous)

        def write() -> None:
            attempt.entries = snapshot.write(folder)
            if self._rank == 0:
                attempt.entries |= commit.write_state(folder, state(snapshot.state))

        self._run(attempt, write, _WRITTEN)
        if not self._asynchronous:
            records += self.wait()
        attempt.stall = time.perf_counter() - began
        return records

    def _run(self, attempt: _Attempt, action: Callable[[], None], then: int) -> None:
        """Runs an action here or in a thread, and sets the attempt's progress to `then` or to _FAILED."""

        def run() -> None:
            try:
                action()
                attempt.progress = then
            except MegatronPatchError as error:
                attempt.failure, attempt.progress = error.what, _FAILED
            except Exception as error:
                attempt.failure, attempt.progress = f"cannot write {attempt.folder}: {error}", _FAILED

        attempt.progress = _BUSY
        if self._asynchronous:
            attempt.thread = threading.Thread(target=run, name=f"checkpoint {attempt.step}", daemon=True)
            attempt.thread.start()
        else:
            run()

    def poll(self) -> list[SaveRecord]:
        """Returns what has been committed since the last call, without waiting; called at the end of each step.

        Raises:
            CheckpointError: on every rank, if any rank could not write.
        """
        attempt = self._attempt
        if attempt is None:
            return []
        agreed = self._finish_reduction(attempt)
        records = [] if agreed is None else self._advance(attempt, agreed)
        if self._attempt is not None:
            self._start_reduction(attempt)
        return records

    def wait(self) -> list[SaveRecord]:
        """Waits until the checkpoint that is being written, if any, is committed; returns what has been committed since the last call.

        Raises:
            CheckpointError: on every rank, if any rank could not write.
        """
        records: list[SaveRecord] = []
        while self._attempt is not None:
            attempt = self._attempt
            agreed = self._finish_reduction(attempt)
            if agreed is None or agreed == _BUSY:
                if attempt.thread is not None:
                    attempt.thread.join()
                self._start_reduction(attempt)
                agreed = self._finish_reduction(attempt)
                assert agreed is not None
            records += self._advance(attempt, agreed)
        return records

    def _start_reduction(self, attempt: _Attempt) -> None:
        """Starts the all-reduce of the lowest progress over all ranks."""
        lowest = torch.tensor(attempt.progress, device=self._device)
        work = torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN, async_op=True) if self._ranks > 1 else None
        attempt.reduction = lowest, work

    def _finish_reduction(self, attempt: _Attempt) -> int | None:
        """Returns the lowest progress over all ranks, or None if no all-reduce was started."""
        if attempt.reduction is None:
            return None
        (lowest, work), attempt.reduction = attempt.reduction, None
        if work is not None:
            work.wait()
        return int(lowest)

    def _advance(self, attempt: _Attempt, agreed: int) -> list[SaveRecord]:
        """Advances the attempt to the next state; returns its record once committed."""
        if agreed == _FAILED:
            self._fail(attempt)
        if agreed == _WRITTEN:
            parts = gather_objects(attempt.entries)
            attempt.entries = {name: entry for part in parts for name, entry in part.items()}  # type: ignore[attr-defined]
            if self._rank == 0:
                self._run(attempt, lambda: self._publish(attempt), _PUBLISHED)
            else:
                attempt.progress = _PUBLISHED
        if agreed != _PUBLISHED:
            return []
        self._attempt = None
        seconds = time.perf_counter() - attempt.began
        size = sum(entry.size for entry in attempt.entries.values())
        folder = self._save / commit.folder_name(attempt.step)
        stall = attempt.stall if self._asynchronous else seconds
        return [SaveRecord(attempt.step, str(folder), seconds, size, stall)]

    def _publish(self, attempt: _Attempt) -> None:
        if self._lock is not None:
            self._lock.check()
        commit.write_manifest(attempt.folder, attempt.entries)
        commit.publish(attempt.folder)
        prune(self._save, attempt.step, self._retention)

    def _fail(self, attempt: _Attempt) -> None:
        """Discards the attempt and raises the first error of any rank on all ranks."""
        self._attempt = None
        failures = [str(text) for text in gather_objects(attempt.failure) if text]
        if self._rank == 0 and not (attempt.folder / commit.MANIFEST).exists():
            commit.discard(attempt.folder)
        raise CheckpointError(
            failures[0],
            "a folder with free space for 12 bytes per parameter",
            "free space, or change --save; earlier checkpoints are untouched",
        )

    def close(self) -> None:
        """Waits for this rank's thread and releases the lock of the folder; called however the run ends."""
        if self._attempt is not None and self._attempt.thread is not None:
            self._attempt.thread.join()
        if self._lock is not None:
            self._lock.release()


class StoppedBeforeTraining(Exception):
    """The run was asked to stop while it waited for the lock of its folder; raised on all ranks.

    Args:
        reason: the reason, as `StopRequests.agreed_request` returned it.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"{reason} while the run waited for the lock of its folder")


def lock_folder(save: Path | None, rank: int, device: torch.device, stops: StopRequests, watchdog: Watchdog) -> SaveLock | None:
    """Locks the run's folder on rank 0, so that no other job writes it; every rank must call it.

    Waits if another job's lock has to be watched. Rank 0 prints for whom, and until when.

    Args:
        save: the run's folder, or None.
        rank: this rank.
        device: the device of this rank.
        stops: requests to stop, which end the wait.
        watchdog: receives a heartbeat for each look at the lock.

    Returns:
        The lock on rank 0, None on other ranks or without a folder.

    Raises:
        CheckpointError: on every rank, if another job holds the lock or the folder cannot be written.
        StoppedBeforeTraining: on every rank, if any rank is asked to stop during the wait; the other job's lock is untouched.
    """
    if save is None:
        return None

    def report(message: str) -> None:
        if rank == 0:
            make_console().print(message)

    lock = SaveLock(save, report=report)
    while not on_first_rank(rank, save, lock.try_take):
        watchdog.heartbeat(f"the lock of {save} is being watched")
        if (reason := stops.agreed_request(device)) is not None:
            report(f"{reason} while the run waited for {lock.path}: it stops before training and leaves the lock to its owner")
            raise StoppedBeforeTraining(reason)
        time.sleep(_LOCK_SECONDS)
    return lock if rank == 0 else None


def make_checkpointer(run: RunConfig, plan: StagePlan, grid: Grid, device: torch.device, lock: SaveLock | None) -> Checkpointer | None:
    """Returns the checkpointer that the run's options describe, or None without --save.

    Args:
        run: the run.
        plan: the plan that it follows.
        grid: coordinates of this rank.
        device: the device of this rank.
        lock: what `lock_folder` returned.
    """
    options = run.options.checkpoint
    if not options.save:
        return None
    return Checkpointer(Path(options.save), lock, grid.rank, grid.world_size, device, _retention(run, plan), options.async_save)


def _retention(run: RunConfig, plan: StagePlan) -> Retention:
    """Returns which checkpoints a run keeps: those that its options request, and the ends of its stages."""
    options = run.options.checkpoint
    ends = frozenset(plan.first_step(index + 1) for index in range(len(plan.stages)))
    return Retention(
        options.keep_last,
        ends,
        options.keep_every or 0,
        options.keep_every_tokens or 0,
        lambda step: plan.consumed_tokens(plan.progress(step)),
    )


def on_first_rank(rank: int, save: Path, action: Callable[[], object]) -> object:
    """Runs an action on rank 0 and returns its result on every rank; if it fails, every rank raises its error.

    Args:
        rank: this rank.
        save: the folder that the action writes, for the error message.
        action: what rank 0 runs.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    result: object = None
    if rank == 0:
        try:
            result = action()
        except MegatronPatchError as error:
            result = error
        except OSError as error:
            result = CheckpointError(
                f"cannot write to {save}: {error.strerror or error}", "a folder with free space", "free space, or change --save"
            )
    result = broadcast_object(result)
    if isinstance(result, MegatronPatchError):
        raise result
    return result
