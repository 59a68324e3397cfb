"""The commit protocol: a checkpoint is complete and verified, or it does not appear, whatever happens to its files."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.checkpoint import commit as files
from megatron_patch.checkpoint.retention import Retention, prune
from megatron_patch.errors import CheckpointError
from megatron_patch.utils.files import checksum

ROOT = Path(__file__).parent.parent.parent
STATE = files.TrainerState(3, 0, 3, "patch", 30, 3, {"a": 1}, {"options": {}}, {"seed": 1}, {"step_count": 3}, {"num_layers": 1})


def save(folder: Path, step: int, ranks: int = 2, size: int = 1000, **fields: Any) -> Path:
    """Writes a checkpoint as ranks do and returns its folder."""
    target = files.prepare(folder, step)
    for rank in range(ranks):
        (target / f"part-{rank}.bin").write_bytes(random.Random(f"{step}/{rank}").randbytes(size + rank))
    files.write_state(target, files.TrainerState(**{**vars(STATE), "step": step, **fields}))
    files.write_manifest(target, {path.name: files.ManifestEntry(path.stat().st_size, checksum(path)) for path in target.iterdir()})
    return files.publish(target)


def test_a_complete_checkpoint_is_found(tmp_path):
    target = save(tmp_path, 3)
    found = files.find_newest_valid(tmp_path)
    assert found is not None and found.folder == target and found.state == STATE and found.skipped == ()
    assert files.verify(target) == [] and (tmp_path / "latest").read_text().strip() == target.name
    assert files.find_newest_valid(target).folder == target, "the folder of a checkpoint is accepted too"


def test_checkpoints_that_are_not_wanted_are_ignored(tmp_path):
    for step, mark in ((3, "a"), (6, "a"), (9, "b")):
        save(tmp_path, step, begun_from=mark)
    flip(tmp_path / "step-00000006" / "part-0.bin")
    (tmp_path / "step-00000009" / files.STATE).write_text("torn")
    found = files.find_newest_valid(tmp_path, lambda state: state.begun_from == "a")
    assert found is not None and found.state.step == 3 and [Path(folder).name for folder, _ in found.skipped] == ["step-00000006"]
    assert files.find_newest_valid(tmp_path, lambda state: False) is None


def test_ranks_share_the_checksums_without_gap_or_overlap(tmp_path):
    target = save(tmp_path, 3, ranks=5)
    for ranks in (1, 2, 3, 7):
        sizes = {name: entry.size for name, entry in files.read_manifest(target).items()}
        shares = [files.share_of_rank(sizes, rank, ranks) for rank in range(ranks)]
        assert sorted(name for share in shares for name in share) == sorted(sizes)
        assert max(len(share) for share in shares) <= -(-len(sizes) // ranks) + 1


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda t: (t / "part-0.bin").write_bytes((t / "part-0.bin").read_bytes()[:-1]),
    "a flipped bit": lambda t: flip(t / "part-1.bin"),
    "a missing file": lambda t: (t / "part-1.bin").unlink(),
    "no manifest": lambda t: (t / "manifest.json").unlink(),
    "a torn manifest": lambda t: (t / "manifest.json").write_text((t / "manifest.json").read_text()[:50]),
    "an edited manifest": lambda t: (t / "manifest.json").write_text((t / "manifest.json").read_text().replace("part-0", "part-9")),
    "an empty manifest": lambda t: (t / "manifest.json").write_text(""),
    "a torn state": lambda t: (t / "trainer_state.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_and_the_previous_one_taken(tmp_path, damage):
    older, newer = save(tmp_path, 3), save(tmp_path, 6)
    DAMAGE[damage](newer)
    found = files.find_newest_valid(tmp_path)
    assert found.folder == older and found.skipped[0][0] == str(newer) and found.skipped[0][1]
    DAMAGE[damage](older)
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        files.find_newest_valid(tmp_path)


@pytest.mark.parametrize("text", ["", "step-", "nowhere\n", "step-00000099\n", "../../etc\n"])
def test_a_damaged_latest_is_harmless(tmp_path, text):
    target = save(tmp_path, 3)
    (tmp_path / "latest").write_text(text)
    assert files.find_newest_valid(tmp_path).folder == target
    (tmp_path / "latest").unlink()
    assert files.find_newest_valid(tmp_path).folder == target


def test_a_run_without_checkpoints_is_no_error(tmp_path):
    assert files.find_newest_valid(tmp_path / "new") is None
    files.prepare(tmp_path, 5)
    assert files.find_newest_valid(tmp_path) is None, "an attempt that was killed before its manifest"


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b"])
def test_paths_cannot_leave_the_folder(tmp_path, name):
    target = save(tmp_path, 3)
    files.write_manifest(target, {**files.read_manifest(target), name: files.ManifestEntry(1, "0")})
    with pytest.raises(CheckpointError, match="inside"):
        files.read_manifest(target)
    assert files.verify(target)


@pytest.mark.parametrize(
    "change", [{"step": -1}, {"step": "3"}, {"stage_name": 5}, {"plan": []}, {"version": 9}, {"step": True}, {"model": None}]
)
def test_trainer_states_are_checked(tmp_path, change):
    data = json.loads((save(tmp_path, 3) / "trainer_state.json").read_text())
    with pytest.raises(CheckpointError):
        files.TrainerState.from_json({**data, **change}, "x")
    for name in data.keys() - {"held_out", "own_model", "kept_config"}:  # which came without another version
        with pytest.raises(CheckpointError):
            files.TrainerState.from_json({key: value for key, value in data.items() if key != name}, "x")


def test_old_checkpoints_are_removed_only_if_the_newest_is_valid(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step)
    removed = prune(tmp_path, 6, Retention(2, steps=frozenset({2})))
    assert sorted(path.name for path in removed) == [files.folder_name(step) for step in (1, 3, 4)]
    assert [path.name for path in files.list_checkpoints(tmp_path)] == [files.folder_name(step) for step in (6, 5, 2)]
    (files.list_checkpoints(tmp_path)[0] / "part-0.bin").unlink()
    assert prune(tmp_path, 6, Retention(1)) == []
    assert prune(tmp_path, 6, Retention(0)) == []
    assert not list(tmp_path.glob(".trash*"))


def test_a_killed_writer_never_leaves_a_broken_newest(tmp_path):
    """A process that commits checkpoints without pause is killed at random moments; the newest valid one always verifies."""
    # The pipe buffers thousands of lines, so the process never waits for a reader.
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\nfrom tests.checkpoint.test_commit import *\n"
        "folder = Path(sys.argv[1]); step = max([files.step_of(p) for p in files.list_checkpoints(folder)] or [0])\n"
        "while True:\n    step += 1; save(folder, step, size=20000); prune(folder, step, Retention(2)); print('go', flush=True)\n"
    )
    draw = random.Random(1)
    newest = 0
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(ROOT)], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"go\n"
        time.sleep(0.05 + draw.random() * 0.15)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        found = files.find_newest_valid(tmp_path)
        assert found is not None and files.verify(found.folder) == []
        assert found.state.step >= newest
        newest = found.state.step
    assert newest > 6
