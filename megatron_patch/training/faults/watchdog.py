"""Ends a job that hangs: if an activity takes too long, the rank writes the stacks of its threads and exits.

In: a heartbeat for each activity that begins. Out: nothing, or SAVE/stacks/rank-RRRRR.txt and exit code 76.

On GPUs a collective does not notice that a peer has exited. A rank that waits in one exits early: it polls the job's store for the peer's
report and exits with the peer's code.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_patch.training.faults.exit_protocol import (
    STORE_KEY,
    follow_peer_exit,
    print_stderr,
    report_hang,
    report_of_peer,
    write_stacks,
)
from megatron_patch.utils.units import format_duration

_BACKUP_SECONDS = 60.0  # later than the watchdog: faulthandler exits even if a thread never releases the interpreter's lock
_JOIN_SECONDS = 2.0  # for a thread to notice that the run has ended; one that waits for a dead store is left
_POLL_SECONDS = 5.0  # between two checks whether a peer has exited
_NOTICE_SECONDS = 15.0  # in which this rank may notice a peer's exit by itself; srun waits longer for the remaining ranks
_GRACE_SECONDS = 5.0  # in which peers notice the hang by themselves and write their stacks, before this rank's exit ends them


class Watchdog:
    """Watches the heartbeats of one rank from a thread.

    Args:
        seconds: how long an activity may take; 0: as long as it needs.
        save: the run's folder, for the stacks; None: they go to standard error.
        rank: this rank.
    """

    def __init__(self, seconds: float, save: Path | None, rank: int) -> None:
        self._seconds, self._save, self._rank = seconds, save, rank
        self._stopped, self._peers_ignored = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self.heartbeat("the run starts")
        if seconds > 0:
            self._start_thread("watchdog", self._watch)

    def _start_thread(self, name: str, target: Callable[..., None], *args: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=args, daemon=True, name=name))
        self._threads[-1].start()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def heartbeat(self, activity: str) -> None:
        """Starts the time of an activity.

        Args:
            activity: what begins, as a clause ("step 5 waits for data"), for messages.
        """
        self._activity, self._since = activity, time.monotonic()
        if self._seconds > 0:
            with contextlib.suppress(AttributeError, OSError, ValueError):  # standard error is no file, as in some notebooks
                faulthandler.dump_traceback_later(self._seconds + _BACKUP_SECONDS, exit=True)

    def close(self) -> None:
        """Stops watching and following."""
        self._stopped.set()
        self._peers_ignored.set()
        faulthandler.cancel_dump_traceback_later()
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._seconds / 4)):
            waited = time.monotonic() - self._since
            if waited > self._seconds:
                self._exit_hanging(waited)

    def follow_peers(self) -> None:
        """Lets this rank exit when a peer does; called once all ranks have joined the job."""
        from megatron_patch.engine.distributed import set_once_reader

        # Not in the watching thread, because the store may answer late.
        self._start_thread("exit follower", self._follow, set_once_reader(STORE_KEY))

    def stop_following(self) -> None:
        """Ignores exits of peers from now on, because the run has ended normally."""
        self._peers_ignored.set()

    def _follow(self, read_report: Callable[[], str | None]) -> None:
        """Exits after a peer has.

        On CPUs a broken connection raises an error in the main thread. A rank that waits for a GPU gets no error and handles no signal, so
        that only this thread can end it.
        """
        while not self._peers_ignored.wait(_POLL_SECONDS):
            try:
                report = report_of_peer(read_report(), self._rank)
                peer_exited = report is not None
            except ConnectionError:
                report, peer_exited = None, True
            if peer_exited and not self._peers_ignored.wait(_NOTICE_SECONDS):
                activity = f"while {self._activity}"
                stacks = self._write_stacks(f"waited for a peer that has exited, {activity}")
                os._exit(follow_peer_exit(report, f"{activity}; stacks: {stacks}", self._rank, self._save))

    def _exit_hanging(self, waited: float) -> None:
        message = f"no progress for {format_duration(waited)} while {self._activity}"
        code = report_hang(f"{message}; stacks: {self._write_stacks(message)}", self._rank, self._save)
        time.sleep(_GRACE_SECONDS)
        os._exit(code)

    def _write_stacks(self, reason: str) -> str:
        """Writes the stacks of this rank's threads and returns where they are, for a message."""
        stacks, where = _stacks(), "above"
        if self._save is not None:
            try:
                return str(write_stacks(self._save, self._rank, f"rank {self._rank}: {reason}\n\n{stacks}").parent)
            except OSError as error:
                where += f" ({error})"
        print_stderr(stacks)
        return where


def _stacks() -> str:
    """Returns the stacks of all threads of this process."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
