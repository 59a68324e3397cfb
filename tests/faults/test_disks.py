"""Disks that fill up, fail and lie: committed checkpoints stay, and the message says what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.checkpoint import commit as files
from tests.distributed.runs import ROOT, Run, printed, start_process, train
from tests.faults.conftest import PLAN

# A process on the bad disk makes several attempts, each with its own fault and in its own copy of the folder.
ATTEMPTS = """
import json, os, shutil, sys
from pathlib import Path
import torch
from megatron_patch.checkpoint import commit as files
from megatron_patch.engine.fragments import Fragment
from megatron_patch.engine.state_files import StateFiles, write_fragments
from megatron_patch.errors import CheckpointError
STATE = files.TrainerState(6, 0, 6, "patch", 30, 3, {}, {}, {}, {}, {})
def save(folder):
    folder = files.prepare(folder, 6)
    tensors = {kind: torch.arange(50_000.0) for kind in ("weight", "exp_avg", "exp_avg_sq")}
    entries = write_fragments(folder, 0, 1, [Fragment("a", (50_000,), None, 0, 50_000, tensors)])
    files.write_manifest(folder, entries | files.write_state(folder, STATE))
    files.publish(folder)
def find(folder):
    found = files.find_newest_valid(folder)
    StateFiles(found.folder).read("weight", "a")
    return found.folder.name, found.skipped
for action, fault, path, folder in json.loads(sys.argv[1]):
    os.environ.update(FAULT=fault, FAULT_PATH=path)
    try:
        outcome = {"save": save, "find": find}[action](Path(folder)) or "done"
    except (CheckpointError, OSError) as error:
        outcome = "refused " + str(error)
    print(json.dumps(outcome))
"""


def attempts(library: Path, *wanted: tuple[str, str, str, Path]) -> list[Any]:
    """Returns the outcome of each (action, fault, part of the paths that it hits, folder)."""
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", ATTEMPTS, json.dumps([[*parts, str(folder)] for *parts, folder in wanted])]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def committed(tmp_path_factory, bad_disk) -> Path:
    """A folder with one checkpoint, of step 6, written by short writes."""
    save = tmp_path_factory.mktemp("committed")
    assert attempts(bad_disk, ("save", "short", "/state-", save), ("find", "", "", save)) == ["done", ["step-00000006", []]]
    return save


def test_a_disk_that_refuses_a_write_leaves_earlier_checkpoints_valid(tmp_path, bad_disk, committed):
    cases = [
        (fault, path)
        for fault in ("eio_write", "eio_fsync", "enospc")
        for path in ("/state-", "/manifest", "/trainer_state", "/latest", "/.partial-")
    ]
    folders = []
    for number, _ in enumerate(cases):
        shutil.copytree(committed / "step-00000006", tmp_path / str(number) / "step-00000003")
        folders.append(tmp_path / str(number))
    results = attempts(bad_disk, *(("save", fault, path, folder) for (fault, path), folder in zip(cases, folders, strict=True)))
    for (fault, path), folder, outcome in zip(cases, folders, results, strict=True):
        assert outcome.startswith("refused") and ("Input/output" in outcome or "No space" in outcome), (fault, path, outcome)
        newest = files.find_newest_valid(folder).folder.name
        assert newest == ("step-00000006" if path == "/latest" else "step-00000003"), (fault, path)


def test_a_checkpoint_with_an_unreadable_file_is_skipped_with_its_reason(tmp_path, bad_disk, committed):
    save = tmp_path / "save"
    shutil.copytree(committed, save)
    shutil.copytree(committed / "step-00000006", save / "step-00000009")
    names = ("state-00000", "manifest.json", "trainer_state")
    *results, nothing = attempts(
        bad_disk, *(("find", "eio_read", f"step-00000009/{name}", save) for name in names), ("find", "eio_read", "/manifest.json", save)
    )
    for name, skipped in results:
        assert name == "step-00000006" and "step-00000009" in skipped[0][0] and "Input/output error" in skipped[0][1]
    assert nothing.startswith("refused no valid checkpoint")
    assert len(list(save.glob("step-*"))) == 2, "nothing was removed for it"


@pytest.mark.parametrize("flags", ["", "--async-save"])
def test_a_full_disk_ends_the_run_and_keeps_its_checkpoints(undisturbed, corpus, small_disk, flags):
    """The disk has room for a dozen checkpoints; it is filled until a save fails, on both ranks, then emptied."""
    folder = small_disk / "run"
    train(folder, 2, PLAN, flags, "--exit-interval 5 --data-path", corpus)
    newest = files.find_newest_valid(folder)
    assert newest is not None
    space = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(space.f_bavail * space.f_frsize - 150_000))
    with pytest.raises(AssertionError, match=r"exit codes \[4, 4\]") as ended:
        train(folder, 2, PLAN, flags, "--data-path", corpus)
    assert "free space" in str(ended.value) and "Traceback" not in printed(folder)
    assert files.find_newest_valid(folder).folder == newest.folder
    (small_disk / "filler").unlink()
    assert train(folder, 2, PLAN, flags, "--data-path", corpus).losses == undisturbed.losses
    assert Run(folder).records("save")[-1]["step"] == len(undisturbed.losses)


def test_a_log_on_a_full_disk_does_not_end_the_run(tmp_path, corpus):
    """Standard output and error go to a device that is always full; a run ends with code 0, and a wrong flag with its own code."""
    words = (PLAN, "--data-path", corpus, ["--save", str(tmp_path / "run")])
    assert start_process(*words, log=Path("/dev/full")).wait(120) == 0
    assert len(Run(tmp_path / "run").losses) > 10
    assert start_process(*words, "--hidden-size 33", log=Path("/dev/full")).wait(60) == 2


def test_metrics_and_events_on_a_full_disk_wait_for_space(undisturbed, corpus, tmp_path, bad_disk, monkeypatch):
    """Lines, unlike checkpoints, can wait: on a disk that refuses them the run continues to its end."""
    for name, value in {"LD_PRELOAD": str(bad_disk), "FAULT": "enospc", "FAULT_PATH": ".jsonl"}.items():
        monkeypatch.setenv(name, value)
    log = tmp_path / "log"
    process = start_process(PLAN, "--data-path", corpus, ["--save", str(tmp_path / "run")], log=log)
    assert process.wait(120) == 0, log.read_text()
    text = log.read_text()
    assert text.count("No space left on device; its lines wait") == 2 and " lost" in text
    assert files.find_newest_valid(tmp_path / "run").state.step == len(undisturbed.losses)
