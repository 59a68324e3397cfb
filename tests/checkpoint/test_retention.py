"""Which checkpoints are kept and which removed; none is removed before a newer one is complete."""

from __future__ import annotations

import shutil

from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.checkpoint import commit as files
from megatron_patch.checkpoint.retention import Retention, first_of_each, prune
from tests.checkpoint.test_commit import flip, save


def steps(folder) -> list[int]:
    return sorted(files.step_of(path) for path in files.list_checkpoints(folder))


def test_one_checkpoint_per_so_many_steps_is_kept(tmp_path):
    for step in range(3, 40, 3):
        save(tmp_path, step, size=10)
        prune(tmp_path, step, Retention(2, steps=frozenset({6}), every=10))
    assert steps(tmp_path) == [6, 12, 21, 30, 36, 39]


def test_one_checkpoint_per_so_many_tokens_is_kept(tmp_path):
    """Steps of 7 tokens: 100 tokens are read at step 15, 200 at step 29."""
    for step in range(1, 34):
        save(tmp_path, step, size=10)
        prune(tmp_path, step, Retention(1, every_tokens=100, tokens_of=lambda step: 7 * step))
    assert steps(tmp_path) == [15, 29, 33]


@given(st.sets(st.integers(0, 200), min_size=1), st.integers(1, 20), st.data())
def test_kept_checkpoints_do_not_depend_on_those_removed_before(found, every, data):
    found = sorted(found)
    kept = first_of_each(found, [step // every for step in found])
    rest = sorted(kept | data.draw(st.sets(st.sampled_from(found))))
    assert first_of_each(rest, [step // every for step in rest]) == kept
    assert all(step >= every for step in kept)


def test_damaged_checkpoints_do_not_displace_valid_ones(tmp_path):
    for step in (3, 6, 9, 12):
        save(tmp_path, step)
    flip(tmp_path / files.folder_name(12) / "part-0.bin")  # newer than what the run resumed from; its sizes still fit
    (tmp_path / files.folder_name(9) / "part-0.bin").unlink()
    save(tmp_path, 10)
    prune(tmp_path, 10, Retention(2))
    assert steps(tmp_path) == [6, 9, 10, 12], "two valid ones, the damaged one between them and the later one"
    save(tmp_path, 11)
    prune(tmp_path, 11, Retention(2))
    assert steps(tmp_path) == [10, 11, 12]


def test_saving_a_step_again_replaces_the_damaged_one_only_when_complete(tmp_path):
    save(tmp_path, 3)
    newer = save(tmp_path, 6)
    flip(newer / "part-0.bin")
    attempt = files.prepare(tmp_path, 6)
    assert files.verify(newer) and newer.exists() and attempt.name.startswith(".partial-step-00000006-")
    save(tmp_path, 6)
    assert files.verify(newer) == [] and not attempt.exists() and steps(tmp_path) == [3, 6]


def test_a_kill_between_manifest_and_rename_loses_nothing(tmp_path):
    """The new checkpoint is complete, and the old one of its step is set aside or still there and damaged: the new one is found."""
    save(tmp_path, 3)
    whole = save(tmp_path, 6)
    attempt = tmp_path / ".partial-step-00000006-0a0b0c0d"
    shutil.copytree(whole, attempt)
    flip(whole / "part-0.bin")
    assert files.find_newest_valid(tmp_path).folder == attempt
    files.prepare(tmp_path, 9)
    assert files.find_newest_valid(tmp_path).folder == whole and files.verify(whole) == []
    shutil.move(whole, attempt)
    assert files.find_newest_valid(tmp_path).folder == attempt
    assert files.find_newest_valid(tmp_path).skipped == ()
