"""Ends a job that hangs: when nothing has moved for too long, every rank writes the stacks of its threads and leaves.

In: a beat for each thing that is begun. Out: nothing, or SAVE/stacks/rank-RRRRR.txt and exit code 76. A rank that is left waiting for one
that has ended, as in a collective on GPUs, which does not notice, does not wait so long: it ends with that one's code.
"""

from __future__ import annotations

import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from megatron_patch.training.faults.exit_protocol import (
    STORE_KEY,
    follow_peer_exit,
    print_stderr,
    report_hang,
    report_of_peer,
    write_stacks,
)
from megatron_patch.utils.units import format_duration

_SECOND_CHANCE = 60.0  # seconds after which a thread without Python's lock ends what Python cannot
_LISTEN = 5.0  # seconds between questions whether another rank has ended the job
_NOTICE = 15.0  # seconds in which this one may notice by itself; less than srun waits for ranks that are left behind
_GRACE = 5.0  # seconds for the other ranks to notice by themselves, whom the end of this one would tear out of where they hang


class Watchdog:
    """Watches this rank.

    Args:
        seconds: without a beat; 0: for ever.
        save: the run's folder, for the stacks; None: standard error alone.
        rank: this rank.
    """

    def __init__(self, seconds: float, save: Path | None, rank: int) -> None:
        self._seconds, self._save, self._rank = seconds, save, rank
        self._stopped, self._deaf = threading.Event(), threading.Event()
        self.heartbeat("the run starts")
        if seconds > 0:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def heartbeat(self, what: str) -> None:
        """Something is begun; it has its own time."""
        self._what, self._since = what, time.monotonic()
        if self._seconds > 0:
            faulthandler.dump_traceback_later(self._seconds + _SECOND_CHANCE, exit=True)

    def close(self) -> None:
        """Stops watching."""
        self._stopped.set()
        self._deaf.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._seconds / 4)):
            waited = time.monotonic() - self._since
            if waited > self._seconds:
                self._end(waited)

    def listen(self) -> None:
        """Ranks have met: from now on this one follows one that ends."""
        from megatron_patch.engine.distributed import set_once_reader

        # Not the watching thread: a question may have to wait.
        threading.Thread(target=self._listen, args=[set_once_reader(STORE_KEY)], daemon=True, name="listener").start()

    def stop_listening(self) -> None:
        """The run has come to its end: other ranks leave, and that is no reason to follow them."""
        self._deaf.set()

    def _listen(self, last_word: Callable[[], str | None]) -> None:
        """Ends this rank behind another one.

        A broken connection tells it on CPUs; who waits for a GPU that waits for that rank's is told nothing, and hears no signals.
        """
        while not self._deaf.wait(_LISTEN):
            try:
                ending = report_of_peer(last_word(), self._rank)
                ended = ending is not None
            except ConnectionError:
                ending, ended = None, True
            if ended and not self._deaf.wait(_NOTICE):
                what = f"while {self._what}"
                os._exit(follow_peer_exit(ending, f"{what}; stacks {self._write_stacks(f'left waiting {what}')}", self._rank, self._save))

    def _end(self, waited: float) -> None:
        said = f"no progress for {format_duration(waited)} while {self._what}"
        code = report_hang(f"{said}; stacks {self._write_stacks(said)}", self._rank, self._save)
        time.sleep(_GRACE)
        os._exit(code)

    def _write_stacks(self, why: str) -> str:
        """Where they are."""
        stacks, where = _stacks(), "above"
        if self._save is not None:
            try:
                return str(write_stacks(self._save, self._rank, f"rank {self._rank}: {why}\n\n{stacks}").parent)
            except OSError as error:
                where += f" ({error})"
        print_stderr(stacks)
        return where


def _stacks() -> str:
    """Of all threads of this process."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
