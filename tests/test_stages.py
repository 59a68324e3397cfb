"""The plan's arithmetic against counting step by step."""

from __future__ import annotations

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.errors import ConfigError
from megatron_patch.stages import LrShape, Progress, Stage, StagePlan, position_weights


def make_stage(name="s", patch_size=4, positions=8, micro=1, batch=2, steps=3, **more):
    return Stage(name, patch_size, positions, micro, batch, steps, **more)


PLAN = StagePlan((make_stage("patch", 4, 8, 1, 2, 3), make_stage("token", 1, 8, 2, 8, 5)), block_tokens=32)


def test_tokens_and_positions_are_never_mixed():
    patch, token = PLAN.stages
    assert patch.sample_tokens == 32 and patch.tokens_per_step == 64 and patch.positions_per_step == 16
    assert token.sample_tokens == 8 and token.tokens_per_step == 64 and token.positions_per_step == 64
    assert PLAN.tokens == 3 * 64 + 5 * 64
    assert PLAN.cost() == pytest.approx((3 * 16 + 5 * 64) / PLAN.tokens)


@pytest.mark.parametrize(("side", "inputs", "labels", "sample"), [("both", 4, 4, 32), ("input", 4, 1, 32), ("output", 1, 4, 8)])
def test_the_side_decides_what_is_patched(side, inputs, labels, sample):
    stage = make_stage(side=side)
    assert (stage.input_patch_size, stage.labels_per_position, stage.sample_tokens) == (inputs, labels, sample)
    assert stage.position_weights == (1.0,) * labels


@given(st.integers(0, 8))
def test_progress_and_steps_are_inverse_and_tokens_add_up(step):
    progress = PLAN.progress(step)
    assert PLAN.step(progress) == step
    counted = sum(PLAN.stages[0 if s < 3 else 1].tokens_per_step for s in range(step))
    assert PLAN.consumed_tokens(progress) == counted
    assert PLAN.consumed(progress, lambda stage: stage.tokens_per_step) == counted


def test_the_end_of_a_stage_and_the_start_of_the_next_are_the_same_step():
    assert PLAN.progress(3) == Progress(1, 0)
    assert PLAN.step(Progress(0, 3)) == PLAN.step(Progress(1, 0)) == 3
    assert PLAN.consumed_tokens(Progress(0, 3)) == PLAN.consumed_tokens(Progress(1, 0))


def test_stages_take_blocks_without_a_gap():
    assert PLAN.first_block(0) == 0
    assert PLAN.last_block(0) == PLAN.first_block(1) == 3 * 64 // 32
    assert PLAN.last_block(1) == PLAN.tokens // 32


def test_a_plan_survives_json():
    stage = make_stage(blend=(("a", 0.25), ("b", 0.75)), lr=LrShape(1e-3, 1e-4, 100, "WSD", None, 10))
    plan = StagePlan((stage, *PLAN.stages[1:]), 32)
    assert StagePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_a_damaged_plan_is_refused():
    data = PLAN.to_json()
    del data["stages"][0]["steps"]
    with pytest.raises(ConfigError, match="not a stage plan"):
        StagePlan.from_json(data)


def test_samples_must_divide_the_block():
    with pytest.raises(ConfigError, match=r"32 tokens.*does not divide the block of 48"):
        StagePlan(PLAN.stages, block_tokens=48)


def test_a_stage_may_not_end_inside_a_block():
    with pytest.raises(ConfigError, match="ends inside a block"):
        StagePlan((make_stage("token", 1, 8, 1, 1, 3), make_stage("patch")), block_tokens=32)


def test_accumulation_rounds_up_so_that_any_number_of_ranks_can_take_a_batch():
    stage = make_stage(batch=10, micro=2)
    assert [stage.gradient_accumulation(ranks) for ranks in (1, 2, 3, 5, 7)] == [5, 3, 2, 1, 1]


@given(st.sampled_from(["uniform", "power", "exponential", "first"]), st.integers(1, 16))
def test_position_weights_keep_the_average_per_label(kind, labels):
    weights = position_weights(kind, labels)
    assert len(weights) == labels and sum(weights) == pytest.approx(labels)
    assert all(a >= b for a, b in itertools.pairwise(weights))


def test_position_weights_follow_their_formulas():
    assert position_weights("power", 4) == pytest.approx([w * 4 / (25 / 12) for w in (1, 1 / 2, 1 / 3, 1 / 4)])
    assert position_weights("exponential", 3) == pytest.approx([math.e**-k * 3 / (1 + math.e**-1 + math.e**-2) for k in range(3)])
    assert position_weights((1.0, 3.0), 2) == pytest.approx((0.5, 1.5))


@pytest.mark.parametrize("kind", ["sqrt", (1.0,), (1.0, -1.0), (0.0, 0.0), (1.0, float("nan"))])
def test_impossible_position_weights_are_refused(kind):
    with pytest.raises(ConfigError):
        position_weights(kind, 2)


def test_annealing_ends_at_the_first_label_alone_and_keeps_the_sum():
    stage = make_stage(steps=10, anneal_share=0.5)
    assert stage.weights_at(4) == (1.0,) * 4
    assert stage.weights_at(9) == pytest.approx((4.0, 0.0, 0.0, 0.0))
    for step in range(10):
        assert sum(stage.weights_at(step)) == pytest.approx(4.0)
    assert stage.weights_at(6)[0] < stage.weights_at(7)[0]
