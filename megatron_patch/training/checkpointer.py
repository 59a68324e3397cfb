"""Committing a checkpoint over all ranks, beside training or not.

In: every rank's snapshot. Out: a checkpoint in the run's folder, published by rank 0 once the files of all ranks are on disk and read
back. With `asynchronous` the snapshot is a copy in the host's memory and a thread writes it while training goes on: the ranks agree on
how far they are by one small reduction a step, begun at a step's end and looked at behind the next, so that nobody waits for it. An error
of any rank comes out on all of them, at the same step. Files are the same in both ways.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_patch.checkpoint import commit as commit
from megatron_patch.checkpoint.commit import ManifestEntry
from megatron_patch.checkpoint.lock import SaveLock
from megatron_patch.checkpoint.retention import Retention, prune
from megatron_patch.checkpoint.trainer_state import TrainerState
from megatron_patch.config.resolve import RunConfig
from megatron_patch.engine.distributed import broadcast_object, gather_objects
from megatron_patch.engine.interface import Engine
from megatron_patch.errors import CheckpointError, MegatronPatchError
from megatron_patch.stages import StagePlan
from megatron_patch.training.callbacks.base import SaveRecord

_FAILED, _BUSY, _WRITTEN, _PUBLISHED = range(-1, 3)


@dataclass
class _Attempt:
    """A checkpoint under way, as this rank sees it."""

    step: int
    folder: Path
    began: float
    progress: int = _BUSY
    stall: float = 0.0
    entries: dict[str, ManifestEntry] = field(default_factory=dict)
    failure: str | None = None
    thread: threading.Thread | None = None
    vote: tuple[torch.Tensor, Any] | None = None


class Checkpointer:
    """Saves for one run; every rank has one and calls the same methods at the same steps.

    Args:
        save: the run's folder.
        lock: rank 0's right to write it, None elsewhere.
        rank: this rank.
        ranks: how many there are.
        device: where votes are counted.
        retention: which checkpoints stay.
        asynchronous: whether training goes on while files are written.
    """

    def __init__(
        self, save: Path, lock: SaveLock | None, rank: int, ranks: int, device: torch.device, retention: Retention, asynchronous: bool
    ) -> None:
        self._save, self._lock, self._rank, self._ranks, self._device = save, lock, rank, ranks, device
        self._retention, self._asynchronous = retention, asynchronous
        self._attempt: _Attempt | None = None

    def save(self, step: int, engine: Engine, state: Callable[[Mapping[str, Any]], TrainerState]) -> list[SaveRecord]:
        """Begins a checkpoint, after the one before is committed.

        Args:
            step: of the run.
            engine: whose weights and optimizer.
            state: makes the trainer's state of the engine's.

        Returns:
            What was committed meanwhile: the checkpoint before, and this one unless it is written beside training.

        Raises:
            CheckpointError: on every rank, where any could not write; earlier checkpoints are untouched.
        """
        began = time.perf_counter()
        records = self.wait()
        folder = self._save / str(self._first_rank(lambda: commit.prepare(self._save, step).name))
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
        """Does something here or in a thread, and notes how it ended."""

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
        """At the end of a step: what has been committed since; waits for nobody.

        Raises:
            CheckpointError: on every rank, where any could not write.
        """
        attempt = self._attempt
        if attempt is None:
            return []
        agreed = self._count(attempt)
        records = [] if agreed is None else self._advance(attempt, agreed)
        if self._attempt is not None:
            self._vote(attempt)
        return records

    def wait(self) -> list[SaveRecord]:
        """As `poll`, after the checkpoint under way is committed; without one nothing happens."""
        records: list[SaveRecord] = []
        while self._attempt is not None:
            attempt = self._attempt
            agreed = self._count(attempt)
            if agreed is None or agreed == _BUSY:
                if attempt.thread is not None:
                    attempt.thread.join()
                self._vote(attempt)
                agreed = self._count(attempt)
                assert agreed is not None
            records += self._advance(attempt, agreed)
        return records

    def _vote(self, attempt: _Attempt) -> None:
        """Begins to ask all ranks how far the last of them is."""
        vote = torch.tensor(attempt.progress, device=self._device)
        work = torch.distributed.all_reduce(vote, torch.distributed.ReduceOp.MIN, async_op=True) if self._ranks > 1 else None
        attempt.vote = vote, work

    def _count(self, attempt: _Attempt) -> int | None:
        """The answer, or None where nothing was asked."""
        if attempt.vote is None:
            return None
        (vote, work), attempt.vote = attempt.vote, None
        if work is not None:
            work.wait()
        return int(vote)

    def _advance(self, attempt: _Attempt, agreed: int) -> list[SaveRecord]:
        """What all ranks do next, as all of them are at least so far."""
        if agreed == _FAILED:
            self._give_up(attempt)
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

    def _give_up(self, attempt: _Attempt) -> None:
        self._attempt = None
        failures = [str(text) for text in gather_objects(attempt.failure) if text]
        if self._rank == 0 and not (attempt.folder / commit.MANIFEST).exists():
            commit.discard(attempt.folder)
        raise CheckpointError(
            failures[0],
            "a folder with space for 12 bytes a parameter",
            "free space or change --save; the earlier checkpoints are untouched",
        )

    def _first_rank(self, action: Callable[[], object]) -> object:
        return on_first_rank(self._rank, self._save, action)

    def close(self) -> None:
        """At the end, whatever it was: lets this rank's thread finish its file, and gives the folder back."""
        if self._attempt is not None and self._attempt.thread is not None:
            self._attempt.thread.join()
        if self._lock is not None:
            self._lock.release()


def make_retention(run: RunConfig, plan: StagePlan) -> Retention:
    """Which checkpoints a run keeps: what its flags say, and the ends of its stages."""
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
    """Does something on rank 0 and gives its result to all; where it fails, every rank raises its error.

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
