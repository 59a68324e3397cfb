"""The live view: shares, remaining times, the trend of losses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from rich.console import Console as RichConsole

from megatron_patch.training.callbacks.base import RunStart, StepRecord
from megatron_patch.training.callbacks.progress import LiveState, LossTrend, bar, live_view, outlook
from tests.training.records import EVALUATION, EXPERTS, STEP

# 4,000 tokens, the first 2,000 in patches of 4: the cost of 2,500 tokens at token level, of 1e9 FLOPs each.
START = RunStart(0, 100, 4000, ((2000, "token"),), 0, "cpu", 2, None, 1e9, 0.625)


def at(tokens: int, cost: float, tflops: float, rate: float) -> StepRecord:
    return replace(STEP, tokens=tokens, cost_tokens=cost, tflops=tflops, tokens_per_second=rate)


def test_the_time_to_the_end_follows_from_flops_and_to_the_switch_from_tokens():
    # Two ranks of 5e-3 TFLOP/s compute 10 token-level tokens a second, which are 40 tokens a second in patches of 4.
    ahead = outlook(START, at(1000, 250.0, 5e-3, 40.0))
    assert ahead.tokens == 0.25 and ahead.compute == 0.1
    assert ahead.switch_seconds == 25.0 and ahead.switch_to == "token"
    assert ahead.end_seconds == pytest.approx((2500 - 250) / 10)
    assert "switch in 25 s, end in 3 min 45 s" in ahead.to_go()
    last = outlook(START, at(4000, 2500.0, 5e-3, 10.0))
    assert last.switch_seconds is None and last.end_seconds == 0.0 and last.compute == 1.0
    assert outlook(START, at(10, 2.5, 0.0, 0.0)).end_seconds == math.inf


@pytest.mark.parametrize(("slope", "arrow"), [(-0.05, "↘"), (0.05, "↗"), (0.0, "→")])
def test_the_arrow_needs_more_than_noise(slope, arrow):
    trend = LossTrend()
    for step in range(64):
        trend.add(0, 5.0 + slope * step + 0.1 * (-1) ** step)
    assert trend.arrow() == arrow and len(trend.curve()) <= 24
    trend.add(1, 4.0)
    trend.add(1, math.nan)
    assert trend.curve() == "" and trend.arrow() == "", "a switch empties the trend"


def test_the_bar_marks_its_switches():
    text = bar(0.5, [0.25], width=8).plain
    assert text == "━━┿━────"


def test_the_live_view_shows_progress_loss_speed_and_remaining_time():
    console = RichConsole(width=110, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(live_view(LiveState(START, at(1000, 250.0, 5e-3, 40.0), LossTrend(), evaluation=EVALUATION), 110))
    text = captured.get()
    for words in (
        "patches of 4",
        "1k of 4k tokens",
        "5.5000",
        "held-out token loss 6.5000",
        "40 tokens/s",
        "1.5 GiB",
        "stage token in 25 s",
        "10.0% of FLOPs spent",
    ):
        assert words in text
    assert max(len(line) for line in text.splitlines()) <= 110


def test_the_remaining_times_include_the_pauses():
    ahead = outlook(START, at(1000, 250.0, 5e-3, 40.0), (10.0, 30.0))
    assert ahead.switch_seconds == 35.0 and ahead.end_seconds == pytest.approx(225 + 30)
    assert outlook(START, at(4000, 2500.0, 5e-3, 10.0), (0.0, 7.0)).end_seconds == 7.0


def test_the_live_view_shows_the_worst_block_of_a_model_with_experts():
    console = RichConsole(width=80, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(live_view(LiveState(START, replace(STEP, **EXPERTS), LossTrend()), 80))
    lines = captured.get().splitlines()
    assert lines[5].rstrip() == "experts  largest load 3.8 times the mean (block 12) · 5 dead in all blocks"
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_live_view_fits_the_terminal(width):
    console = RichConsole(width=width, force_terminal=True, color_system=None)
    start = replace(START, total_steps=1_000_000)
    record = replace(at(1000, 250.0, 5e-3, 40.0), step=999_999, stage="a[/b]\n\x1b[2J")
    with console.capture() as captured:
        console.print(live_view(LiveState(start, record, LossTrend(), evaluation=EVALUATION, sample="[/x] " + "text " * 99), width))
    lines = captured.get().splitlines()
    assert len(lines) == 7 and max(map(len, lines)) <= width
    assert "a[/b]\\n\\x1b[2J" in lines[2] and "[/x] text" in lines[-1]
    assert width < 80 or ("step 999,999 of 1,000,000" in lines[1] and "stage token in 25 s · end in 3 min 45 s" in lines[5])
