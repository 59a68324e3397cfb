"""Ends a job that hangs: when nothing has moved for too long, every rank writes the stacks of its threads and leaves. A rank that waits for
another one that has ended leaves much sooner.

In: a beat for each thing that is begun, and the first rank's last word. Out: nothing; or SAVE/stacks/rank-RRRRR.txt and exit code 76; or
the code of the rank that ended first.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType

from megatron_patch.exit_codes import ExitCode
from megatron_patch.training.endings import WORD, end_behind, end_hanging, say, write_stacks
from megatron_patch.units import format_duration

_SECOND_CHANCE = 60.0  # seconds after which a thread without Python's lock ends what Python cannot
_GRACE = 5.0  # seconds for the other ranks to notice by themselves, whom the end of this one would tear out of where they hang
_LISTENING = 5.0  # seconds between looks at whether another rank has ended
_TO_NOTICE = 10.0  # seconds for this rank to notice that by itself


class Watchdog:
    """Watches this rank.

    Args:
        seconds: without a beat; 0: for ever.
        save: the run's folder, for the stacks; None: standard error alone.
        rank: this rank.
    """

    def __init__(self, seconds: float, save: Path | None, rank: int) -> None:
        self._seconds, self._save, self._rank = seconds, save, rank
        self._stopped = threading.Event()
        self.beat("the run starts")
        if seconds > 0:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        threading.Thread(target=self._listen, daemon=True, name="last words").start()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

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

    def _listen(self) -> None:
        """Ends this rank behind another one.

        A broken connection tells it on CPUs; who waits for a GPU that waits for that rank's is told nothing, and hears no signals.
        """
        from megatron_patch.engine.distributed import listener

        last_word = listener(WORD)
        while not self._stopped.wait(_LISTENING):
            try:
                word = last_word()
                ended = word is not None
            except ConnectionError:
                word, ended = None, True
            if ended and not self._stopped.wait(_TO_NOTICE):
                self._end_behind(word)

    def _end_behind(self, word: str | None) -> None:
        code = end_behind(word, self._rank, self._save)
        if code == ExitCode.HANG and self._save is not None:
            with contextlib.suppress(OSError):
                write_stacks(self._save, self._rank, f"rank {self._rank}, while {self._what}\n\n{_stacks()}")
        os._exit(code)

    def _end(self, waited: float) -> None:
        said = f"no progress for {format_duration(waited)} while {self._what}"
        stacks = _stacks()
        where = "above"
        if self._save is not None:
            try:
                where = str(write_stacks(self._save, self._rank, f"rank {self._rank}: {said}\n\n{stacks}").parent)
            except OSError as error:
                where += f" ({error})"
        if where.startswith("above"):
            say(stacks)
        code = end_hanging(f"{said}; stacks {where}", self._rank, self._save)
        time.sleep(_GRACE)
        os._exit(code)


def _stacks() -> str:
    """Of all threads of this process."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
