"""The lock on a run's folder, SAVE/lock: one job at a time writes the folder, and the lock of a dead job is recognized.

In: the folder. Out: a lock that is held until it is released or its process dies. On the same machine, a lock is stale if the owner's
process no longer exists. From another machine the owner's heartbeat decides: the owner touches the file every few seconds, and a lock
that was not touched for `PATIENCE` seconds is stale. The age of a lock may come from a wrong clock, even from the future, so a lock is
taken over only after it was also watched for some heartbeats; a touch while it is watched means that its owner lives, whatever the clock.

A lock appears with all of its content at once. A file without readable content is therefore what a full disk left of an earlier attempt
to write it, and is watched only shortly. What this program never makes (a link, a named pipe, a folder) is refused.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import os
import re
import secrets
import socket
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.errors import CheckpointError
from megatron_patch.utils.files import make_folder, read_small
from megatron_patch.utils.units import format_duration

LOCK = "lock"
HEARTBEAT = 10.0
PATIENCE = 60.0
_WATCHED = 3 * HEARTBEAT
_DAMAGED_WATCHED = 3.0  # in which another job may finish writing its lock, on a file system without hard links
_LONGEST = 4096
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV)
_KINDS = {stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a named pipe", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}


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


@dataclass(frozen=True)
class _Found:
    """A lock file as it was read.

    Args:
        owner: its content; an empty dictionary if it is damaged.
        touched: when it was touched last, in nanoseconds.
    """

    owner: dict[str, Any]
    touched: int

    @property
    def name(self) -> str:
        """The owner, for messages; the file may contain anything."""
        pid, host = self.owner.get("pid"), self.owner.get("host")
        known = type(pid) is int and isinstance(host, str)
        return f"process {str(pid)[:20]} on {re.sub(r'[^A-Za-z0-9_.:-]', '?', str(host))[:64]}" if known else "an unknown job"

    def is_dead(self) -> bool | None:
        """Returns whether the owner has died; None if that cannot be decided on this machine."""
        if self.owner.get("machine") != _machine() or type(self.owner.get("pid")) is not int:
            return None
        started = _started(self.owner["pid"])
        return started == "" or started != self.owner.get("started")


@dataclass(frozen=True)
class _Watch:
    """The lock that is being watched, and the time (`time.monotonic`) until which its owner has to touch it."""

    found: _Found
    until: float


def _read(path: Path) -> _Found:
    """Returns what a lock file contains; opens it each time, as a network file system may otherwise use cached values. Never blocks.

    Raises:
        CheckpointError: the path is no file, or this user may not read it.
    """
    kind = stat.S_IFMT(path.lstat().st_mode)
    if kind != stat.S_IFREG:
        raise CheckpointError(
            f"{path} is {_KINDS.get(kind, 'a device')}, not the lock of a job",
            "no such path, or the file that a running job has made",
            f"find out what made it; remove {path} if no job writes to {path.parent}, or change --save",
        )
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except PermissionError as error:
        raise CheckpointError(
            f"cannot read {path}, so that its owner remains unknown: {error.strerror}",
            "a lock that this user may read",
            f"see who owns it with ls -l; remove {path} if no job writes to {path.parent}, or change --save",
        ) from error
    with open(descriptor, "rb") as file:
        text, touched = file.read(_LONGEST), os.fstat(descriptor).st_mtime_ns
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    return _Found(data if isinstance(data, dict) and isinstance(data.get("machine"), str) else {}, touched)


def _create(path: Path, text: bytes) -> bool:
    """Creates a lock file with all of its content at once; returns whether it did, or False if the path exists already.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        _write_new(temporary, text)
        try:
            os.link(temporary, path)
        except FileExistsError:
            # A network file system may have made the link, lost its answer and tried again.
            return temporary.stat().st_nlink == 2
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _create_in_place(path, text)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _create_in_place(path: Path, text: bytes) -> bool:
    """As `_create`, on a file system without hard links: other jobs may see the file before its content."""
    try:
        _write_new(path, text)
    except FileExistsError:
        return False
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _write_new(path: Path, text: bytes) -> None:
    """Writes a new file and forces it to disk.

    Raises:
        OSError: the path exists, or the file cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with open(descriptor, "wb", buffering=0) as file:
        if file.write(text) != len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)


def _age(path: Path, touched: int) -> float:
    """Returns the seconds since the time `touched`, by the clock of the file system of `path`; negative if it is in the future."""
    probe = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    probe.touch()
    try:
        return (probe.stat().st_mtime_ns - touched) / 1e9
    finally:
        probe.unlink(missing_ok=True)


def _age_text(age: float) -> str:
    """Returns when a lock was touched last, for messages."""
    if age < 0:
        return f"last touched {format_duration(-age)} in the future, by a wrong clock"
    return f"last touched {format_duration(age)} ago"


class SaveLock:
    """The exclusive right to write a run's folder, from the first `try_take` that returns True until `release`.

    Args:
        save: the run's folder; `try_take` creates it if it does not exist.
        patience: seconds without a heartbeat after which the lock of a job on another machine is stale.
        report: gets a sentence at the beginning of each wait: who holds the lock, since when, and when it is taken over.
    """

    def __init__(self, save: Path, patience: float = PATIENCE, report: Callable[[str], None] = lambda message: None) -> None:
        self.path = save / LOCK
        self.replaced_owner: str | None = None
        """The job whose stale lock was replaced, as "process P on HOST", or None."""
        self._patience, self._report = patience, report
        self._token = secrets.token_hex(8)
        self._watch: _Watch | None = None
        self._stop = threading.Event()

    def try_take(self) -> bool:
        """Takes the lock if it is free or its owner is dead, without waiting.

        Returns:
            True once this job holds the lock. False while another job's lock is being watched: call again every second or so.

        Raises:
            CheckpointError: another job holds the lock, or the folder cannot be written, or the lock cannot be read.
        """
        try:
            make_folder(self.path.parent)
            for _ in range(2):
                if self._create():
                    # A run may end on a path that does not release the lock.
                    atexit.register(self.release)
                    threading.Thread(target=self._beat, name="lock heartbeat", daemon=True).start()
                    return True
                with contextlib.suppress(FileNotFoundError):
                    found = _read(self.path)
                    if not self._is_stale(found):
                        return False
                    self._remove(found)
        except OSError as error:
            raise CheckpointError(
                f"cannot write to {self.path.parent}: {error.strerror or error}",
                "a folder with free space",
                "free space, or change --save",
            ) from error
        return False

    def _create(self) -> bool:
        if os.path.lexists(self.path):
            return False
        pid = os.getpid()
        content = {"host": socket.gethostname(), "pid": pid, "started": _started(pid), "machine": _machine(), "token": self._token}
        return _create(self.path, json.dumps(content).encode() + b"\n")

    def _is_stale(self, found: _Found) -> bool:
        """Returns whether the owner of a lock is dead, or False while that is being watched.

        Raises:
            CheckpointError: the owner is alive.
        """
        dead = found.is_dead()
        watch = self._watch if self._watch is not None and self._watch.found.owner == found.owner else None
        if dead is False or (dead is None and watch is not None and watch.found.touched != found.touched):
            raise CheckpointError(
                f"another job is writing to {self.path.parent}: {found.name}, whose lock was {_age_text(_age(self.path, found.touched))}",
                "one job at a time with the same --save",
                f"stop that job, or change --save (do not remove {self.path}: once that job has ended, the next one takes the lock over)",
            )
        if dead is None and watch is None:
            self._watch = self._begin_watch(found)
            return False
        return dead is True or (watch is not None and time.monotonic() >= watch.until)

    def _begin_watch(self, found: _Found) -> _Watch:
        age = _age(self.path, found.touched)
        # At most for the patience: an age from the future says nothing.
        seconds = min(self._patience, max(_WATCHED, self._patience - max(0.0, age)) if found.owner else _DAMAGED_WATCHED)
        content = "" if found.owner else " (the file is empty or damaged, as a full disk leaves it)"
        when = time.strftime("%H:%M:%S", time.localtime(time.time() + seconds))
        self._report(
            f"{self.path} is the lock of {found.name}{content}, {_age_text(age)}; it is taken over in {format_duration(seconds)}, "
            f"at {when}, unless its owner touches it until then"
        )
        return _Watch(found, time.monotonic() + seconds)

    def _remove(self, found: _Found) -> None:
        """Removes a stale lock. If it changed since it was read, another job was faster or the owner lives, and it is put back."""
        taken = self.path.with_name(f".{LOCK}-{self._token}")
        os.replace(self.path, taken)
        if _read(taken) != found:
            _create(self.path, read_small(taken, _LONGEST))
        else:
            self.replaced_owner = found.name
        taken.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            self._touch()

    def _touch(self) -> None:
        """Touches the lock, unless another job has taken it over, whose lock would seem alive without its owner."""
        with contextlib.suppress(OSError):
            if self._owner().get("token") == self._token:
                os.utime(self.path, follow_symlinks=False)

    def _owner(self) -> dict[str, Any]:
        """Returns the content of the lock file, or an empty dictionary."""
        try:
            return _read(self.path).owner
        except (OSError, CheckpointError):
            return {}

    def check(self) -> None:
        """Checks that this job still holds the lock; must be called before a checkpoint is published.

        Raises:
            CheckpointError: another job has taken the lock over, because this job seemed dead (suspended or disconnected for long).
        """
        owner = self._owner()
        if owner.get("token") != self._token:
            name = _Found(owner, 0).name if owner else "no job"
            raise CheckpointError(
                f"this job no longer holds {self.path}: {name} does", "one job at a time with the same --save", "stop one of the jobs"
            )

    def release(self) -> None:
        """Releases the lock."""
        self._stop.set()
        atexit.unregister(self.release)
        with contextlib.suppress(OSError):
            if self._owner().get("token") == self._token:
                self.path.unlink()
