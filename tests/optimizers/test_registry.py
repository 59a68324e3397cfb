"""The registry of optimizers: which names are accepted, which state is accepted, and that registered optimizers train and resume."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from megatron_patch.config.options import ScheduleOptions
from megatron_patch.errors import ConfigError
from megatron_patch.optimizers.registry import OPTIMIZERS
from megatron_patch.optimizers.state import ensure_state, make_optimizer, set_step_count, step_count
from megatron_patch.training.pretrain import main
from tests.distributed.runs import MODEL, make_corpus, printed, start_program, train

PLAN = "--seq-length 16 --micro-batch-size 2 --global-batch-size 4 --patch-size 4 --patch-fraction 0.5 --train-tokens 1024 --lr 3e-3"


@pytest.fixture
def registered(monkeypatch):
    def register(name, factory):
        monkeypatch.setitem(OPTIMIZERS, name, factory)

    return register


@pytest.mark.parametrize(("name", "advice"), [("adam", "did you mean adamw?"), ("lion", "add yours to .*OPTIMIZERS")])
def test_an_unknown_name_is_refused_with_the_registered_ones(name, advice):
    with pytest.raises(ConfigError, match=rf"(?s)--optimizer {name} is not .*Allowed: adamw\n.*{advice}"):
        make_optimizer([], dataclasses.replace(ScheduleOptions(), optimizer=name))


def test_a_dry_run_checks_the_name(capsys, registered):
    words = [*MODEL, *PLAN.split(), "--dry-run", "--optimizer"]
    assert main([*words, "adamv"]) == 2
    assert "did you mean adamw?" in " ".join(capsys.readouterr().err.split())
    registered("adamv", torch.optim.Adam)
    assert main([*words, "adamv"]) == 0


def test_the_name_is_checked_without_torch():
    code = "import sys, megatron_patch.engine.deepspeed_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.SGD, torch.optim.Adagrad])
def test_state_is_accepted_only_as_two_moments_and_a_number_of_steps(make):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = make([weight], lr=0.1)
    optimizer.state.clear()
    if make in (torch.optim.Adam, torch.optim.AdamW):
        assert set(ensure_state(optimizer, weight)) == {"step", "exp_avg", "exp_avg_sq"} and len(optimizer.state) == 1
    else:
        with pytest.raises(ConfigError, match=rf"(?s)the optimizer {make.__name__} keeps this state.*Allowed: exp_avg and exp_avg_sq"):
            ensure_state(optimizer, weight)


def test_state_made_here_is_the_state_that_the_optimizer_makes():
    made, own = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizers = torch.optim.Adam([made], lr=0.1), torch.optim.Adam([own], lr=0.1)
    ensure_state(optimizers[0], made)
    assert torch.equal(made, torch.ones(3)) and step_count(optimizers[0]) == 0
    for weight, optimizer in zip((made, own), optimizers, strict=True):
        weight.grad = torch.tensor([1.0, -2.0, 0.5])
        optimizer.step()
        optimizer.step()
    assert torch.equal(made, own) and step_count(optimizers[0]) == step_count(optimizers[1]) == 2


class GroupCounting(torch.optim.Optimizer):
    """Adam without decay that counts steps in its groups, as the fused one of Apex does."""

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(parameter))
                state["exp_avg"].lerp_(parameter.grad, 0.1)
                state["exp_avg_sq"].lerp_(parameter.grad.square(), 0.05)
                mean, square = state["exp_avg"] / (1 - 0.9 ** group["step"]), state["exp_avg_sq"] / (1 - 0.95 ** group["step"])
                parameter.sub_(group["lr"] * mean / (square.sqrt() + 1e-8))


def test_steps_counted_in_groups_are_read_and_set():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = GroupCounting([weight], 0.1)
    assert set(ensure_state(optimizer, weight)) == {"exp_avg", "exp_avg_sq"} and step_count(optimizer) == 0
    weight.grad = torch.ones(3)
    optimizer.step()
    assert step_count(optimizer) == 1
    set_step_count(optimizer, 7)
    assert step_count(optimizer) == 7 and "step" not in optimizer.state[weight]


def register_and_train(argv):
    """A user's own script: it registers an optimizer and calls the program's main function."""
    OPTIMIZERS["counting"] = lambda groups, options, offloaded: GroupCounting(groups, options.lr)
    OPTIMIZERS["sgd"] = lambda groups, options, offloaded: torch.optim.SGD(groups, lr=options.lr, momentum=0.9)
    return start_program(argv)


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_registered_optimizer_trains_and_resumes(tmp_path, zero):
    corpus = make_corpus(tmp_path / "corpus")
    options = f"--optimizer counting --zero-stage {zero} --save-interval 6 --data-path"
    whole = train(tmp_path / "whole", 2, PLAN, options, corpus, main=register_and_train)
    parts = tmp_path / "parts"
    train(parts, 2, PLAN, "--exit-interval 6", options, corpus, main=register_and_train)
    resumed = train(parts, 2, PLAN, options, corpus, main=register_and_train)
    assert whole.losses[-1] < whole.losses[0] and resumed.losses == whole.losses


def test_training_refuses_an_optimizer_with_other_state(tmp_path):
    corpus = make_corpus(tmp_path / "corpus")
    train(tmp_path / "run", 1, PLAN, "--optimizer sgd --data-path", corpus, expect=2, main=register_and_train)
    assert "the optimizer SGD keeps this state for each parameter: momentum_buffer" in " ".join(printed(tmp_path / "run").split())
