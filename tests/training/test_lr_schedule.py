"""Learning rates against formulas written by hand, and torch's own cosine."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.config.options import ScheduleOptions, StageOptions
from megatron_patch.config.plan_builder import build_plan
from megatron_patch.stages import LrShape
from megatron_patch.training.lr_schedule import LrSchedule, Segment, build_lr_schedule, learning_rate

STYLES = ["constant", "linear", "cosine", "inverse-square-root", "WSD"]


def at(tokens, first=0, last=1000, **shape):
    return learning_rate(Segment(first, last, LrShape(**{"lr": 1.0, **shape})), tokens)


def test_formulas_by_hand():
    assert at(50, warmup_tokens=100) == 0.5
    assert at(100, warmup_tokens=100, style="linear") == 1.0
    assert at(550, warmup_tokens=100, style="linear", min_lr=0.2) == pytest.approx(0.6)
    assert at(550, warmup_tokens=100, style="cosine", min_lr=0.2) == pytest.approx(0.6)
    assert at(325, warmup_tokens=100, style="cosine") == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert at(400, warmup_tokens=100, style="inverse-square-root") == pytest.approx(0.5)
    assert at(900, style="constant") == 1.0
    assert at(600, style="cosine", decay_tokens=500, min_lr=0.1) == pytest.approx(0.1)
    assert at(899, style="WSD", wsd_decay_tokens=100) == 1.0
    assert at(950, style="WSD", wsd_decay_tokens=100, min_lr=0.2) == pytest.approx(0.6)
    assert at(950, style="WSD", wsd_decay_tokens=100, wsd_decay_style="minus-sqrt") == pytest.approx(1 - math.sqrt(0.5))
    assert at(950, style="WSD", wsd_decay_tokens=100, wsd_decay_style="cosine") == pytest.approx(0.5)
    assert at(1000, style="WSD", wsd_decay_tokens=100, wsd_decay_style="exponential", min_lr=0.1) == pytest.approx(0.1)


def test_cosine_equals_torch_s():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.05)
    for step in range(1, 41):
        optimizer.step()
        schedule.step()
        assert at(step, last=40, lr=0.3, min_lr=0.05, style="cosine") == pytest.approx(schedule.get_last_lr()[0])


def test_the_table_of_rates_in_the_documents_is_what_both_schedulers_give():
    transformers = pytest.importorskip("transformers")
    text = (Path(__file__).parents[2] / "docs" / "method.md").read_text().partition("| step | here | transformers |")[2]
    rows = [line.strip("|").split("|") for line in text.partition("\n\n")[0].splitlines() if re.match(r"\| \d", line)]
    assert [int(step) for step, _, _ in rows] == [1, 2, 3, 4, 5, 6, 9, 10]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 4, 10)
    theirs = []
    for _ in range(10):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    options = StageOptions(train_tokens=10 * 30, seq_length=10, global_batch_size=3)
    ours = build_lr_schedule(build_plan(options, ScheduleOptions(lr=1.0, lr_warmup_steps=4, lr_decay_style="linear"), 1))
    rates = [ours.at(30 * step) for step in range(1, 11)]
    assert rates[:-1] == pytest.approx(theirs[1:]) and (theirs[0], rates[-1]) == (0.0, 0.0)
    assert [(here.strip(), there.strip()) for _, here, there in rows] == [
        (f"{rates[int(step) - 1]:.3f}", f"{theirs[int(step) - 1]:.3f}") for step, _, _ in rows
    ]


@given(st.sampled_from(STYLES), st.integers(0, 400), st.integers(1, 500), st.floats(0.0, 1.0), st.integers(1, 1000))
def test_rates_stay_between_the_minimum_and_the_maximum_and_reach_the_minimum(style, warmup, decay, min_lr, tokens):
    shape = {"style": style, "warmup_tokens": warmup, "wsd_decay_tokens": decay, "min_lr": min_lr}
    rate = at(tokens, **shape)
    assert 0.0 < rate <= 1.0 or (rate == 0.0 == min_lr)
    if tokens >= warmup:
        assert rate >= min_lr - 1e-12
    if style in ("linear", "cosine", "WSD"):
        assert at(1000, **shape) == pytest.approx(min_lr, abs=1e-12)
    if warmup <= tokens < 1000 and style != "constant":
        assert at(tokens + 1, **shape) <= rate + 1e-12


def plan(*stages):
    import json

    options = StageOptions(stages=json.dumps(stages), seq_length=10, global_batch_size=1, micro_batch_size=1)
    return build_plan(options, ScheduleOptions(lr=1.0, lr_decay_style="linear"), 1)


def test_restart_begins_a_schedule_and_continue_keeps_it():
    restart = build_lr_schedule(plan({"patch_size": 2, "steps": 10, "batch": "constant-positions"}, {"steps": 20}))
    assert restart.at(100) == pytest.approx(0.5) and restart.at(200) == pytest.approx(0.0)
    assert restart.at(210) == pytest.approx(0.95)
    continued = build_lr_schedule(
        plan({"patch_size": 2, "steps": 10, "batch": "constant-positions"}, {"steps": 20, "lr_policy": "continue"})
    )
    assert [continued.at(tokens) for tokens in (100, 200, 210, 400)] == pytest.approx([0.75, 0.5, 0.475, 0.0])


def test_rewarm_multiplies_the_running_schedule_by_a_ramp():
    stages = ({"patch_size": 2, "steps": 10, "batch": "constant-positions"}, {"steps": 20, "lr_policy": "rewarm", "lr_warmup_tokens": 100})
    schedule = build_lr_schedule(plan(*stages))
    assert schedule.at(200) == pytest.approx(0.5)
    assert schedule.at(250) == pytest.approx(0.375 * 0.5)
    assert schedule.at(300) == pytest.approx(0.25)


def test_after_the_end_the_last_rate_stays():
    assert LrSchedule((Segment(0, 100, LrShape(1.0, 0.3, style="linear")),)).at(500) == pytest.approx(0.3)
