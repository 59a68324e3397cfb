"""Permutations without tables: bijections of any size, inverted, in constant memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.data.permutation import Permutation, derive_key


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_every_number_once(n, key):
    order = Permutation(n, key).many(np.arange(n))
    assert np.array_equal(np.sort(order), np.arange(n))


@given(
    st.sampled_from([10**9, 10**12, 2**40, 2**40 + 1, 2**61]),
    st.lists(st.integers(0, 10**9 - 1), min_size=1, max_size=50),
    st.integers(0, 100),
)
def test_huge_ones_are_inverted(n, positions, key):
    permutation = Permutation(n, key)
    numbers = permutation.many(np.array(positions))
    assert ((numbers >= 0) & (numbers < n)).all()
    assert permutation.inverse(numbers).tolist() == positions
    assert permutation(positions[0]) == numbers[0]


def test_keys_and_positions_matter():
    n = 10_000
    first, second = (Permutation(n, derive_key(seed, "x")).many(np.arange(n)) for seed in (1, 2))
    assert (first == second).mean() < 0.01
    assert (first == np.arange(n)).mean() < 0.01
    # Neighbours fall far apart: the mean distance of a random order is n/3.
    assert np.abs(np.diff(first)).mean() == pytest.approx(n / 3, rel=0.05)
    assert derive_key(1, 23) != derive_key(12, 3)


def test_outside_is_refused():
    with pytest.raises(IndexError):
        Permutation(5, 0).many(np.array([5]))
    with pytest.raises(ValueError, match="0 numbers"):
        Permutation(0, 0)
