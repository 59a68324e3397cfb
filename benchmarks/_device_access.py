"""Child processes that use one device in turn: one measures with exclusive access while the others import and compile.

The parent (`run`) starts children and never uses the device, so that an error of a child on the device cannot end the parent. A child
(`DeviceAccess`) requests the device over a pipe and waits for the grant: "shared" for untimed work (starting CUDA, compiling, warming up),
"exclusive" for measurements, "last" for exclusive access after all others have ended. Access is granted in the order of the jobs. It ends
with the child's next request or with its process. A child is killed, with all processes of its group, when its start or an access exceeds
the limit, or when the budget ends. This module imports only the standard library, so that children start before their parent imports torch.
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
"""Starts of the reasons that `run` reports when the budget has ended."""
_POLL_SECONDS = 0.02
_START_SECONDS = 60.0
_PARENT_DEATH_SIGNAL = 1


@dataclass(frozen=True)
class Job:
    """One child process.

    Args:
        name: name of the job and of its log.
        command: command to run; `run` appends the two file descriptors of `DeviceAccess`.
        urgent: whether later jobs get access only after this one has ended or requests the last access.
    """

    name: str
    command: tuple[str, ...]
    urgent: bool = False


class DeviceAccess:
    """A child's end of the pipes to the parent.

    Args:
        grants: file descriptor to read from.
        requests: file descriptor to write to.
    """

    def __init__(self, grants: int, requests: int) -> None:
        for descriptor in (grants, requests):
            os.set_inheritable(descriptor, False)
        self._grants, self._requests = os.fdopen(grants), os.fdopen(requests, "w")
        # The kernel kills this process with its parent, so that none remains on the device.
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)

    def acquire(self, mode: str) -> Message:
        """Ends the current access, waits for one of mode "shared", "exclusive" or "last", and returns the parent's message."""
        self.send(acquire=mode)
        grant = self._grants.readline()
        if not grant:
            raise SystemExit("the parent has ended")
        return json.loads(grant)

    def send(self, **message: Any) -> None:
        """Sends one message to the parent; a child that has finished its work sends `done=True` last."""
        self._requests.write(json.dumps(message) + "\n")
        self._requests.flush()


@dataclass
class _Child:
    job: Job
    process: subprocess.Popen[bytes]
    messages: int
    grants: int
    log: Path
    since: float
    access: str = "start"
    requested: str = ""
    requests_last: bool = False
    done: bool = False
    buffer: bytearray = field(default_factory=bytearray)

    def read(self) -> list[Message]:
        """Returns the messages that have arrived."""
        while select.select([self.messages], [], [], 0)[0] and (data := os.read(self.messages, 1 << 16)):
            self.buffer += data
        *lines, rest = bytes(self.buffer).split(b"\n")
        self.buffer = bytearray(rest)
        return [json.loads(line) for line in lines]

    def failure_reason(self, code: int) -> str | None:
        """Returns None if the child finished its work, else the reason in one line with the last line of its log."""
        if code == 0 and self.done:
            return None
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended early with exit code {code}"
        return f"{reason}: {lines[-1][:200] if lines else 'nothing printed'}"

    def end(self) -> None:
        """Kills the child with all processes of its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        # A process that waits inside a driver may not end even then; the other children continue.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        for descriptor in (self.messages, self.grants):
            os.close(descriptor)


def _start(job: Job, logs: Path, environment: dict[str, str]) -> _Child:
    messages, requests = os.pipe()
    grants, grants_write = os.pipe()
    log = logs / f"{job.name}.log"
    try:
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [*job.command, str(grants), str(requests)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(grants, requests),
                start_new_session=True,
                env=environment,
            )
    finally:
        os.close(grants)
        os.close(requests)
    return _Child(job, process, messages, grants_write, log, time.monotonic())


class _Run:
    def __init__(self, jobs: Sequence[Job]) -> None:
        self.order = {job.name: index for index, job in enumerate(jobs)}
        self.open = list(jobs)
        self.running: list[_Child] = []

    def is_blocked(self, child: _Child) -> bool:
        """Returns whether an earlier urgent job has not ended."""
        requests_last = {other.job.name for other in self.running if other.requests_last}
        return any(job.urgent and job.name not in requests_last and self.order[job.name] < self.order[child.job.name] for job in self.open)

    def next_grants(self) -> list[_Child]:
        """Returns the children that get access now."""
        holders = [child.access for child in self.running if child.access in ("shared", "exclusive")]
        if "exclusive" in holders:
            return []
        chosen: list[_Child] = []
        for child in sorted(self.running, key=lambda child: self.order[child.job.name]):
            if not child.requested or self.is_blocked(child):
                continue
            if child.requested == "shared":
                chosen.append(child)
                holders.append("shared")
            elif not holders and (child.requested == "exclusive" or len(self.open) == 1):
                return [child]
        return chosen


def run(
    jobs: Sequence[Job],
    logs: Path,
    environment: dict[str, str],
    at_once: int,
    limit: float,
    budget: float | None,
    on_message: Callable[[Job, Message], None],
    on_end: Callable[[Job, str | None], None],
    grant: Message,
    began: float,
    while_starting: Callable[[], object] = lambda: None,
) -> None:
    """Runs all jobs, or as many as the budget allows.

    Args:
        jobs: the jobs in the order of their access; names differ.
        logs: folder for the output of the children.
        environment: environment variables of the children.
        at_once: largest number of children at a time; a child that waits for the last access is not counted.
        limit: longest access, in seconds.
        budget: seconds for all jobs from `began`, or None. Jobs that request the last access get a quarter of it, at most 3 s.
        on_message: called with each message of a child.
        on_end: called once per job, with None if it finished its work, else with the reason in one line.
        grant: message that children get with each access; `on_message` may change it.
        began: `time.monotonic()` at the start.
        while_starting: called once after the first children have started, for slow work such as imports.
    """
    state = _Run(jobs)
    pending = list(jobs)
    prepared = False
    reserved = 0.0 if budget is None else min(3.0, budget / 4)

    def close(child: _Child, reason: str | None) -> None:
        state.running.remove(child)
        child.end()
        state.open.remove(child.job)
        on_end(child.job, reason)

    try:
        while state.open:
            now = time.monotonic()
            left = float("inf") if budget is None else began + budget - now
            if left < reserved:
                for child in list(state.running):
                    if left <= 0 or not child.requests_last:
                        start_of_reason = STOPPED if child.access in ("shared", "exclusive") else NOT_REACHED
                        close(child, f"{start_of_reason} the budget of {budget:g} s")
                while pending:
                    job = pending.pop(0)
                    state.open.remove(job)
                    on_end(job, f"{NOT_REACHED} the budget of {budget:g} s")
            while pending and sum(not child.requests_last for child in state.running) < at_once:
                state.running.append(_start(pending.pop(0), logs, environment))
            if not prepared:
                while_starting()
                prepared = True
            for child in list(state.running):
                code = child.process.poll()
                for message in child.read():
                    if "acquire" in message:
                        mode = message["acquire"]
                        child.requested, child.access, child.requests_last = mode, "", mode == "last"
                    elif "done" in message:
                        child.done = True
                    else:
                        on_message(child.job, message)
                allowed = _START_SECONDS if child.access == "start" else limit
                if code is not None:
                    close(child, child.failure_reason(code))
                elif child.access and now - child.since > allowed:
                    close(child, f"killed: its {'start' if child.access == 'start' else 'use of the device'} took more than {allowed:g} s")
            for child in state.next_grants():
                child.access = "exclusive" if child.requested == "last" else child.requested
                child.requested, child.since = "", time.monotonic()
                with contextlib.suppress(BrokenPipeError):
                    os.write(child.grants, json.dumps(grant).encode() + b"\n")
            time.sleep(_POLL_SECONDS)
    finally:
        for child in list(state.running):
            child.end()
