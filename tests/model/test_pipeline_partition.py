"""Layers are split into contiguous parts as evenly as possible: compared with all possible partitions."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.errors import ConfigError
from megatron_patch.model.flops import forward_flops_per_position, layer_flops, layer_parameters, parameter_count
from megatron_patch.model.pipeline_partition import partition_layers, pipeline_partition
from tests.model.shapes import FAMILIES, LLAMA


def sums(weights, boundaries):
    return [sum(weights[first:last]) for first, last in itertools.pairwise(boundaries)]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.data())
def test_no_cut_is_better(weights, data):
    parts = data.draw(st.integers(1, len(weights)))
    boundaries = partition_layers(weights, parts)
    assert boundaries[0] == 0 and boundaries[-1] == len(weights) and len(boundaries) == parts + 1
    assert all(first < last for first, last in itertools.pairwise(boundaries))

    def badness(cut):
        found = sums(weights, cut)
        return max(found), sum(value * value for value in found)

    cuts = ([0, *inner, len(weights)] for inner in itertools.combinations(range(1, len(weights)), parts - 1))
    assert badness(boundaries) == min(badness(cut) for cut in cuts)


def test_equal_layers_are_cut_evenly_with_the_rest_in_front():
    assert partition_layers([1] * 10, 4) == [0, 3, 6, 8, 10]
    assert partition_layers([0, *[1] * 24, 0], 4) == [0, 7, 13, 19, 26]


@pytest.mark.parametrize("parts", [0, 5])
def test_parts_that_cannot_be(parts):
    with pytest.raises(ConfigError, match="4 layers"):
        partition_layers([1] * 4, parts)


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
    with pytest.raises(ConfigError, match="--pipeline-model-parallel-size 4 for 2 blocks"):
        pipeline_partition(LLAMA, 4, "parameters", 64)
