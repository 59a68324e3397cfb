"""Layers shared by ranks and spread over pipeline stages compute what one process computes, across the switch."""

from __future__ import annotations

import pytest

from tests.distributed.matrix import Combination, References, combinations, compare

QUICK = [
    Combination(2, 1, 2, sequence=True, zero=3, model="tied", length="tokens"),
    Combination(2, 1, 2, zero=2),
    Combination(4, 1, 1, sequence=True, model="qwen3, one group"),
    Combination(2, 1, 1, zero=0, length="tokens"),
    Combination(1, 2, 2, zero=1, model="tied", extra="--recompute-granularity full"),
    Combination(1, 3, 1, zero=0, length="tokens"),
    Combination(1, 4, 1, zero=1, model="gpt2"),
    Combination(2, 2, 1, sequence=True, zero=1, length="tokens"),
    Combination(2, 2, 1, zero=0, model="tied"),
    Combination(1, 2, 1, zero=1, model="tied", extra="--bf16"),
]


@pytest.fixture(scope="module")
def references(tmp_path_factory, corpus) -> References:
    return References(tmp_path_factory.mktemp("single"), corpus)


@pytest.mark.parametrize("combination", QUICK, ids=str)
def test_a_layout_equals_one_process(tmp_path, references, combination):
    found = compare(combination, tmp_path / "run", references)
    assert found.steps >= 20 and found.within(combination), found


@pytest.mark.slow
@pytest.mark.parametrize("combination", combinations(), ids=str)
def test_every_layout_equals_one_process(tmp_path, references, combination):
    found = compare(combination, tmp_path / "run", references)
    assert found.steps >= 20 and found.within(combination), found
