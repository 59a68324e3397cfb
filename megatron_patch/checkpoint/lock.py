"""The lock on a run's folder, SAVE/lock: one job at a time writes the folder, and the lock of a dead job is recognized.

In: the folder. Out: a lock that is held until it is released or its process dies. On the same machine, a lock is stale if the owner's
process no longer exists. From another machine the owner's heartbeat decides: the owner touches the file every few seconds, and a lock
that was not touched for `PATIENCE` seconds, by the clock of the file system, is stale. That clock may be another node's and wrong, so a
lock is taken over only after it was also watched for some heartbeats.
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
    """Returns the start time of a process of this machine in clock ticks, or "" if there is none.

    It distinguishes the process from a later one with the same number.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, ValueError):
        return ""
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]


def _machine() -> str:
    """Returns an identifier of the scope of process numbers: this machine, its current boot and this container."""
    parts = []
    with contextlib.suppress(OSError):
        parts = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join([socket.gethostname(), *parts])


def _read(path: Path) -> dict[str, Any]:
    """Returns the content of a lock file; an empty dictionary if it is damaged."""
    try:
        with path.open("rb") as file:
            data = json.loads(file.read(_LONGEST))
        return data if isinstance(data, dict) else {}
    except (ValueError, RecursionError):
        return {}


def _is_dead(owner: dict[str, Any]) -> bool | None:
    """Returns whether the owner has died; None if that cannot be decided on this machine."""
    if owner.get("machine") != _machine() or type(owner.get("pid")) is not int:
        return None
    return _started(owner["pid"]) != owner.get("started")


def _touched(path: Path) -> int:
    """Returns when the lock was touched last, in nanoseconds. Opens the file, as a network file system may otherwise use cached values."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _age(path: Path) -> float:
    """Returns the seconds since the lock was touched, by the clock of the file system."""
    probe = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    probe.touch()
    try:
        return (_touched(probe) - _touched(path)) / 1e9
    finally:
        probe.unlink(missing_ok=True)


class SaveLock:
    """The exclusive right to write a run's folder; creating the object takes the lock.

    Args:
        save: the run's folder; it is created if it does not exist.
        patience: seconds without a heartbeat after which the lock of a job on another machine is stale.

    Raises:
        CheckpointError: another job holds the lock, or the folder cannot be written.
    """

    def __init__(self, save: Path, patience: float = PATIENCE) -> None:
        self.path = save / LOCK
        self.replaced_owner: str | None = None
        """The job whose stale lock was replaced, as "process P on HOST", or None."""
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
        # A run may end on a path that does not release the lock.
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
        """Removes the lock of a dead job; if the job ran on another machine, waits for its heartbeat first.

        Raises:
            CheckpointError: the owner is alive.
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
        owner_name = f"process {owner.get('pid', '?')} on {owner.get('host', 'an unknown host')}"
        if dead is False:
            raise CheckpointError(
                f"another job is writing to {self.path.parent}: {owner_name}",
                "one job at a time with the same --save",
                f"stop that job, or change --save (do not remove {self.path}: once that job has ended, the next one takes the lock over)",
            )
        # Two jobs may find the same stale lock. If the file changed since it was read, it is the other job's new lock and is put back.
        taken = self.path.with_name(f".{LOCK}-{self._token}")
        try:
            os.replace(self.path, taken)
        except FileNotFoundError:
            return
        if _read(taken).get("token") != owner.get("token"):
            with contextlib.suppress(FileExistsError):
                os.link(taken, self.path)
        else:
            self.replaced_owner = owner_name
        taken.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def check(self) -> None:
        """Checks that this job still holds the lock; must be called before a checkpoint is published.

        Raises:
            CheckpointError: another job has taken the lock over, because this job seemed dead (suspended or disconnected for long).
        """
        try:
            owner = _read(self.path)
        except OSError:
            owner = {}
        if owner.get("token") != self._token:
            raise CheckpointError(
                f"this job no longer holds {self.path}: {'process ' + str(owner['pid']) if 'pid' in owner else 'no process'} does",
                "one job at a time with the same --save",
                "stop one of the jobs",
            )

    def release(self) -> None:
        """Releases the lock."""
        self._stop.set()
        atexit.unregister(self.release)
        with contextlib.suppress(OSError):
            if _read(self.path).get("token") == self._token:
                self.path.unlink()
