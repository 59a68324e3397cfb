"""One job at a time writes a folder; the lock of a dead job is recognized, on the same machine and from another one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from megatron_patch.checkpoint import lock as locks
from megatron_patch.checkpoint.lock import LOCK, SaveLock
from megatron_patch.errors import CheckpointError
from tests.distributed.runs import ROOT

HOLD = "import sys; from pathlib import Path; from megatron_patch.checkpoint.lock import SaveLock; {}; print('held', flush=True); sys.stdin.read()"


def holder(folder, release: bool = False) -> subprocess.Popen:
    """Another process that holds the lock of a folder until its input ends."""
    code = HOLD.format("lock = SaveLock(Path(sys.argv[1]))")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_second_job_is_refused_with_the_name_of_the_owner(tmp_path):
    process = holder(tmp_path)
    with pytest.raises(CheckpointError, match=f"process {process.pid} on ") as refused:
        SaveLock(tmp_path)
    assert refused.value.allowed and refused.value.do
    process.stdin.close()
    process.wait()
    assert not (tmp_path / LOCK).exists(), "a process that ends releases the lock"
    SaveLock(tmp_path).release()


def test_the_lock_of_a_killed_job_is_taken_over(tmp_path):
    process = holder(tmp_path)
    process.kill()
    process.wait()
    lock = SaveLock(tmp_path)
    assert lock.replaced_owner.startswith(f"process {process.pid} on ")
    lock.check()
    lock.release()
    assert os.listdir(tmp_path) == []


def test_another_process_of_the_same_number_is_not_the_owner(tmp_path):
    lock = SaveLock(tmp_path)
    data = json.loads((tmp_path / LOCK).read_text())
    lock.release()
    (tmp_path / LOCK).write_text(json.dumps({**data, "started": "1"}))
    lock = SaveLock(tmp_path)
    assert lock.replaced_owner
    lock.release()


class WaitedSeconds:
    """Replaces `time.sleep`: it only advances the mocked clock."""

    def __init__(self, monkeypatch, began):
        self.seconds, self._set, self._began = 0.0, monkeypatch.setattr, began

    def __call__(self, seconds):
        self.seconds += seconds
        self._set(locks.time, "monotonic", lambda now=self._began + self.seconds: now)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', json.dumps({"pid": 1, "machine": "another", "host": "far"})])
def test_on_another_machine_the_heartbeat_decides(tmp_path, text, monkeypatch):
    (tmp_path / LOCK).write_text(text)
    os.utime(tmp_path / LOCK, (time.time() - 100, time.time() - 100))
    now = time.monotonic()
    monkeypatch.setattr(locks.time, "monotonic", lambda: now)
    monkeypatch.setattr(locks.time, "sleep", waited := WaitedSeconds(monkeypatch, now))
    lock = SaveLock(tmp_path, patience=50)
    lock.release()
    assert 3 * locks.HEARTBEAT <= waited.seconds < 50, "the lock is watched for some heartbeats, however old it seems"
    # A live owner touches the file during the wait, even if its clock is an hour slow.
    for skew in (0, 3600):
        (tmp_path / LOCK).write_text(text)
        os.utime(tmp_path / LOCK, (time.time() - skew, time.time() - skew))
        heartbeat = time.time() - skew + 7
        monkeypatch.setattr(locks.time, "sleep", lambda seconds, heartbeat=heartbeat: os.utime(tmp_path / LOCK, (heartbeat, heartbeat)))
        with pytest.raises(CheckpointError, match="another job is writing"):
            SaveLock(tmp_path, patience=50)


def test_a_job_that_lost_its_lock_publishes_nothing_more(tmp_path):
    lock = SaveLock(tmp_path)
    (tmp_path / LOCK).write_text(json.dumps({"token": "another's", "pid": 5}))
    with pytest.raises(CheckpointError, match="no longer holds .*: process 5 does"):
        lock.check()
    lock.release()
    assert (tmp_path / LOCK).exists(), "the other job's lock is not removed"
