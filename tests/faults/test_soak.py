"""A short soak test; `python -m tests.faults.soak` runs a long one."""

from __future__ import annotations

from tests.faults.soak import soak


def test_a_run_that_is_killed_and_damaged_again_and_again_ends_like_an_undisturbed_one(tmp_path):
    tally = soak(tmp_path, minutes=0.2, seed=5, faults=8, resize=True, asynchronous=True, tokens=9000)
    assert tally.runs >= 1 and tally.faults["kill -9"] >= 1
