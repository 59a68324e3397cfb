"""Ten thousand steps, in which neither memory nor handles nor step times grow."""

from __future__ import annotations

import pytest

from tests.faults.load import load


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nothing_grows_over_ten_thousand_steps(tmp_path):
    result = load(tmp_path, 10_000)
    assert result["steps"] >= 9_900 and result["saves"] >= 99
