"""Each reader of bytes from outside, briefly; `python -m tests.faults.fuzz --examples 100000` does it at length."""

from __future__ import annotations

import pytest

from tests.faults.fuzz import TARGETS, fuzz


@pytest.mark.parametrize("name", TARGETS)
def test_only_the_program_s_own_errors_come_out(tmp_path, name):
    count = fuzz(name, tmp_path / name, examples=100)
    assert count["refused"] + count["read"] >= 100 // TARGETS[name].cost
