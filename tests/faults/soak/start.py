"""One start of the program in the soak test: its ranks, how far it is, and what can be done to it while it runs.

In: a command line and a number of ranks. Out: moments to wait for, faults, exit codes and what was printed. Every rank is a forked process
that ends with the program's exit code, so that a rank which is killed can leave nothing locked that the others need.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import re
import struct
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import psutil

from megatron_patch.checkpoint import commit
from tests.distributed.ranks import start_ranks
from tests.distributed.runs import start_program

LIMIT = 240.0
"""Seconds after which a wait has failed."""
_TRACEBACK = 99


def _rank(argv: list[str], folder: Path, compiler_cache: Path | None) -> None:
    """Runs the program on one rank and ends the process with its exit code."""
    # What libraries print goes to the log as well.
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    os.environ["FAULT_CLOCK"] = str(folder / f"clock-{os.environ['RANK']}")
    if compiler_cache is not None:
        os.environ.pop("TORCHDYNAMO_DISABLE", None)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(compiler_cache)
    try:
        code = int(start_program(argv))
    except BaseException:
        traceback.print_exc()
        code = _TRACEBACK
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


class Start:
    """A start of the program.

    Args:
        argv: its command line.
        ranks: number of ranks.
        save: the run's folder.
        folder: where logs and the offsets of the ranks' clocks are written.
        offsets: seconds by which the clock of each rank is wrong from the beginning.
        compiler_cache: the compiler's cache, for a start with --compile.
    """

    def __init__(
        self, argv: list[str], ranks: int, save: Path, folder: Path, offsets: list[float], compiler_cache: Path | None = None
    ) -> None:
        self.save, self._folder, self._compiler_cache = save, folder, compiler_cache
        folder.mkdir(exist_ok=True)
        for log in folder.glob("*.log"):
            log.unlink()
        for rank in range(ranks):
            self.set_clock(rank, offsets[rank] if offsets else 0.0)
        self._starts_before = set(self._starts())
        main = functools.partial(_rank, folder=folder, compiler_cache=compiler_cache)
        self.processes, self._results = start_ranks(main, ranks, folder, argv)
        self.children: list[psutil.Process] = []

    def _metrics(self) -> bytes:
        try:
            return (self.save / "metrics.jsonl").read_bytes()
        except OSError:
            return b""

    def _starts(self) -> list[bytes]:
        """The complete lines in the metrics that say from where a start resumed."""
        return [line for line in self._metrics().split(b"\n")[:-1] if line.startswith(b'{"type": "start"')]

    @property
    def ended(self) -> bool:
        """Whether all ranks have ended."""
        return not any(process.is_alive() for process in self.processes)

    @property
    def codes(self) -> list[int | None]:
        """Exit code of each rank; None while it runs."""
        return [process.exitcode for process in self.processes]

    @property
    def resumed_at(self) -> int | None:
        """The step that this start resumed from, once it has said so."""
        starts = [line for line in self._starts() if line not in self._starts_before]
        return int(json.loads(starts[-1])["step"]) if starts else None

    @property
    def step(self) -> int | None:
        """The last step in the metrics of this start; None before its first."""
        if (first := self.resumed_at) is None:
            return None
        for line in reversed(self._metrics().split(b"\n")):
            with contextlib.suppress(ValueError, KeyError):
                record = json.loads(line)
                if record["type"] == "start":
                    return None
                if record["type"] == "step" and record["step"] > first:
                    return int(record["step"])
        return None

    def wait(self, reached: Callable[[], object] = lambda: False, seconds: float = LIMIT) -> bool:
        """Waits until something is reached, all ranks have ended, or the time is over; returns whether it was reached.

        Raises:
            AssertionError: neither happened within `LIMIT`.
        """
        end = time.monotonic() + seconds
        while not self.ended:
            if reached():
                return True
            if time.monotonic() > end:
                assert seconds < LIMIT, f"nothing happened for {LIMIT:.0f} s\n{self.printed()}"
                return False
            time.sleep(0.002)
        return False

    def wait_for(self, moment: str, draw: random.Random) -> str | None:
        """Waits for a moment of a phase; returns it in words, or None if the run ended before.

        Args:
            moment: "starting", "training", "saving", "switching" or "compiling".
            draw: chooses the moment within the phase.
        """
        if moment == "starting":
            began = time.monotonic()
            self.wait(lambda: self.resumed_at is not None, seconds=draw.random() * 2)
            return None if self.ended else f"{time.monotonic() - began:.1f} s after the start" if self.resumed_at is None else self.place
        if moment == "compiling":
            if not self.wait(self._compiles):
                return None
            self.wait(seconds=draw.random() * 2.5)
            return None if self.ended else f"compiling, {self.place}"
        if not self.wait(lambda: self.resumed_at is not None):
            return None
        first = self.resumed_at or 0
        target = first + draw.randint(1, 8)
        if moment == "switching":
            # The step before the switch, the switch and its evaluation and checkpoint, or soon after it.
            target = max(first + 1, self._first_switch() - draw.randint(0, 1))
        if not self.wait(lambda: (self.step or 0) >= target):
            return None
        if moment == "saving":
            return f"saving, {self.place}" if self.wait(lambda: any(self.save.glob(f"{commit.PARTIAL}*"))) else None
        self.wait(seconds=draw.random() * (0.15 if moment == "switching" else 0.02))
        return None if self.ended else self.place

    def _first_switch(self) -> int:
        """The step after which the first switch of stages comes."""
        record = json.loads(self._starts()[-1])
        return int(record["total_steps"] * record["switches"][0][0] / record["total_tokens"])

    @property
    def place(self) -> str:
        """The step, in words."""
        if (step := self.step) is not None:
            return f"step {step}"
        return "before the first step" if self.resumed_at is None else f"before step {self.resumed_at + 1}"

    def _compiles(self) -> bool:
        """Whether ranks have started compilers."""
        found = []
        for process in self.processes:
            with contextlib.suppress(psutil.Error):
                found += psutil.Process(process.pid).children(recursive=True)
        self.children = found or self.children
        return bool(found)

    def set_clock(self, rank: int, seconds: float) -> None:
        """Makes the wall clock of a rank wrong by some seconds."""
        path = self._folder / f"clock-{rank}"
        with path.open("r+b" if path.exists() else "wb") as file:
            file.write(struct.pack("d", seconds))

    def send(self, rank: int, sent: int) -> None:
        """Sends a signal to a rank, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.processes[rank].pid, sent)

    def kill(self, ranks: list[int], pause: float = 0.0) -> None:
        """Sends SIGKILL to ranks, one after another.

        Args:
            ranks: in this order.
            pause: seconds between the first and the others.
        """
        if self._compiler_cache is not None:
            self._compiles()
        for number, rank in enumerate(ranks):
            if self.processes[rank].is_alive():
                self.processes[rank].kill()
            if number == 0:
                time.sleep(pause)
        for rank in ranks:
            self.processes[rank].join()

    def close(self) -> None:
        """Kills what is left of this start, and waits until its compilers have ended by themselves.

        Raises:
            AssertionError: a compiler outlives its rank for a minute.
        """
        for process in self.processes:
            process.kill()
            process.join()
        _, alive = psutil.wait_procs(self.children, timeout=60)
        assert not alive, f"compilers outlive their ranks: {alive}"

    def printed(self) -> str:
        """What all ranks have printed."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self._folder.glob("*.log")))

    @property
    def said(self) -> str:
        """Exit codes, and the cause that a rank which was not killed has printed before the line with its exit code."""
        codes = ", ".join("killed" if code == -9 else str(code) for code in self.codes)
        for path in sorted(self._folder.glob("*.log")):
            lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip() and not line.startswith(" ")]
            last = [number for number, line in enumerate(lines) if line.startswith("exit code")]
            if last and last[0] > 0:
                if lines[last[0]].startswith("exit code 75"):
                    return f"{codes}; {lines[last[0]].partition(': ')[2].split(':')[0]}"
                cause = lines[last[0] - 1].replace(str(self.save), "SAVE")
                cause = re.sub(r"^rank \d+ on \S+: |\[/\S+\] | \[[\d.]+\]:\d+.*$", "", cause)
                cause = re.sub(r"\.partial-step-0*(\d+)-\w+", r"(partial step \1)", cause)
                return f"{codes}; {textwrap.shorten(cause, 100, placeholder=' …')}"
        return codes
