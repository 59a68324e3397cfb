"""One job at a time writes a folder; the lock of a dead job is recognized, on the same machine and from another one."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_patch.checkpoint import lock as locks
from megatron_patch.checkpoint.lock import LOCK, SaveLock
from megatron_patch.errors import CheckpointError
from tests.distributed.runs import ROOT

HOLD = "import sys; from pathlib import Path; from megatron_patch.checkpoint.lock import SaveLock; assert SaveLock(Path(sys.argv[1])).try_take(); print('held', flush=True); sys.stdin.read()"


def holder(folder) -> subprocess.Popen:
    """Another process that holds the lock of a folder until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_second_job_is_refused_with_the_name_of_the_owner(tmp_path):
    process = holder(tmp_path)
    with pytest.raises(CheckpointError, match=f"process {process.pid} on ") as refused:
        SaveLock(tmp_path).try_take()
    assert refused.value.allowed and refused.value.do
    process.stdin.close()
    process.wait()
    assert not (tmp_path / LOCK).exists(), "a process that ends releases the lock"
    assert SaveLock(tmp_path).try_take()


def test_the_lock_of_a_killed_job_is_taken_over(tmp_path):
    process = holder(tmp_path)
    process.kill()
    process.wait()
    lock = SaveLock(tmp_path)
    assert lock.try_take()
    assert lock.replaced_owner.startswith(f"process {process.pid} on ")
    lock.check()
    lock.release()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("other", [{"started": "1"}, {"started": "", "pid": 2**22 + 1}])
def test_another_process_of_the_same_number_or_none_is_not_the_owner(tmp_path, other):
    lock = SaveLock(tmp_path)
    assert lock.try_take()
    data = json.loads((tmp_path / LOCK).read_text())
    lock.release()
    (tmp_path / LOCK).write_text(json.dumps({**data, **other}))
    lock = SaveLock(tmp_path)
    assert lock.try_take() and lock.replaced_owner
    lock.release()


class Clock:
    """A clock that advances only between two looks at a lock."""

    def __init__(self, monkeypatch):
        self.began = self.now = time.monotonic()
        monkeypatch.setattr(locks.time, "monotonic", lambda: self.now)

    @property
    def waited(self) -> float:
        return self.now - self.began

    def take(self, lock: SaveLock, between=lambda: None) -> SaveLock:
        """Takes the lock, with `between` between the looks."""
        while not lock.try_take():
            self.now += 0.5
            between()
            assert self.waited < 1000, "watched forever"
        return lock


FAR = json.dumps({"pid": 1, "machine": "another", "host": "far"})
DAMAGED = ["", "{", "[]", '{"pid": "x"}', "NaN", "[" * 4000, '{"machine": 1' + "0" * 4000]


@pytest.mark.parametrize("touched", [-100, -5, 3600, 10**9], ids=["long ago", "just now", "in the future", "in decades"])
@pytest.mark.parametrize("text", [FAR, *DAMAGED[:2]], ids=["another machine", "empty", "incomplete"])
def test_on_another_machine_the_heartbeat_decides_whatever_the_clock_says(tmp_path, text, touched, monkeypatch):
    (tmp_path / LOCK).write_text(text)
    then = time.time() + touched
    os.utime(tmp_path / LOCK, (then, then))
    clock, said = Clock(monkeypatch), []
    lock = clock.take(SaveLock(tmp_path, patience=50, report=said.append))
    assert lock.replaced_owner == ("process 1 on far" if text == FAR else "an unknown job")
    lock.release()
    if text != FAR:
        assert 0 < clock.waited <= 5, "an owner has a moment to finish writing"
    elif touched == -100:
        assert 3 * locks.HEARTBEAT <= clock.waited < 50, "the lock is watched for some heartbeats, however old it seems"
    else:
        assert clock.waited == pytest.approx(45 if touched == -5 else 50, abs=1)
    (sentence,) = said
    assert ("process 1 on far" if text == FAR else "empty or damaged") in sentence and "taken over in" in sentence
    assert {-100: "last touched 1 min 40 s ago", -5: "last touched 5 s ago", 3600: "1 h 00 min in the future"}.get(
        touched, "future"
    ) in sentence
    # A live owner touches the file during the wait.
    (tmp_path / LOCK).write_text(text)
    os.utime(tmp_path / LOCK, (then, then))
    with pytest.raises(CheckpointError, match="another job is writing .* whose lock was last touched"):
        clock.take(SaveLock(tmp_path, patience=50), lambda: os.utime(tmp_path / LOCK, (then + 7, then + 7)))
    assert (tmp_path / LOCK).read_text() == text


@pytest.mark.parametrize("text", DAMAGED)
def test_a_lock_without_readable_content_is_taken_over_soon(tmp_path, text, monkeypatch):
    """A full disk leaves an empty one."""
    (tmp_path / LOCK).write_text(text)
    clock = Clock(monkeypatch)
    clock.take(SaveLock(tmp_path)).release()
    assert clock.waited <= 5 and os.listdir(tmp_path) == []


def test_a_lock_that_its_owner_finishes_writing_is_respected(tmp_path, monkeypatch):
    """On a file system without hard links, a new lock is empty for a moment."""
    (tmp_path / LOCK).write_text("")
    before = json.dumps({"pid": os.getpid(), "started": locks._started(os.getpid()), "machine": locks._machine(), "host": "here"})
    with pytest.raises(CheckpointError, match=f"process {os.getpid()} on here"):
        Clock(monkeypatch).take(SaveLock(tmp_path), lambda: (tmp_path / LOCK).write_text(before))


def _fifo(path):
    os.mkfifo(path)


def _socket(path):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


def _device(path):
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(5, 0))
    except PermissionError:
        pytest.skip("needs the right to make a device")


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda path: path.symlink_to("nowhere"), "a symbolic link"),
        (lambda path: path.symlink_to(path), "a symbolic link"),
        (_fifo, "a named pipe"),
        (Path.mkdir, "a folder"),
        (_socket, "a socket"),
        (_device, "a device"),
    ],
    ids=["dangling link", "link to itself", "named pipe", "folder", "socket", "device"],
)
def test_what_is_no_lock_of_this_program_is_refused_at_once(tmp_path, make, name, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    make(Path(LOCK))
    with pytest.raises(CheckpointError, match=f"lock is {name}") as refused:
        SaveLock(tmp_path).try_take()
    assert refused.value.allowed and "remove" in refused.value.do
    assert os.path.lexists(LOCK)


def test_a_lock_that_cannot_be_read_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / LOCK).write_text(FAR)
    opening = os.open

    def refused(path, *args):
        if str(path).endswith("/lock"):
            raise PermissionError(13, "Permission denied")
        return opening(path, *args)

    monkeypatch.setattr(locks.os, "open", refused)
    with pytest.raises(CheckpointError, match="cannot read .*lock.*Permission denied"):
        SaveLock(tmp_path).try_take()


def test_a_lock_appears_with_its_content_and_a_full_disk_leaves_none(tmp_path, monkeypatch):
    seen, linking, syncing = [], os.link, os.fsync
    monkeypatch.setattr(locks.os, "link", lambda *paths: (seen.append((tmp_path / LOCK).exists()), linking(*paths)))
    lock = SaveLock(tmp_path)
    assert lock.try_take() and seen == [False]
    lock.release()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    for link in (linking, _no_links):
        monkeypatch.setattr(locks.os, "link", link)
        monkeypatch.setattr(locks.os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left"):
            SaveLock(tmp_path).try_take()
        assert os.listdir(tmp_path) == []
    # A file system without hard links.
    monkeypatch.setattr(locks.os, "fsync", syncing)
    lock = SaveLock(tmp_path)
    assert lock.try_take()
    with pytest.raises(CheckpointError, match="another job is writing"):
        SaveLock(tmp_path).try_take()
    lock.check()
    lock.release()
    assert os.listdir(tmp_path) == []


def _no_links(source, target):
    raise OSError(errno.EPERM, "Operation not permitted")


def test_the_content_of_a_lock_cannot_write_to_the_terminal(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps({"pid": 10**30, "machine": "x", "host": "\x1b[2J[red]\ud800" + "a" * 3000}))
    said = []
    assert not SaveLock(tmp_path, report=said.append).try_take()
    assert said[0].isprintable() and len(said[0]) < 500 and said[0].isascii()


def test_a_job_that_lost_its_lock_publishes_nothing_more(tmp_path):
    lock = SaveLock(tmp_path)
    assert lock.try_take()
    (tmp_path / LOCK).write_text(json.dumps({"token": "another's", "machine": "another", "pid": 5, "host": "far"}))
    with pytest.raises(CheckpointError, match="no longer holds .*: process 5 on far does"):
        lock.check()
    os.utime(tmp_path / LOCK, (1000, 1000))
    lock._touch()
    assert (tmp_path / LOCK).stat().st_mtime == 1000, "the other job's lock is not kept alive"
    lock.release()
    assert (tmp_path / LOCK).exists(), "the other job's lock is not removed"


def test_the_owner_keeps_its_lock_alive(tmp_path):
    lock = SaveLock(tmp_path)
    assert lock.try_take()
    os.utime(tmp_path / LOCK, (1000, 1000))
    lock._touch()
    assert (tmp_path / LOCK).stat().st_mtime > 1000
    lock.release()
