"""Recipes and stage lists: published numbers, shares against their definitions, rounding, and refusals."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.config.options import ScheduleOptions, StageOptions
from megatron_patch.config.plan_builder import build_plan
from megatron_patch.config.stage_spec import parse_blend
from megatron_patch.errors import ConfigError


def plan(ranks=1, schedule=None, **options):
    options.setdefault("seq_length", 16)
    if "global_batch_size" not in options:
        options.setdefault("global_batch_tokens", 64 * 16)
    options.setdefault("train_tokens", 1_000_000)
    if isinstance(options.get("stages"), list):
        options["stages"] = json.dumps(options["stages"])
    return build_plan(StageOptions(**options), schedule or ScheduleOptions(), ranks)


def test_patch_train_is_half_the_cost_at_two_thirds():
    result = plan(patch_size=4, train_tokens=10_000_000)
    patch, token = result.stages
    assert patch.tokens / result.tokens == pytest.approx(2 / 3, abs=1e-3)
    assert result.cost() == pytest.approx(0.5, abs=1e-3)
    assert patch.tokens_per_step == token.tokens_per_step, "constant tokens a step"
    assert token.global_batch_size == 4 * patch.global_batch_size
    assert (token.lr_policy, token.optimizer) == ("restart", "reset")


def test_token_superposition_by_share_of_compute():
    result = plan(recipe="token-superposition", patch_size=6, train_tokens=30_000_000)
    patch, token = result.stages
    assert patch.positions_per_step == token.positions_per_step, "constant positions a step"
    assert patch.steps / result.steps == pytest.approx(0.3, abs=2e-3)
    assert patch.tokens / result.tokens == pytest.approx(0.72, abs=2e-3)
    assert result.cost() == pytest.approx(0.4, abs=2e-3)
    assert (token.lr_policy, token.optimizer) == ("continue", "keep")
    assert patch.lr.style == "WSD"
    assert patch.lr.wsd_decay_tokens == pytest.approx(result.steps / 10 * token.tokens_per_step, rel=2e-3)


def test_a_decay_by_share_is_one_of_steps_and_may_begin_among_patches():
    def decay(share):
        result = plan(
            recipe="token-superposition",
            patch_size=4,
            patch_compute_share=0.3,
            global_batch_size=1,
            train_tokens=(300 * 4 + 700) * 16,
            schedule=ScheduleOptions(lr_wsd_decay_fraction=share),
        )
        assert [stage.steps for stage in result.stages] == [300, 700]
        return result.stages[0].lr.wsd_decay_tokens / 16

    assert [decay(share) for share in (0.1, 0.7, 0.8, 1.0)] == [100, 700, 700 + 4 * 100, 700 + 4 * 300]


def test_a_batch_in_tokens_is_rounded_to_whole_micro_batches_of_all_ranks():
    result = plan(ranks=8, seq_length=2048, micro_batch_size=4, global_batch_tokens=2_000_000, patch_size=4, train_tokens=10**9)
    for stage in result.stages:
        assert stage.global_batch_size % (4 * 8) == 0
        assert stage.tokens_per_step == pytest.approx(2_000_000, rel=0.1)


def test_a_batch_in_samples_is_taken_as_it_is():
    result = plan(ranks=3, global_batch_size=20, patch_size=4)
    assert [stage.global_batch_size for stage in result.stages] == [5, 20]


def test_constant_tokens_shorten_the_patch_stage():
    result = plan(patch_size=4, sample="constant-tokens")
    assert [stage.positions for stage in result.stages] == [4, 16]
    assert [stage.sample_tokens for stage in result.stages] == [16, 16]


@given(
    st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=4),
    st.sampled_from(["token_share", "compute_share", "step_share"]),
    st.sampled_from(["constant-tokens", "constant-positions"]),
    st.data(),
)
def test_shares_are_what_they_say(patch_sizes, kind, batch, data):
    shares = [data.draw(st.floats(0.05, 0.9 / len(patch_sizes))) for _ in patch_sizes[1:]]
    stages = [{"patch_size": k, kind: share} for k, share in zip(patch_sizes, shares, strict=False)]
    stages.append({"patch_size": patch_sizes[-1]})
    result = plan(stages=stages, batch=batch, train_tokens=200_000_000, global_batch_size=24)
    units = {
        "token_share": lambda stage: stage.tokens,
        "compute_share": lambda stage: stage.steps * stage.positions_per_step,
        "step_share": lambda stage: stage.steps,
    }[kind]
    total = sum(map(units, result.stages))
    assert result.tokens == pytest.approx(200_000_000, rel=2e-3)
    for stage, share in zip(result.stages, shares, strict=False):
        assert units(stage) / total == pytest.approx(share, rel=2e-2)


@given(st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 40)), min_size=2, max_size=5))
def test_every_stage_but_the_last_ends_on_a_block(entries):
    result = plan(stages=[{"patch_size": k, "steps": steps} for k, steps in entries], train_tokens=None, global_batch_size=24)
    for index in range(len(result.stages)):
        assert result.block_tokens % result.stages[index].sample_tokens == 0
        if index:
            assert result.first_token(index) % result.block_tokens == 0


def test_eight_four_two_one_with_everything_a_stage_can_say():
    stages = [
        {"name": "k8", "patch_size": 8, "compute_share": 0.1, "position_weights": "power", "lr": "1e-3", "anneal_share": 0.2},
        {"patch_size": 4, "compute_share": "0.1", "lr_policy": "rewarm", "lr_warmup_tokens": "10k", "optimizer": "reset_moments"},
        {"patch_size": 2, "compute_share": 0.1, "lr_policy": "continue", "side": "input", "batch": "constant-positions"},
        {"patch_size": 1, "lr-policy": "restart", "micro_batch_size": 2, "data_path": ["0.5", "a", "0.5", "b"]},
    ]
    result = plan(stages=stages, train_tokens=20_000_000)
    k8, k4, k2, k1 = result.stages
    assert [stage.patch_size for stage in result.stages] == [8, 4, 2, 1]
    assert k8.position_weights[0] > k8.position_weights[1] and k8.anneal_share == 0.2 and k8.lr.lr == 1e-3
    assert (k4.lr_policy, k4.rewarm_tokens, k4.optimizer) == ("rewarm", 10_000, "reset_moments")
    assert (k2.labels_per_position, k2.optimizer) == (1, "keep")
    assert k1.blend == (("a", 0.5), ("b", 0.5)) and k1.micro_batch_size == 2


def test_a_rewarm_has_a_length_or_is_refused():
    stages = [{"patch_size": 2, "steps": 40}, {"patch_size": 1, "steps": 40, "lr_policy": "rewarm"}]
    by_share = plan(stages=stages, train_tokens=None, schedule=ScheduleOptions(lr_warmup_fraction=0.05)).stages[1]
    assert by_share.rewarm_tokens == by_share.tokens // 20
    assert plan(stages=stages, train_tokens=None, schedule=ScheduleOptions(lr_warmup_tokens=700)).stages[1].rewarm_tokens == 700
    with pytest.raises(ConfigError, match=r"stage 'token' has lr_policy: rewarm but no warm-up\n.*--lr-warmup-fraction"):
        plan(stages=stages, train_tokens=None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patch_size": 4, "patch_fraction": 0.5, "patch_compute_share": 0.5}, "one of them"),
        ({"patch_size": 4, "patch_fraction": 1.5}, "between 0 and 1"),
        ({"recipe": "patch-train"}, "patch size of at least 2"),
        ({"recipe": "token-level", "patch_size": 4}, "token-level"),
        ({"patch_size": 3, "sample": "constant-tokens"}, "patches of 3"),
        ({"patch_size": 4, "block_tokens": 100}, "is not a multiple of the tokens in a sample"),
        ({"patch_size": 4, "train_tokens": None}, "--train-tokens"),
        ({"global_batch_size": 4, "global_batch_tokens": 64}, "given twice"),
        ({"patch_size": 4, "global_batch_size": 6}, "multiples of"),
        ({"stages": [{"patch_sizes": 4}]}, "did you mean patch_size"),
        ({"stages": [{"patch_size": 4, "tokens": "1X"}]}, "entry 1: tokens"),
        ({"stages": [{"patch_size": 4, "tokens": 1000, "steps": 5}]}, "tokens and steps"),
        ({"stages": [{"patch_size": 4}, {"patch_size": 1}]}, "more than one stage without an amount"),
        ({"stages": [{"patch_size": 4, "lr_policy": "continue"}]}, "first stage"),
        ({"stages": [{"patch_size": 4, "optimizer": "fresh"}]}, "reset_moments"),
        ({"stages": [{"patch_size": 4, "tokens": "100k"}, {"lr_policy": "continue", "lr": 1e-3}]}, "gives lr, which would have no effect"),
        ({"stages": [{"patch_size": 4, "compute_share": 0.2}, {"patch_size": 2, "step_share": 0.2}, {}]}, "one of the two"),
        ({"stages": [{"patch_size": 4, "token_share": 0.7}, {"patch_size": 2, "token_share": 0.7}, {}]}, "training tokens"),
        ({"stages": [{"patch_size": 4, "compute_share": 0.6}, {"patch_size": 2, "compute_share": 0.4}, {}]}, "leave nothing for entry 3"),
        (
            {"stages": [{"patch_size": 4, "compute_share": 0.3}, {"compute_share": 0.3}]},
            "entry 1 has compute_share 0.3, but the other amounts make it 0.5",
        ),
        ({"stages": [{"patch_size": 4, "micro_batch_size": 0}]}, "micro_batch_size 0"),
        ({"stages": [{"patch_size": 4, "data_path": {"a": 1}}]}, "weights and prefixes"),
        ({"stages": [{"patch_size": 4, "data_path": []}]}, "weights and prefixes"),
        ({"stages": {"patch_size": 4}}, "list"),
        ({"stages": [{"patch_size": 4}], "recipe": "patch-train"}, "a recipe or a list"),
        ({"position_weights": "1,2,3", "patch_size": 4}, "position weights"),
    ],
)
def test_impossible_plans_are_refused_with_the_reason(options, words):
    if isinstance(options.get("stages"), dict):
        options = {**options, "stages": json.dumps(options["stages"])}
    with pytest.raises(ConfigError, match=words):
        plan(**options)


def test_a_warm_up_longer_than_its_schedule_is_refused():
    with pytest.raises(ConfigError, match="warm-up of 2M"):
        plan(schedule=ScheduleOptions(lr_warmup_tokens=2_000_000))


def test_blends():
    assert parse_blend(("a",)) == (("a", 1.0),)
    assert parse_blend(("3", "a", "1", "b")) == (("a", 0.75), ("b", 0.25))
    for words in (("1", "a", "b"), ("a", "0.5", "b"), ("0", "a"), ("-1", "a"), ("a", "a")):
        with pytest.raises(ConfigError):
            parse_blend(words)
    for weight in ("nan", "1e400", "inf", "-inf", "0"):
        with pytest.raises(ConfigError, match=f"{weight} a: a weight is not above 0, or not finite\n.*finite weights above 0"):
            parse_blend((weight, "a"))
    with pytest.raises(ConfigError) as caught:
        parse_blend(("0", "a" * 4000))
    assert len(str(caught.value)) < 1000
