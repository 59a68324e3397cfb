"""Child processes that take turns on one device: what is timed runs alone, imports and compilation of the others go on meanwhile.

The parent (`run`) starts children and touches the device never, so that nothing a child does to it can end the parent. A child (`Turns`)
asks for the device over a pipe and waits for the answer: "shared" for what is not timed (starting CUDA, compiling, warming up), "alone" for
what is, "last" for alone after all others have ended. Turns are given in the order of the jobs. A child's turn ends with its next request
or with its process; it is killed, with all processes of its group, where a start or a turn takes longer than the limit, and where the
budget ends. Only the standard library is imported here: children start before their parent has imported anything large.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Message = dict[str, Any]
NOT_REACHED, STOPPED = "not reached in", "stopped at the end of"
"""How the reasons begin that `run` gives where the budget has ended."""
_POLL_SECONDS = 0.02
_START_SECONDS = 60.0
_PARENT_DEATH_SIGNAL = 1


@dataclass(frozen=True)
class Job:
    """One child process.

    Args:
        name: of its log.
        command: what is run, with two numbers more at its end: the pipes of `Turns`.
        urgent: later jobs get no turn before this one has ended (or asks for the last turn).
    """

    name: str
    command: tuple[str, ...]
    urgent: bool = False


class Turns:
    """A child's end of the pipes.

    Args:
        answers: file descriptor to read from.
        requests: file descriptor to write to.
    """

    def __init__(self, answers: int, requests: int) -> None:
        for descriptor in (answers, requests):
            os.set_inheritable(descriptor, False)
        self._answers, self._requests = os.fdopen(answers), os.fdopen(requests, "w")
        # A parent that is killed takes its children with it: none stays on the device.
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)

    def ask(self, how: str) -> Message:
        """Waits for a turn, "shared", "alone" or "last"; returns what the parent says with it. An earlier turn ends."""
        self.tell(ask=how)
        answer = self._answers.readline()
        if not answer:
            raise SystemExit("the parent has ended")
        return json.loads(answer)

    def tell(self, **message: Any) -> None:
        """Sends one message to the parent; `done=True` is the last one of a child that did all it should."""
        self._requests.write(json.dumps(message) + "\n")
        self._requests.flush()


@dataclass
class _Child:
    job: Job
    process: subprocess.Popen[bytes]
    messages: int
    answers: int
    log: Path
    since: float
    turn: str = "start"
    asked: str = ""
    at_last: bool = False
    done: bool = False
    buffer: bytearray = field(default_factory=bytearray)

    def read(self) -> list[Message]:
        """What has arrived."""
        while select.select([self.messages], [], [], 0)[0] and (data := os.read(self.messages, 1 << 16)):
            self.buffer += data
        *lines, rest = bytes(self.buffer).split(b"\n")
        self.buffer = bytearray(rest)
        return [json.loads(line) for line in lines]

    def what_ended_it(self, code: int) -> str | None:
        """None where it did all it should, else the reason in one line, with the last one of its log."""
        if code == 0 and self.done:
            return None
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended early, with exit code {code}"
        return f"{how}: {lines[-1][:200] if lines else 'nothing printed'}"

    def end(self) -> None:
        """Kills it with its group, whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        # A process that waits inside a driver may not end even so; the others go on.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        for descriptor in (self.messages, self.answers):
            os.close(descriptor)


def _start(job: Job, logs: Path, environment: dict[str, str]) -> _Child:
    messages, requests = os.pipe()
    answers, ours = os.pipe()
    log = logs / f"{job.name}.log"
    try:
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [*job.command, str(answers), str(requests)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(answers, requests),
                start_new_session=True,
                env=environment,
            )
    finally:
        os.close(answers)
        os.close(requests)
    return _Child(job, process, messages, ours, log, time.monotonic())


class _Run:
    def __init__(self, jobs: Sequence[Job]) -> None:
        self.order = {job.name: place for place, job in enumerate(jobs)}
        self.open = list(jobs)
        self.running: list[_Child] = []

    def held_up(self, child: _Child) -> bool:
        """Whether an urgent job before it has yet to end."""
        at_last = {other.job.name for other in self.running if other.at_last}
        return any(job.urgent and job.name not in at_last and self.order[job.name] < self.order[child.job.name] for job in self.open)

    def next_turns(self) -> list[_Child]:
        """The children that may go on now."""
        holders = [child.turn for child in self.running if child.turn in ("shared", "alone")]
        if "alone" in holders:
            return []
        chosen: list[_Child] = []
        for child in sorted(self.running, key=lambda child: self.order[child.job.name]):
            if not child.asked or self.held_up(child):
                continue
            if child.asked == "shared":
                chosen.append(child)
                holders.append("shared")
            elif not holders and (child.asked == "alone" or len(self.open) == 1):
                return [child]
        return chosen


def run(
    jobs: Sequence[Job],
    logs: Path,
    environment: dict[str, str],
    at_once: int,
    limit: float,
    budget: float | None,
    heard: Callable[[Job, Message], None],
    ended: Callable[[Job, str | None], None],
    answer: Message,
    began: float,
    meanwhile: Callable[[], object] = lambda: None,
) -> None:
    """Runs all jobs, or as many as the budget allows.

    Args:
        jobs: in the order of their turns; names differ.
        logs: a folder for what the children print.
        environment: of the children.
        at_once: how many children there are at a time; one that waits for the last turn is not counted.
        limit: seconds that a turn may take.
        budget: seconds for all, from `began`, or None. Jobs that ask for the last turn get a fourth of it, at most 3 s.
        heard: called with each message of a child.
        ended: called once for each job: with None where it did all it should, else with the reason in one line.
        answer: what children are told with each turn; `heard` may change it.
        began: `time.monotonic()` at the start.
        meanwhile: called once, when the first children have been started: what takes its time while they import.
    """
    state = _Run(jobs)
    pending = list(jobs)
    prepared = False
    last_part = 0.0 if budget is None else min(3.0, budget / 4)

    def close(child: _Child, reason: str | None) -> None:
        state.running.remove(child)
        child.end()
        state.open.remove(child.job)
        ended(child.job, reason)

    try:
        while state.open:
            now = time.monotonic()
            left = float("inf") if budget is None else began + budget - now
            if left < last_part:
                for child in list(state.running):
                    if left <= 0 or not child.at_last:
                        ended_how = STOPPED if child.turn in ("shared", "alone") else NOT_REACHED
                        close(child, f"{ended_how} the budget of {budget:g} s")
                while pending:
                    job = pending.pop(0)
                    state.open.remove(job)
                    ended(job, f"{NOT_REACHED} the budget of {budget:g} s")
            while pending and sum(not child.at_last for child in state.running) < at_once:
                state.running.append(_start(pending.pop(0), logs, environment))
            if not prepared:
                meanwhile()
                prepared = True
            for child in list(state.running):
                code = child.process.poll()
                for message in child.read():
                    if "ask" in message:
                        child.asked, child.turn, child.at_last = message["ask"], "", message["ask"] == "last"
                    elif "done" in message:
                        child.done = True
                    else:
                        heard(child.job, message)
                allowed = _START_SECONDS if child.turn == "start" else limit
                if code is not None:
                    close(child, child.what_ended_it(code))
                elif child.turn and now - child.since > allowed:
                    close(child, f"killed: its {'start' if child.turn == 'start' else 'turn'} took more than {allowed:g} s")
            for child in state.next_turns():
                child.turn, child.asked, child.since = ("alone" if child.asked == "last" else child.asked), "", time.monotonic()
                with contextlib.suppress(BrokenPipeError):
                    os.write(child.answers, json.dumps(answer).encode() + b"\n")
            time.sleep(_POLL_SECONDS)
    finally:
        for child in list(state.running):
            child.end()
