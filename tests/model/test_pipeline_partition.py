"""Layers are split into contiguous parts as evenly as possible: compared with all possible partitions."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.errors import ConfigError
from megatron_patch.model.flops import forward_flops_per_position, layer_flops, layer_parameters, parameter_count
from megatron_patch.model.pipeline_partition import blocks_of_parts, pipeline_partition
from tests.model.shapes import FAMILIES, LLAMA


def sums(weights, boundaries):
    return [sum(weights[first:last]) for first, last in itertools.pairwise(boundaries)]


@given(st.integers(0, 30), st.integers(1, 9), st.integers(0, 30), st.integers(0, 8), st.data())
def test_no_cut_is_better(first, block, last, blocks, data):
    parts = data.draw(st.integers(1, blocks + 2))
    counts = blocks_of_parts(first, block, last, blocks, parts)
    assert len(counts) == parts and sum(counts) == blocks and min(counts[1:-1], default=1) >= 1
    weights = [first, *[block] * blocks, last]
    boundaries = list(itertools.accumulate([1 + counts[0], *counts[1:-1], 1 + counts[-1]] if parts > 1 else [blocks + 2], initial=0))

    def badness(cut):
        found = sums(weights, cut)
        return max(found), sum(value * value for value in found), [-value for value in found]

    cuts = ([0, *inner, len(weights)] for inner in itertools.combinations(range(1, len(weights)), parts - 1))
    assert badness(boundaries) == min(badness(cut) for cut in cuts), "of equally even cuts, the one with the heavier parts in front"


def test_equal_layers_are_cut_evenly_with_the_rest_in_front():
    assert blocks_of_parts(1, 1, 1, 8, 4) == [2, 3, 2, 1]
    assert blocks_of_parts(0, 1, 0, 24, 4) == [6, 6, 6, 6]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_weigh_what_the_model_weighs(family):
    shape = FAMILIES[family]
    copy = shape.vocab_size * shape.hidden_size if shape.tie_embeddings else 0
    assert sum(layer_parameters(shape)) == parameter_count(shape).total + copy
    assert sum(layer_flops(shape, 7)) == forward_flops_per_position(shape, 7)


def test_what_is_balanced_decides_where_the_blocks_go():
    shape = dataclasses.replace(LLAMA, num_layers=12, vocab_size=2000, padded_vocab_size=2048)
    by = {name: pipeline_partition(shape, 4, name, 64) for name in ("parameters", "flops", "blocks")}
    assert by["blocks"] == [0, 4, 7, 10, 14]
    assert by["flops"][3] > by["blocks"][3], "a heavy head leaves the last stage fewer blocks"
    assert by["parameters"][1] == 2, "a heavy embedding has one block beside it"
    assert pipeline_partition(LLAMA, 3, "parameters", 64) == [0, 2, 3, 4]
    for parts in (0, 4):
        with pytest.raises(ConfigError, match=f"--pipeline-model-parallel-size {parts} for 2 blocks"):
            pipeline_partition(LLAMA, parts, "parameters", 64)


def test_thousands_of_layers_are_divided_without_comparing_all_cuts():
    shape = dataclasses.replace(LLAMA, num_layers=10_000, vocab_size=200_000, padded_vocab_size=200_000)
    boundaries = pipeline_partition(shape, 1_000, "parameters", 64)
    assert boundaries[0] == 0 and boundaries[1] == 2 and boundaries[-1] == 10_002
    assert {last - first for first, last in itertools.pairwise(boundaries[1:-1])} == {10, 11}
