"""Ends a job that hangs: when nothing has moved for too long, every rank writes the stacks of its threads and leaves.

In: a beat for each thing that is begun. Out: nothing, or SAVE/stacks/rank-RRRRR.txt and exit code 76.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

from megatron_patch.exit_codes import ExitCode
from megatron_patch.units import format_duration

_SECOND_CHANCE = 60.0  # seconds after which a thread without Python's lock ends what Python cannot


class Watchdog:
    """Watches this rank.

    Args:
        seconds: without a beat; 0: for ever.
        folder: of the stacks; None: standard error alone.
        rank: this rank.
    """

    def __init__(self, seconds: float, folder: Path | None, rank: int) -> None:
        self._seconds, self._rank = seconds, rank
        self._path = folder / f"rank-{rank:05d}.txt" if folder is not None else None
        self._what, self._since = "starting", time.monotonic()
        self._stopped = threading.Event()
        if seconds > 0:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def beat(self, what: str) -> None:
        """Something is begun; it has its own time."""
        self._what, self._since = what, time.monotonic()
        if self._seconds > 0:
            faulthandler.dump_traceback_later(self._seconds + _SECOND_CHANCE, exit=True)

    def close(self) -> None:
        """Stops watching."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._seconds / 4)):
            waited = time.monotonic() - self._since
            if waited > self._seconds:
                self._end(waited)

    def _end(self, waited: float) -> None:
        said = f"rank {self._rank}: no progress for {format_duration(waited)} while {self._what}"
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("w", encoding="utf-8") as file:
                    file.write(said + "\n\n")
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
                said += f"; stacks in {self._path}"
            except OSError:
                faulthandler.dump_traceback(all_threads=True)
        print(f"{said}\nexit code {ExitCode.HANG.value}: {ExitCode.HANG.advice}", file=sys.stderr, flush=True)
        os._exit(ExitCode.HANG)
