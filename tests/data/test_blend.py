"""Blends: every beginning keeps the proportions, ordinals count up, any weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.data.blend import Blend


@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=7))
def test_every_beginning_is_within_a_block_of_its_share(weights):
    blend = Blend(weights, period=512)
    corpora, ordinals = blend.locate(np.arange(3 * max(blend.period, 20)))
    shares = blend.counts / blend.period
    for corpus in range(len(weights)):
        mine = corpora == corpus
        counts = np.cumsum(mine)
        assert np.abs(counts - shares[corpus] * np.arange(1, len(mine) + 1)).max() <= 1.0 + 1e-9
        assert np.array_equal(ordinals[mine], np.arange(mine.sum()))
    for blocks in (0, 1, 17, blend.period, 2 * blend.period + 5):
        assert np.array_equal(blend.consumed(blocks), np.bincount(corpora[:blocks], minlength=len(weights)))


def test_weights_are_kept_to_the_table_s_precision():
    weights = np.array([0.7, 0.2, 0.0999, 0.0001])
    blend = Blend(weights)
    assert blend.counts / blend.period == pytest.approx(weights, abs=1.0 / blend.period)
