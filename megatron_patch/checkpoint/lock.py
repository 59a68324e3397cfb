"""One job at a time writes a run's folder: SAVE/lock says which, and what a dead job left is recognised.

In: the folder. Out: a lock that is held until it is released or its process dies. On the same machine the owner's process tells whether
the lock is stale. On others its heartbeat does: the owner touches the file every few seconds, and a lock that is not touched for
`PATIENCE` seconds, by the clock of the file system, is nobody's. As that clock may be each node's own, which may be wrong, nothing is taken
that was not also watched for some heartbeats.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from megatron_patch.errors import CheckpointError
from megatron_patch.utils.files import make_folder

LOCK = "lock"
HEARTBEAT = 10.0
PATIENCE = 60.0
_WATCHED = 3 * HEARTBEAT
_LONGEST = 4096


def _started(pid: int) -> str:
    """When a process of this machine began, in clock ticks: another one with the same number began at another time. "" if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, ValueError):
        return ""
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]


def _machine() -> str:
    """Where process numbers mean the same: this boot of this machine, and this container of it."""
    parts = []
    with contextlib.suppress(OSError):
        parts = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join([socket.gethostname(), *parts])


def _read(path: Path) -> dict[str, Any]:
    """What a lock says; nothing where it is torn."""
    try:
        with path.open("rb") as file:
            data = json.loads(file.read(_LONGEST))
        return data if isinstance(data, dict) else {}
    except (ValueError, RecursionError):
        return {}


def _is_dead(owner: dict[str, Any]) -> bool | None:
    """Whether the owner has died; None where it cannot be told from here."""
    if owner.get("machine") != _machine() or type(owner.get("pid")) is not int:
        return None
    return _started(owner["pid"]) != owner.get("started")


def _touched(path: Path) -> int:
    """When the lock was touched last, in nanoseconds. Opened for it: a network file system may tell from memory else."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _age(path: Path) -> float:
    """Seconds since the lock was touched, by the file system's own clock."""
    probe = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    probe.touch()
    try:
        return (_touched(probe) - _touched(path)) / 1e9
    finally:
        probe.unlink(missing_ok=True)


class SaveLock:
    """The right to write a run's folder.

    Args:
        save: the folder; it is made where it does not exist.
        patience: seconds without a heartbeat after which another machine's lock is stale.

    Raises:
        CheckpointError: another job holds it, or the folder cannot be written.
    """

    def __init__(self, save: Path, patience: float = PATIENCE) -> None:
        self.path = save / LOCK
        self.took_over: str | None = None
        """Whose stale lock this one replaces, as a sentence, or None."""
        self._token = secrets.token_hex(8)
        self._stop = threading.Event()
        try:
            make_folder(save)
            while not self._create():
                self._remove_if_stale(patience)
        except OSError as error:
            raise CheckpointError(
                f"cannot write to {save}: {error.strerror or error}", "a folder with free space", "free space, or change --save"
            ) from error
        # A run may end before anybody is there to release it.
        atexit.register(self.release)
        threading.Thread(target=self._beat, name="lock heartbeat", daemon=True).start()

    def _create(self) -> bool:
        pid = os.getpid()
        text = json.dumps({"host": socket.gethostname(), "pid": pid, "started": _started(pid), "machine": _machine(), "token": self._token})
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            file.write(text + "\n")
        return True

    def _remove_if_stale(self, patience: float) -> None:
        """Removes a dead job's lock; waits where a heartbeat has to tell.

        Raises:
            CheckpointError: its owner lives.
        """
        try:
            owner = _read(self.path)
            dead = _is_dead(owner)
            touched, began = _touched(self.path), time.monotonic()
            while dead is None and (_age(self.path) < patience or time.monotonic() < began + min(_WATCHED, patience)):
                time.sleep(min(1.0, patience / 10))
                if _touched(self.path) != touched:
                    dead = False
        except FileNotFoundError:
            return
        who = f"process {owner.get('pid', '?')} on {owner.get('host', 'an unknown host')}"
        if dead is False:
            raise CheckpointError(
                f"another job writes {self.path.parent}: {who}",
                "one job at a time with the same --save",
                f"stop that job, or change --save ({self.path} is removed by itself once the job is dead)",
            )
        # Two jobs may find the same stale lock: what was taken away must be what was looked at, or it is another's new one.
        taken = self.path.with_name(f".{LOCK}-{self._token}")
        try:
            os.replace(self.path, taken)
        except FileNotFoundError:
            return
        if _read(taken).get("token") != owner.get("token"):
            with contextlib.suppress(FileExistsError):
                os.link(taken, self.path)
        else:
            self.took_over = who
        taken.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def check(self) -> None:
        """Before something is published.

        Raises:
            CheckpointError: the lock is another's by now, because this job seemed dead (it was stopped for long, or cut off).
        """
        try:
            owner = _read(self.path)
        except OSError:
            owner = {}
        if owner.get("token") != self._token:
            raise CheckpointError(
                f"{self.path} is no longer this job's: {'process ' + str(owner['pid']) if 'pid' in owner else 'nobody'} has it",
                "one job at a time with the same --save",
                "stop one of the jobs",
            )

    def release(self) -> None:
        """Gives the folder back."""
        self._stop.set()
        atexit.unregister(self.release)
        with contextlib.suppress(OSError):
            if _read(self.path).get("token") == self._token:
                self.path.unlink()
