"""The alarm about collapsed experts: from means over windows of steps, once for each block and stage, never by chance."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from dataclasses import replace

import pytest

from megatron_patch.model.expert_shape import ExpertShape
from megatron_patch.stages import ExpertBalance, Stage
from megatron_patch.training.expert_load import WINDOW, ExpertLoadMonitor
from tests.training.records import STEP

BALANCE = ExpertBalance(aux_loss_coeff=0.02)
PATCH = Stage("patch", 4, 64, 2, 4, 1000, expert_balance=BALANCE)
TOKEN = Stage("token", 1, 256, 2, 4, 1000, expert_balance=BALANCE)


def found(monitor, steps, first=1, stage=0, blocks=(1, 12), **fields):
    """(step, event) of each collapse in steps of which each has the same fields, or those that a function of the step returns."""
    events = []
    for step in range(first, first + steps):
        values = {name: value(step) if callable(value) else value for name, value in fields.items()}
        values = {"expert_load": (1.2, 1.2), "dead_experts": (0, 0), "router_entropy": (2.0, 2.0)} | values
        record = replace(STEP, step=step, stage_index=stage, stage=("patch", "token")[stage], expert_blocks=blocks, **values)
        events += [(step, collapse) for collapse in monitor.add(record)]
    return events


def monitor(count=8, top_k=2, stages=(PATCH, TOKEN), **more):
    return ExpertLoadMonitor(ExpertShape(count, top_k, 16, **more), stages)


def test_a_collapse_is_reported_once_for_each_block_and_again_after_a_switch():
    watch = monitor()
    ((step, event),) = found(watch, 1000, expert_load=(1.5, 3.9))
    assert step == 2 * WINDOW, "the first window of a run does not count"
    assert event.message == (
        "the experts of block 12 have collapsed: on average over the last 100 steps, the most used expert gets 3.9 times the mean load "
        "(possible: 4.0), and no position uses 0.0 of 8 experts; raise --moe-aux-loss-coeff (now 0.02), or moe_aux_loss_coeff of 'patch' "
        "in stages:, or start a new run with --moe-router-enable-expert-bias"
    )
    assert event.details == {"block": 12, "expert_load": 3.9, "dead_experts": 0.0, "experts": 8, "stage": "patch"}
    json.dumps(event.details, allow_nan=False)
    ((step, other),) = found(watch, 200, first=1001, expert_load=(3.9, 3.9))
    assert other.details["block"] == 1 and step == 1100
    again = found(watch, 200, first=1201, stage=1, expert_load=(3.9, 1.0))
    assert [(step, event.details["block"], event.details["stage"]) for step, event in again] == [(1300, 1, "token")]


def test_a_switch_forgets_the_window():
    watch = monitor()
    assert found(watch, 199, expert_load=(4.0, 4.0)) == []
    assert found(watch, 99, first=200, stage=1, expert_load=(4.0, 4.0)) == []
    assert len(found(watch, 1, first=299, stage=1, expert_load=(4.0, 4.0))) == 2


@pytest.mark.parametrize(("load", "dead", "collapsed"), [(3.69, 3.99, False), (3.71, 0, True), (1.5, 4, True), (1.5, 6, True)])
def test_either_the_largest_load_or_dead_experts_show_a_collapse(load, dead, collapsed):
    """Of 8 experts, 2 for a position: the load is at most 4, and 90 % of the way from 1 to it is 3.7."""
    dead_in = [math.floor(dead), math.ceil(dead)] if dead != 3.99 else [3, 4]
    draw = random.Random(1)
    events = found(monitor(), 200, blocks=(0,), expert_load=(load,), dead_experts=lambda _: (draw.choice(dead_in),), router_entropy=(1.0,))
    assert [event.details["block"] for _, event in events] == [0] * collapsed


def test_single_bad_steps_and_single_good_ones_change_nothing():
    bad, good = (lambda often: lambda step: (4.0, 1.0) if step % often == 0 else (1.1, 1.0)), lambda step: (3.95 - step % 10 / 30, 1.0)
    assert found(monitor(), 1000, expert_load=bad(2)) == []
    assert len(found(monitor(), 1000, expert_load=good)) == 1, "loads below the threshold in some steps are no recovery"


def at_random(draw, positions, count, top_k):
    """(largest load over the mean, dead experts) of a step in which each position chooses `top_k` of `count` experts at random."""
    chosen = Counter(expert for _ in range(positions) for expert in draw.sample(range(count), top_k))
    return max(chosen.values()) * count / (positions * top_k), count - len(chosen)


@pytest.mark.parametrize(("count", "top_k"), [(2, 1), (8, 2), (8, 6), (16, 1), (64, 6), (128, 8), (512, 10)])
def test_routers_that_choose_at_random_never_raise_the_alarm(count, top_k):
    """Steps of a few positions: the fewest for which a stage is watched, and fewer."""
    draw = random.Random(count)
    for positions in (1, 2, math.ceil(4 * count / min(top_k, count - top_k))):
        stage = Stage("patch", 4, positions, 1, 1, 1000)

        pairs = itertools.cycle([at_random(draw, positions, count, top_k) for _ in range(50)])
        watch, events = monitor(count, top_k, (stage,)), []
        for step, (load, dead) in zip(range(1, 301), pairs, strict=False):
            events += found(watch, 1, step, blocks=(0,), expert_load=(load,), dead_experts=(dead,), router_entropy=(1.0,))
        assert events == []


def test_experts_that_all_positions_use_cannot_collapse():
    assert found(monitor(4, 4), 500, expert_load=(1.0, 1.0)) == []


def test_numbers_that_are_not_finite_do_not_raise_the_alarm():
    assert found(monitor(), 500, expert_load=(math.nan, math.nan), router_entropy=(math.nan, math.nan)) == []
    events = found(monitor(), 500, expert_load=lambda step: (math.nan if step == 150 else 4.0, 1.0))
    assert [step for step, _ in events] == [300], "only the window with such a step is lost"


@pytest.mark.parametrize(
    ("balance", "bias", "words"),
    [
        (ExpertBalance(0.02), False, "raise --moe-aux-loss-coeff (now 0.02), or start a new run with --moe-router-enable-expert-bias"),
        (ExpertBalance(0.02, 0.0, 1e-3), True, "raise --moe-aux-loss-coeff (now 0.02), or raise --moe-router-bias-update-rate (now 0.001)"),
        (ExpertBalance(0.02, 0.0, 0.5), True, "lower --moe-router-bias-update-rate (now 0.5)"),
        (
            ExpertBalance(),
            False,
            "turn on the auxiliary loss (--moe-router-load-balancing-type global_aux_loss, --moe-aux-loss-coeff 0.01)",
        ),
    ],
)
def test_the_advice_fits_the_run(balance, bias, words):
    """A single stage needs no word about stages:."""
    ((_, event), _) = found(monitor(stages=(replace(TOKEN, expert_balance=balance),), bias=bias), 200, expert_load=(4.0, 4.0))
    assert words in event.message and "stages:" not in event.message


def test_a_model_without_experts_is_not_watched():
    watch = ExpertLoadMonitor(None, (PATCH,))
    assert all(watch.add(replace(STEP, step=step)) == [] for step in range(1, 300))
