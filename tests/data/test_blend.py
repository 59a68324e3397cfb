"""Blends: every beginning keeps the proportions, ordinals count up, any weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.data.blend import Blend


@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=7))
def test_every_beginning_is_within_a_block_of_its_share(weights):
    blend = Blend(weights, largest_period=512)
    corpora, ordinals = blend.locate(np.arange(3 * max(blend.period, 20)))
    shares = blend.counts / blend.period
    for corpus in range(len(weights)):
        mine = corpora == corpus
        counts = np.cumsum(mine)
        bound = 1 - 1 / (2 * len(weights) - 2) if len(weights) > 1 else 0.0
        assert np.abs(counts - shares[corpus] * np.arange(1, len(mine) + 1)).max() <= bound + 1e-9
        assert np.array_equal(ordinals[mine], np.arange(mine.sum()))
    for blocks in (0, 1, 17, blend.period, 2 * blend.period + 5):
        assert np.array_equal(blend.consumed(blocks), np.bincount(corpora[:blocks], minlength=len(weights)))


@pytest.mark.parametrize(
    ("weights", "period"),
    [([0.7, 0.2, 0.0999, 0.0001], 10_000), ([7, 2, 1], 10), ([1 / 3, 2 / 3], 3), ([0.1 / 0.3, 0.2 / 0.3], 3), ([5.0], 1)],
)
def test_simple_weights_are_kept_exactly(weights, period):
    blend = Blend(weights)
    assert blend.period == period
    assert blend.counts / blend.period == pytest.approx(np.array(weights) / sum(weights), rel=1e-12)


def test_other_weights_are_kept_to_the_table_s_precision():
    weights = np.array([np.pi, np.e, 1e-9])
    blend = Blend(list(weights), largest_period=1 << 12)
    assert blend.period == 1 << 12 and blend.counts.min() == 1
    assert blend.counts / blend.period == pytest.approx(weights / weights.sum(), abs=1.5 / blend.period)


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [1.0, -1.0], [float("nan")], [float("inf"), 1.0]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="above zero"):
        Blend(weights)
