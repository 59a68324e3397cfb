"""Runs a list of steps within a time budget, and packs the results after every step.

In: steps, the most valuable ones first. Out: a folder with the log of each step, the figures that steps recorded (benchmarks/_measure.py)
and the files that they wrote; an archive of this folder, rewritten after each step; a table of the steps' results.

A step that fails does not stop the next one. When a step reaches its time limit, all of its processes are killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

MAX_FILE_BYTES = 8 << 20
"""Largest file to pack. Larger files remain in the folder, and their names are printed."""

GPU = Literal["exclusive", "shared", "none"]
Status = Literal["passed", "failed", "timed out", "stopped", "not reached", "skipped"]
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Step:
    """A command with a time limit.

    Args:
        name: name of the step and of its log.
        command: bash command, run in the repository's root. Its environment has STEP (the name), STEP_SECONDS (seconds until it is
            killed: the limit or the rest of the budget, whichever is less), FIGURES (a file for lines of JSON) and RESULTS (a folder).
        limit: seconds after which all of the step's processes are killed.
        gpu: "exclusive" for measurements: no other step uses the GPU at the same time. "shared" for steps that may run together. "none" for
            work on CPUs, which starts as soon as possible. Steps that use the GPU start in their order.
        needs: names of steps that must have ended before, with any result.
        least: smallest useful time in seconds; with less left of the budget the step is not reached.
        tiny: command for a machine without a GPU, with tiny shapes; None skips the step there.
    """

    name: str
    command: str
    limit: float
    gpu: GPU = "shared"
    needs: tuple[str, ...] = ()
    least: float = 5
    tiny: str | None = None


@dataclass
class Outcome:
    """Result of a step.

    Args:
        name: name of the step.
        status: its result.
        seconds: time that it took.
        code: exit code; None if the step was killed or did not run.
        last_lines: last lines of its log.
    """

    name: str
    status: Status
    seconds: float = 0.0
    code: int | None = None
    last_lines: list[str] = field(default_factory=list)


class Schedule:
    """Runs steps within a time budget, in parallel where they allow it.

    Args:
        steps: the steps, the most valuable ones first.
        folder: folder for the results; its old content is deleted.
        budget: seconds for all steps.
        packed: archive to rewrite after each step, or None.
        console: where progress is printed.
        clock_start: start of the budget by `time.monotonic`; None means now.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        folder: Path,
        budget: float,
        packed: Path | None,
        console: Console,
        clock_start: float | None = None,
    ) -> None:
        self.steps, self.folder, self.budget, self.packed, self.console = steps, folder, budget, packed, console
        self.began = time.monotonic() if clock_start is None else clock_start
        self.outcomes: dict[str, Outcome] = {}
        self._changed = threading.Condition()
        self._running: dict[str, Step] = {}
        self._packing = threading.Lock()
        self._stop_signal = 0
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "logs").mkdir(parents=True)

    def left(self) -> float:
        """Returns the seconds left of the budget."""
        return self.budget - (time.monotonic() - self.began)

    def stop(self, number: int) -> None:
        """Stops running steps and starts no others; a signal handler may call it.

        Args:
            number: number of the signal.
        """
        self._stop_signal = number

    def run(self) -> list[Outcome]:
        """Runs all steps and returns their results in the order of the steps."""
        threads = []
        waiting = list(self.steps)
        with self._changed:
            while waiting:
                if self._stop_signal:
                    for step in waiting:
                        self._end(Outcome(step.name, "not reached"))
                    break
                step = self._next(waiting)
                if step is None:
                    if not self._running and not any(self._may_start(other, waiting) for other in waiting):
                        raise ValueError(f"steps need each other: {', '.join(other.name for other in waiting)}")
                    self._changed.wait(timeout=1)
                    continue
                waiting.remove(step)
                if self.left() < step.least:
                    self._end(Outcome(step.name, "not reached"))
                    continue
                self._running[step.name] = step
                thread = threading.Thread(target=self._run, args=(step,))
                threads.append(thread)
                thread.start()
        for thread in threads:
            thread.join()
        return [self.outcomes[step.name] for step in self.steps]

    def _next(self, waiting: Sequence[Step]) -> Step | None:
        return next((step for step in waiting if self._may_start(step, waiting)), None)

    def _may_start(self, step: Step, waiting: Sequence[Step]) -> bool:
        """Returns whether the running steps and the earlier waiting ones allow this step to start."""
        known = {other.name for other in self.steps}
        if any(name in known and name not in self.outcomes for name in step.needs):
            return False
        if step.gpu == "none":
            return True
        earlier = waiting[: list(waiting).index(step)]
        if any(other.gpu != "none" for other in earlier):
            return False
        busy = [other for other in self._running.values() if other.gpu != "none"]
        return not busy if step.gpu == "exclusive" else all(other.gpu == "shared" for other in busy)

    def _run(self, step: Step) -> None:
        outcome = Outcome(step.name, "failed", last_lines=["the step did not start"])
        began = time.monotonic()
        try:
            outcome = self._execute(step, min(step.limit, max(1.0, self.left())))
        except OSError as error:
            outcome.last_lines = [str(error)]
        outcome.seconds = time.monotonic() - began
        with self._changed:
            del self._running[step.name]
            self._end(outcome)
            self._changed.notify_all()
        self.pack()

    def _execute(self, step: Step, limit: float) -> Outcome:
        log = self.folder / "logs" / f"{step.name}.log"
        files = self.folder / "files" / step.name
        files.mkdir(parents=True, exist_ok=True)
        figures = self.folder / "figures.jsonl"
        before = _not_finite(figures, step.name)
        environment = {**os.environ, "STEP": step.name, "FIGURES": str(figures), "RESULTS": str(files), "PYTHONUNBUFFERED": "1"}
        environment["STEP_SECONDS"] = str(int(limit))
        with log.open("wb") as out:
            out.write(f"$ {step.command}\n".encode())
            out.flush()
            process = subprocess.Popen(
                ["bash", "-c", step.command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            deadline = time.monotonic() + limit
            code = process.poll()
            while code is None and time.monotonic() < deadline and not self._stop_signal:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=_POLL_SECONDS)
            # Also kills processes that the step left running, because the next step may need exclusive use of the GPU.
            end_group(process, grace=2.0, after_kill=0.0)
        lines = last_lines(log)
        if code is None and self._stop_signal:
            return Outcome(step.name, "stopped", last_lines=[*lines, f"stopped by {signal.Signals(self._stop_signal).name}"])
        if code is None:
            return Outcome(step.name, "timed out", last_lines=[*lines, f"killed at its limit of {limit:.0f} s"])
        if code == 0 and _not_finite(figures, step.name) > before:
            return Outcome(step.name, "failed", code=0, last_lines=["a figure is NaN or infinite", *lines])
        if code == 0 and lines and re.search(r"\b\d+ skipped", lines[-1]) and "passed" not in lines[-1]:
            # pytest ran no test.
            return Outcome(step.name, "skipped", code=0, last_lines=lines)
        return Outcome(step.name, "passed" if code == 0 else "failed", code=code, last_lines=lines)

    def _end(self, outcome: Outcome) -> None:
        self.outcomes[outcome.name] = outcome
        at = time.monotonic() - self.began
        self.console.print(f"{at:6.1f} s  {outcome.name}: {outcome.status} ({outcome.seconds:.1f} s)", markup=False, highlight=False)

    def pack(self) -> None:
        """Writes steps.json and rewrites the archive; the old archive remains until the new one is complete."""
        with self._packing:
            with self._changed:
                steps = [vars(self.outcomes[step.name]) for step in self.steps if step.name in self.outcomes]
            (self.folder / "steps.json").write_text(json.dumps(steps, indent=1) + "\n", encoding="utf-8")
            if self.packed is None:
                return
            try:
                self.packed.parent.mkdir(parents=True, exist_ok=True)
                skipped = pack(self.folder, self.packed)
            except OSError as error:
                self.console.print(f"cannot pack the results: {error}", markup=False, highlight=False)
                return
            for name in skipped:
                self.console.print(f"not packed, larger than {MAX_FILE_BYTES >> 20} MiB: {name}", markup=False, highlight=False)

    def print_table(self) -> None:
        """Prints the result of each step, and the last lines of those that failed."""
        table = Table(title_justify="left")
        for column in ("step", "result", "s", "last line"):
            table.add_column(column, justify="right" if column == "s" else "left", no_wrap=column != "last line")
        colors = {"passed": "green", "failed": "red", "timed out": "red", "stopped": "red", "not reached": "yellow", "skipped": "dim"}
        for step in self.steps:
            outcome = self.outcomes[step.name]
            color = colors[outcome.status]
            last = outcome.last_lines[-1] if outcome.last_lines and outcome.status != "not reached" else ""
            last = last if len(last) <= 80 else f"{last[:79]}…"
            table.add_row(step.name, Text(outcome.status, color), f"{outcome.seconds:.0f}", Text(last))
        for step in self.steps:
            outcome = self.outcomes[step.name]
            if outcome.status in ("failed", "timed out"):
                self.console.rule(f"{step.name}: {outcome.status}{_describe_exit(outcome.code)}", align="left")
                for line in outcome.last_lines[-12:]:
                    self.console.print(line[:300], markup=False, highlight=False)
        self.console.print(table)


def _describe_exit(code: int | None) -> str:
    """Returns a description of an exit code; empty for None."""
    if code is None:
        return ""
    return f", killed by {signal.Signals(-code).name}" if code < 0 else f", exit code {code}"


def pack(folder: Path, archive: Path) -> list[str]:
    """Packs a folder into a .tar.gz, which replaces the old archive when it is complete.

    Returns:
        Names of the files that were skipped because of their size.
    """
    skipped: list[str] = []

    def small(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if member.isfile() and member.size > MAX_FILE_BYTES:
            skipped.append(member.name)
            return None
        return member

    handle, name = tempfile.mkstemp(dir=archive.parent, prefix=".packing-")
    os.close(handle)
    with tarfile.open(name, "w:gz", compresslevel=3) as out:
        out.add(folder, arcname=folder.name, filter=small)
    os.chmod(name, 0o644)
    os.replace(name, archive)
    return skipped


def last_lines(log: Path, count: int = 20) -> list[str]:
    """Returns the last non-empty lines of a log, without its first line, which is the command."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 20_000))
        text = file.read().decode("utf-8", "replace")
    lines = [line.rstrip() for line in text.replace("\r", "\n").splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("$ ")][-count:]


def end_group(leader: subprocess.Popen[bytes], grace: float, at_once: Callable[[], bool] = lambda: False, after_kill: float = 5.0) -> None:
    """Ends all processes of a group with SIGTERM, and with SIGKILL if they have not ended in time.

    Args:
        leader: leader of the group.
        grace: seconds between the two signals, in which runs can save.
        at_once: returns True to send SIGKILL without waiting longer.
        after_kill: seconds to wait after SIGKILL.
    """
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, after_kill)):
        deadline = time.monotonic() + seconds
        try:
            os.killpg(leader.pid, number)
            while time.monotonic() < deadline and not (number == signal.SIGTERM and at_once()):
                leader.poll()
                os.killpg(leader.pid, 0)
                time.sleep(0.05)
        except ProcessLookupError:
            break
    leader.wait()


def _not_finite(figures: Path, step: str) -> int:
    """Returns the number of a step's figures that contain NaN or infinity."""
    return sum(1 for figure in read_figures(figures) if figure.get("step") == step and "not_finite" in figure)


def read_figures(path: Path) -> list[dict[str, Any]]:
    """Reads figures, one JSON object per line; skips incomplete lines of killed processes."""
    figures = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                figures.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return [figure for figure in figures if isinstance(figure, dict) and "kind" in figure]
