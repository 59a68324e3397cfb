"""The step gate: it sees loss and norm before any weight changes, its decision holds for all weights, and it leaves no hook."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_patch.engine.data_parallel import DataParallelEngine


class Gate:
    """Notes what it is called with and rejects by loss, by norm, or not at all."""

    def __init__(self, calls, reject=None):
        self.calls, self.reject = calls, reject

    def check_loss(self, loss):
        self.calls.append(("loss", loss))
        return "bad loss" if self.reject == "loss" else None

    def check_grad_norm(self, norm):
        self.calls.append(("norm", norm))
        return "bad norm" if self.reject == "norm" else None


@pytest.fixture
def parts():
    """An engine without DeepSpeed around an optimizer of one weight, the weight, and a list of what happens."""
    weight, calls = torch.nn.Parameter(torch.zeros(1)), []
    engine = object.__new__(DataParallelEngine)
    engine.config = SimpleNamespace(zero_level=1, precision="fp32")
    engine._optimizer = torch.optim.SGD([weight], lr=1.0)
    engine._engine = SimpleNamespace(skipped_steps=0, optimizer=SimpleNamespace(_global_grad_norm=torch.tensor(3.0)))
    weight.grad = torch.ones(1)
    return engine, weight, calls


def loss_of(calls):
    def global_loss():
        calls.append("global loss")
        return 2.0

    return global_loss


@pytest.mark.parametrize("reject", [None, "loss", "norm"])
def test_the_gate_decides_once_for_all_groups_of_weights(parts, reject):
    engine, weight, calls = parts
    with engine._gated(Gate(calls, reject), loss_of(calls)) as outcome:
        engine._optimizer.step()
        engine._optimizer.step()
    assert calls == ["global loss", ("loss", 2.0), *([("norm", 3.0)] if reject != "loss" else [])]
    assert weight.item() == (0.0 if reject else -2.0)
    assert (outcome.loss, outcome.grad_norm, outcome.rejection) == (2.0, 3.0, f"bad {reject}" if reject else None)
    assert "step" not in vars(engine._optimizer)


def test_without_a_gate_every_step_is_taken(parts):
    engine, weight, calls = parts
    with engine._gated(None, loss_of(calls)) as outcome:
        engine._optimizer.step()
    assert weight.item() == -1.0 and outcome.loss == 2.0 and outcome.rejection is None


@pytest.mark.parametrize(("precision", "rejection"), [("fp32", "the gradient norm is inf"), ("fp16", None)])
def test_an_overflow_that_deepspeed_skips_is_reported_with_its_loss(parts, precision, rejection):
    engine, weight, calls = parts
    engine.config.precision = precision
    with engine._gated(Gate(calls), loss_of(calls)) as outcome:
        engine._engine.skipped_steps, engine._engine.optimizer._global_grad_norm = 1, float("inf")
    assert calls == ["global loss", ("loss", 2.0)] and weight.item() == 0.0
    assert outcome.overflow and outcome.rejection == rejection


def test_an_error_leaves_no_hook(parts):
    engine, _, calls = parts
    with pytest.raises(RuntimeError, match="out of memory"), engine._gated(Gate(calls), loss_of(calls)):
        raise RuntimeError("out of memory")
    assert "step" not in vars(engine._optimizer) and calls == []
