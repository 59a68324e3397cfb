"""Checkpoint intervals and the simulation against closed forms."""

from __future__ import annotations

import dataclasses
import math

import pytest

from megatron_patch.errors import ConfigError
from megatron_patch.planning.reliability import (
    LLAMA3_DEVICE_HOURS,
    Interruptions,
    StageWork,
    daly_interval,
    expected_goodput,
    simulate,
    young_interval,
)


def test_the_published_rate_is_one_failure_in_three_hours():
    assert Interruptions().mtbf_seconds(16_384) / 3600 == pytest.approx(54 * 24 / 419) == pytest.approx(3.093, abs=1e-3)
    assert pytest.approx(50_677, abs=1) == LLAMA3_DEVICE_HOURS


@pytest.mark.parametrize("save", [5.0, 60.0, 600.0])
@pytest.mark.parametrize("mtbf", [3600.0, 40_000.0])
def test_dalys_interval_is_where_the_expected_goodput_is_highest(save, mtbf):
    best = max(range(10, 40_000, 10), key=lambda interval: expected_goodput(interval, save, 300.0, mtbf))
    assert daly_interval(save, mtbf) == pytest.approx(best, rel=0.01, abs=10)
    assert young_interval(save, mtbf) == math.sqrt(2 * save * mtbf)
    assert daly_interval(3 * mtbf, mtbf) == mtbf


@pytest.mark.parametrize("devices", [256, 4096, 32_768])
def test_the_simulation_agrees_with_the_closed_form(devices):
    rates = Interruptions(save_seconds=60.0, restart_seconds=600.0)
    mtbf = rates.mtbf_seconds(devices)
    interval = daly_interval(60.0, mtbf)
    # Long enough for thousands of failures; whole checkpoint intervals.
    steps = round(4000 * mtbf / interval)
    run = simulate([StageWork("token", steps, interval)], devices, rates, interval, seed=1)
    assert run.failures > 3000
    assert run.goodput == pytest.approx(expected_goodput(interval, 60.0, 600.0, mtbf), rel=0.02)


def test_time_adds_up_and_seeds_repeat():
    stages = [StageWork("patch", 5000, 20.0), StageWork("token", 7000, 21.0)]
    rates = Interruptions(preemptions_per_day=2.0, save_seconds=45.0)
    runs = [simulate(stages, 4096, rates, 3000.0, seed) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
    for run in runs:
        assert run.useful_seconds == pytest.approx(5000 * 20 + 7000 * 21)
        parts = run.useful_seconds + run.lost_seconds + run.save_seconds + run.down_seconds
        assert parts == pytest.approx(run.wall_seconds) and parts == pytest.approx(sum(run.stage_seconds.values()))
        assert run.preemptions > 2 and run.failures > 2 and sum(event.kind == "switch" for event in run.events) == 1
        assert [event.at for event in run.events] == sorted(event.at for event in run.events)


def test_without_interruptions_only_checkpoints_cost():
    never = Interruptions(device_hours=1e12, save_seconds=10.0)
    run = simulate([StageWork("patch", 10, 7.0), StageWork("token", 25, 10.0)], 1, never, 100.0)
    assert run.wall_seconds == 70 + 250 + 4 * 10 and run.failures == 0


def test_invalid_simulations_are_refused():
    with pytest.raises(ConfigError, match="interval above zero"):
        simulate([StageWork("token", 1, 1.0)], 1, Interruptions(), 0.0)
    with pytest.raises(ConfigError, match="--save-seconds 0\n"):
        dataclasses.replace(Interruptions(), save_seconds=0)
    with pytest.raises(ConfigError, match="--preemptions-per-day inf\n"):
        Interruptions(preemptions_per_day=math.inf)


@pytest.mark.parametrize("rates", [{"device_hours": 1.0}, {"device_hours": 1e-3}, {"preemptions_per_day": 1e7}])
def test_a_run_without_progress_is_reported_and_not_simulated(rates):
    interruptions = Interruptions(**rates)
    interval = daly_interval(interruptions.save_seconds, interruptions.mtbf_seconds(4096))
    with pytest.raises(ConfigError, match="of the time for training"):
        simulate([StageWork("token", 1000, 1.0)], 4096, interruptions, interval)
    assert expected_goodput(interval, 60.0, 600.0, 1e-3) == 0.0


def test_a_failure_during_a_long_save_costs_a_full_restart():
    """Saves take an hour and restarts a minute: a failure during a preemption's save must not make time run backwards."""
    rates = Interruptions(device_hours=20_000, preemptions_per_day=30.0, save_seconds=3600.0, restart_seconds=60.0, preemption_seconds=60.0)
    for seed in range(20):
        run = simulate([StageWork("token", 2000, 60.0)], 4096, rates, 12_000.0, seed)
        assert run.failures and run.preemptions and run.down_seconds >= 60.0 * run.preemptions
        assert run.useful_seconds + run.lost_seconds + run.save_seconds + run.down_seconds == pytest.approx(run.wall_seconds)
