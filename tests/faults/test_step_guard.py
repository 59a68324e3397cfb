"""Which losses and gradient norms the step guard rejects."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from megatron_patch.config.options import SafetyOptions
from megatron_patch.errors import SickTrainingError
from megatron_patch.training.faults.step_guard import StepGuard

OPTIONS = SafetyOptions(spike_window=32)


def trained(options=OPTIONS, steps=32, loss=3.0, noise=0.02):
    guard, draw = StepGuard(options), random.Random(0)
    for _ in range(steps):
        value = loss + draw.gauss(0, noise)
        assert guard.check_loss(value) is None
        guard.record_taken(value, 1.0)
    return guard


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("on_spike", ["skip", "rewind", "stop", "ignore"])
def test_a_step_that_is_not_finite_is_always_rejected(value, on_spike):
    guard = StepGuard(dataclasses.replace(OPTIONS, on_spike=on_spike))
    assert guard.check_loss(value) and guard.check_grad_norm(value)


def test_a_spike_is_far_above_the_noise():
    guard = trained()
    assert guard.check_loss(3.1) is None and guard.check_loss(0.0) is None
    assert "the loss spikes: 4.0000" in guard.check_loss(4.0)
    assert trained(noise=0.3).check_loss(4.0) is None, "the threshold depends on the noise"
    assert trained(noise=0.0).check_loss(3.19) is None, "with a flat loss the threshold is 20 x 0.01 nats"
    assert StepGuard(OPTIONS).check_loss(1e9) is None, "the window is empty"
    assert trained(dataclasses.replace(OPTIONS, on_spike="ignore")).check_loss(1e9) is None


def test_a_switch_is_not_a_spike():
    guard = trained()
    guard.begin_stage()
    assert guard.check_loss(7.0) is None


def test_a_gradient_far_above_the_median_is_rejected():
    guard = trained(dataclasses.replace(OPTIONS, spike_grad_norm=10.0))
    assert guard.check_grad_norm(9.9) is None and "explodes" in guard.check_grad_norm(10.1)
    assert trained().check_grad_norm(1e9) is None


def test_too_many_rejected_steps_end_the_run():
    guard = StepGuard(dataclasses.replace(OPTIONS, max_sick_steps=3))
    guard.record_rejected("x")
    guard.record_rejected("x")
    guard.record_taken(1.0, 1.0)
    guard.record_rejected("x")
    guard.record_rejected("x")
    with pytest.raises(SickTrainingError, match="3 rejected steps in a row") as error:
        guard.record_rejected("x")
    assert error.value.exit_code == 5
    with pytest.raises(SickTrainingError):
        StepGuard(dataclasses.replace(OPTIONS, on_spike="stop")).record_rejected("x")


def test_a_resumed_guard_decides_like_the_saved_one():
    guard, again = trained(), StepGuard(OPTIONS)
    again.load_state(guard.state())
    for value in (3.05, 3.4, 4.0, math.nan):
        assert str(again.check_loss(value)) == str(guard.check_loss(value))
