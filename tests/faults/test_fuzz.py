"""A short fuzzing of each reader of untrusted bytes; `python -m tests.faults.fuzz --examples 100000` takes longer."""

from __future__ import annotations

import pytest

from tests.faults.fuzz import TARGETS, fuzz


@pytest.mark.parametrize("name", TARGETS)
def test_readers_raise_only_the_program_s_own_errors(tmp_path, name):
    count = fuzz(name, tmp_path / name, examples=100)
    assert count["refused"] + count["read"] >= 100 // TARGETS[name].cost
