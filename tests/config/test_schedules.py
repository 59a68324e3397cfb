"""Lengths of the learning rate in steps: counted step by step, over switches between batches, and refused where they cannot be."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.config.options import ScheduleOptions, StageOptions
from megatron_patch.config.parsing import parse
from megatron_patch.config.plan_builder import build_plan
from megatron_patch.config.resolve import resolve
from megatron_patch.errors import ConfigError
from megatron_patch.training.lr_schedule import build_lr_schedule

REPLICATE = Path(__file__).parents[2] / "examples" / "replicate"
RUN = "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --vocab-size 64 --seq-length 16 --global-batch-size 3 --dry-run"


def plan(*stages, **schedule):
    """Returns the plan of stages whose steps have as many tokens as their K: samples of one position, one sample in a step."""
    options = StageOptions(stages=json.dumps(stages), seq_length=1, global_batch_size=1, batch="constant-positions")
    return build_plan(options, ScheduleOptions(**{"lr": 1.0, "lr_decay_style": "WSD", **schedule}), 1)


def steps_of(plan):
    """Returns the tokens of each step, one after the other."""
    return [stage.tokens_per_step for stage in plan.stages for _ in range(stage.steps)]


@given(st.lists(st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(1, 9)), min_size=1, max_size=4), st.data())
def test_steps_are_counted_over_switches(entries, data):
    policies = itertools.chain([{}], itertools.repeat({"lr_policy": "continue"}))
    # Of 8 steps each, so that every stage ends on a block.
    stages = [{"patch_size": k, "steps": 8 * steps, **policy} for (k, steps), policy in zip(entries, policies, strict=False)]
    total = sum(stage["steps"] for stage in stages)
    warmup = data.draw(st.integers(1, total - 1))
    tail = data.draw(st.integers(1, total - warmup))
    result = plan(*stages, lr_warmup_steps=warmup, lr_wsd_decay_steps=tail)
    tokens = steps_of(result)
    shape = result.stages[0].lr
    assert shape.warmup_tokens == sum(tokens[:warmup]) and shape.wsd_decay_tokens == sum(tokens[total - tail :])
    rates = [build_lr_schedule(result).at(read) for read in itertools.accumulate(tokens)]
    assert [step for step, rate in enumerate(rates, start=1) if rate == 1.0] == list(range(warmup, total - tail + 1))
    assert rates[-1] == 0.0 < rates[0]
    end = data.draw(st.integers(warmup + 1, 2 * total))
    shape = plan(*stages, lr_warmup_steps=warmup, lr_decay_steps=end, lr_decay_style="cosine").stages[0].lr
    assert shape.decay_tokens == sum(tokens[:end]) + max(0, end - total) * tokens[-1]


def test_a_final_decay_in_steps_ends_where_the_decay_ends():
    stages = {"patch_size": 4, "steps": 8}, {"patch_size": 1, "steps": 8, "lr_policy": "continue"}
    shape = plan(*stages, lr_decay_steps=10, lr_wsd_decay_steps=3).stages[0].lr
    assert (shape.decay_tokens, shape.wsd_decay_tokens) == (8 * 4 + 2, 4 + 2)
    inside = plan(*stages, lr_decay_tokens=30, lr_wsd_decay_steps=2).stages[0].lr
    assert inside.wsd_decay_tokens == 8


def test_a_final_decay_that_ends_after_the_run_may_be_longer_than_it():
    shape = plan({"patch_size": 4, "steps": 30}, lr_warmup_steps=9, lr_decay_steps=100, lr_wsd_decay_steps=90).stages[0].lr
    assert (shape.warmup_tokens, shape.decay_tokens, shape.wsd_decay_tokens) == (36, 400, 360)


def test_a_rewarm_in_steps_continues_in_the_next_stage():
    first, second = {"patch_size": 1, "steps": 8}, {"patch_size": 4, "steps": 2, "lr_policy": "rewarm", "lr_warmup_steps": 5}
    third = {"patch_size": 1, "steps": 8, "lr_policy": "continue"}
    assert plan(first, second, third).stages[1].rewarm_tokens == 2 * 4 + 3
    of_run = {key: value for key, value in second.items() if key != "lr_warmup_steps"}
    assert plan(first, of_run, third, lr_warmup_steps=1).stages[1].rewarm_tokens == 4
    with pytest.raises(ConfigError, match="warm-up of 11 steps in a schedule of 10 steps"):
        plan(first, {**second, "lr_warmup_steps": 11}, third)


def test_a_stage_s_length_overrides_that_of_the_run_in_any_unit():
    def warmup(stage, **schedule):
        return plan({"patch_size": 4, "steps": 100, **stage}, **schedule).stages[0].lr.warmup_tokens

    assert warmup({"lr_warmup_steps": 3}, lr_warmup_tokens=100) == warmup({"lr_warmup_steps": 3}, lr_warmup_fraction=0.5) == 12
    assert warmup({"lr_warmup_tokens": 5}, lr_warmup_steps=3) == 5
    assert warmup({"lr_warmup_tokens": 0}, lr_warmup_steps=3) == warmup({"lr_warmup_steps": 0}, lr_warmup_fraction=0.5) == 0
    shape = plan({"steps": 100, "lr_decay_steps": 50, "lr_wsd_decay_steps": 7}, lr_decay_tokens=10, lr_wsd_decay_fraction=0.5).stages[0].lr
    assert (shape.decay_tokens, shape.wsd_decay_tokens) == (50, 7)


@pytest.mark.parametrize(
    ("stage", "schedule", "what", "do"),
    [
        ({}, {"lr_warmup_steps": 41}, "a warm-up of 41 steps in a schedule of 40 steps", "lower --lr-warmup-steps"),
        ({"lr_warmup_steps": 41}, {}, "a warm-up of 41 steps in a schedule of 40 steps", "lower lr_warmup_steps"),
        ({}, {"lr_wsd_decay_steps": 41}, "a final decay of 41 steps in a schedule of 40 steps", "lower --lr-wsd-decay-steps"),
        ({}, {"lr_decay_steps": 20, "lr_wsd_decay_steps": 21}, "a final decay of 21 steps in a schedule of 20", "--lr-wsd-decay-steps"),
        (
            {},
            {"lr_warmup_steps": 20, "lr_wsd_decay_steps": 21},
            "a warm-up of 20 steps and a final decay of 21 steps in a schedule of 40 steps",
            "lower --lr-wsd-decay-steps or --lr-warmup-steps",
        ),
        ({}, {"lr_warmup_fraction": 0.5, "lr_wsd_decay_steps": 21}, "20 steps and a final decay of 21 steps", "or the warm-up"),
        ({}, {"lr_warmup_steps": 20, "lr_decay_steps": 20}, "the decay ends after 80 tokens, the warm-up after 80", "--lr-decay-tokens"),
        ({"lr_decay_steps": 0}, {}, "lr_decay_steps is 0", "raise lr_decay_steps"),
        ({"lr_wsd_decay_steps": 0}, {}, "lr_wsd_decay_steps is 0", "raise lr_wsd_decay_steps"),
        ({"lr_warmup_steps": 1, "lr_warmup_tokens": 1}, {}, "entry 1: lr_warmup_tokens together with lr_warmup_steps", "remove"),
        ({"lr_decay_steps": "1e13"}, {}, "entry 1: lr_decay_steps 10000000000000", "smaller"),
        ({"lr_warmup_steps": -1}, {}, "entry 1: lr_warmup_steps: -1 is not a count", "write it like 2M"),
    ],
)
def test_impossible_lengths_are_refused_with_what_gives_them(stage, schedule, what, do):
    with pytest.raises(ConfigError) as refusal:
        plan({"patch_size": 4, "steps": 40, **stage}, **schedule)
    assert what in refusal.value.what and do in refusal.value.do, str(refusal.value)


def notes(*words):
    """Returns the notes of a run of 100 steps, each of 48 tokens, that are on learning rates."""
    found = resolve(parse([*f"{RUN} --train-tokens 4800".split(), *words]), 1).notes
    return [note for note in found if "by default" not in note]


@pytest.mark.parametrize("key", ["lr_wsd_decay_tokens", "lr_wsd_decay_steps"])
@pytest.mark.parametrize("style", ["WSD", "cosine"])
def test_a_stage_s_final_decay_of_length_0_is_refused(key, style):
    """With WSD it would replace --lr-wsd-decay-fraction by the default."""
    with pytest.raises(ConfigError, match=f"stage 'token': {key} is 0"):
        notes("--lr-wsd-decay-fraction", "0.5", "--stages", f"[{{lr_decay_style: {style}, {key}: 0}}]")


@pytest.mark.parametrize(
    ("words", "note"),
    [
        ("--lr-wsd-decay-steps 3", "--lr-wsd-decay-steps has no effect: --lr-decay-style is cosine, and only WSD reads it"),
        ("--lr-wsd-decay-fraction 0.1 --lr-decay-style linear", "--lr-wsd-decay-fraction has no effect: --lr-decay-style is linear, "),
        ("--lr-decay-style constant --lr-decay-steps 5", "is constant, and only linear, cosine and WSD read it"),
        ("--lr-decay-style WSD --lr-decay-steps 10 --lr-wsd-decay-tokens 2000", "has 480 tokens instead of 2k, because its schedule ends"),
        ("--lr-decay-style WSD --lr-warmup-steps 90 --lr-wsd-decay-fraction 0.2", "instead of 960, because its schedule ends after 4.8k "),
        ("--lr-decay-style WSD --lr-decay-steps 10 --lr-wsd-decay-tokens 480", None),
        ("--lr-decay-style WSD --lr-decay-steps 10 --lr-wsd-decay-fraction 0.1", None),
        ("--lr-decay-style WSD --lr-warmup-fraction 0.505 --lr-wsd-decay-fraction 0.5", None),
        ("--lr-decay-style linear --lr-decay-tokens 480 --lr-warmup-steps 1", None),
    ],
)
def test_lengths_without_their_whole_effect_are_noted(words, note):
    found = notes(*words.split())
    assert len(found) == (note is not None) and all(note in text for text in found), found


def test_lengths_of_stages_without_effect_are_noted_with_the_stage():
    own = "[{name: a, steps: 8, lr_decay_style: cosine, lr_wsd_decay_tokens: 9}, {lr_decay_style: WSD}]"
    assert notes("--stages", own, "--lr-wsd-decay-steps", "3") == [
        "stage a: lr_wsd_decay_tokens has no effect: lr_decay_style is cosine, and only WSD reads it"
    ]


def test_two_units_for_one_length_are_named_at_once():
    two = "--train-tokens 10k --lr-warmup-steps 5 --lr-warmup-fraction 0.1 --lr-decay-steps 9 --lr-decay-tokens 9"
    three = "--lr-wsd-decay-steps 1 --lr-wsd-decay-tokens 1 --lr-wsd-decay-fraction 0.1"
    with pytest.raises(ConfigError) as refusal:
        resolve(parse(f"{RUN} {two} {three}".split()), 1)
    assert str(refusal.value).startswith("3 problems in the flags")
    for pair in ("--lr-warmup-steps together with --lr-warmup-fraction", "--lr-decay-tokens together with --lr-decay-steps"):
        assert any(pair in problem.error.what for problem in refusal.value.problems)
    last = refusal.value.problems[-1].error
    assert last.what == "--lr-wsd-decay-tokens, --lr-wsd-decay-steps together with --lr-wsd-decay-fraction"
    assert last.do == "keep one; None takes back what a file sets, as --lr-wsd-decay-tokens None"


@pytest.mark.parametrize("size", ["270m", "600m", "3b"])
def test_the_paper_s_files_have_its_steps(size):
    run = resolve(parse(["--config", str(REPLICATE / f"token_superposition_{size}.yaml"), "--dry-run"]), 8)
    patch, token = run.plan.stages
    assert (patch.steps, token.steps, patch.positions_per_step, token.positions_per_step) == (6000, 14000, 2**21, 2**21)
    assert patch.lr.warmup_tokens == 2000 * patch.tokens_per_step and patch.lr.wsd_decay_tokens == 2000 * token.tokens_per_step
    assert (patch.patch_size, token.lr_policy, token.optimizer) == (6, "continue", "keep")
