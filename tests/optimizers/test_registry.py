"""The registry of optimizers: which names are accepted, which state is accepted, and that registered optimizers train and resume."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from megatron_patch.checkpoint.safetensors_io import read_header
from megatron_patch.config.options import ScheduleOptions
from megatron_patch.engine.deepspeed_engine import _checked_optimizer
from megatron_patch.engine.hidden_matrices import require_attachable
from megatron_patch.errors import ConfigError
from megatron_patch.optimizers.registry import OPTIMIZERS, OptimizerType
from megatron_patch.optimizers.state import ensure_state, make_optimizer, require_elementwise, set_step_count, step_count
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
    with pytest.raises(ConfigError, match=rf"(?s)--optimizer {name} is not .*Allowed: adamw, muon\n.*{advice}"):
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


def momentum(weights, lr):
    return torch.optim.SGD(weights, lr=lr, momentum=0.9)


def damped(weights, lr):
    return torch.optim.SGD(weights, lr=lr, momentum=0.9, dampening=0.5)


def initial(weights, lr):
    return torch.optim.Adagrad(weights, lr=lr, initial_accumulator_value=0.1)


def amsgrad(weights, lr):
    return torch.optim.AdamW(weights, lr=lr, amsgrad=True)


@pytest.mark.parametrize("shape", [(12,), (4, 3)])
@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (torch.optim.Adam, {"exp_avg", "exp_avg_sq", "step"}),
        (torch.optim.AdamW, {"exp_avg", "exp_avg_sq", "step"}),
        (amsgrad, {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"}),
        (momentum, {"momentum_buffer"}),
        (torch.optim.RMSprop, {"square_avg", "step"}),
    ],
)
def test_any_state_of_the_parameters_shape_that_starts_from_zeros_is_accepted(make, kinds, shape):
    weight = torch.nn.Parameter(torch.ones(shape))
    optimizer = make([weight], lr=0.1)
    state = ensure_state(optimizer, weight)
    assert set(state) == kinds and len(optimizer.state) == 1 and torch.equal(weight, torch.ones(shape))
    assert all(state[kind].shape == shape and not state[kind].any() for kind in kinds - {"step"}) and not state.get("step", 0)


@pytest.mark.parametrize(
    ("make", "shape", "reason"),
    [
        (torch.optim.NAdam, (3,), "keeps this state for each parameter: exp_avg, exp_avg_sq, mu_product, step"),
        (torch.optim.Adafactor, (4, 3), "keeps this state for each parameter: col_var, row_var, step"),
        (torch.optim.SGD, (3,), "keeps this state for each parameter: none"),
        (damped, (3,), "does not start from zeros: its state is momentum_buffer"),
        (initial, (3,), "does not start from zeros: its state is step, sum"),
        (torch.optim.LBFGS, (3,), "fails in a step on a few elements: TypeError"),
    ],
)
def test_other_state_is_refused_with_the_reason(make, shape, reason):
    weight = torch.nn.Parameter(torch.ones(shape))
    optimizer = make([weight], lr=0.1)
    optimizer.state.clear()
    with pytest.raises(ConfigError, match=f"(?s)the optimizer {type(optimizer).__name__} {reason}.*Allowed: "):
        ensure_state(optimizer, weight)
    assert torch.equal(weight, torch.ones(shape)) and not any(optimizer.state.values())


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


class Lion(torch.optim.Optimizer):
    """Lion, whose state is one tensor for each parameter."""

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                average = self.state[weight].setdefault("exp_avg", torch.zeros_like(weight))
                update = average.lerp(weight.grad, 0.1).sign_()
                average.lerp_(weight.grad, 0.01)
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])


def register_and_train(argv):
    """A user's own script: it registers optimizers and calls the program's main function."""
    OPTIMIZERS["counting"] = lambda groups, options, offloaded: GroupCounting(groups, options.lr)
    OPTIMIZERS["momentum"] = lambda groups, options, offloaded: momentum(groups, options.lr)
    OPTIMIZERS["lion"] = OptimizerType(lambda groups, options, offloaded: Lion(groups, options.lr), hidden_states=1, other_states=1)
    OPTIMIZERS["nadam"] = lambda groups, options, offloaded: torch.optim.NAdam(groups, lr=options.lr)
    OPTIMIZERS["adafactor"] = lambda groups, options, offloaded: torch.optim.Adafactor(groups, lr=options.lr)
    OPTIMIZERS["adagrad"] = lambda groups, options, offloaded: torch.optim.Adagrad(groups, lr=options.lr)
    return start_program(argv)


@pytest.mark.parametrize(
    ("name", "zero", "kinds"),
    [
        ("counting", 0, {"exp_avg", "exp_avg_sq"}),
        ("momentum", 1, {"momentum_buffer"}),
        ("lion", 3, {"exp_avg"}),
    ],
)
def test_a_registered_optimizer_trains_and_resumes(tmp_path, name, zero, kinds):
    corpus = make_corpus(tmp_path / "corpus")
    options = f"--optimizer {name} --zero-stage {zero} --save-interval 6 --data-path"
    whole = train(tmp_path / "whole", 2, PLAN, options, corpus, main=register_and_train)
    parts = tmp_path / "parts"
    train(parts, 2, PLAN, "--exit-interval 6", options, corpus, main=register_and_train)
    resumed = train(parts, 2, PLAN, options, corpus, main=register_and_train)
    assert whole.losses[-1] < whole.losses[0] and resumed.losses == whole.losses
    stored = {key.partition("/")[0] for file in parts.glob("step-*/state-*.safetensors") for key in read_header(file)}
    assert stored == {"weight", *kinds}


@pytest.mark.parametrize(
    ("name", "zero", "reason"),
    [
        ("nadam", 1, "the optimizer NAdam keeps this state for each parameter: exp_avg, exp_avg_sq, mu_product, step"),
        ("adagrad", 1, "the optimizer adagrad is torch's Adagrad, which DeepSpeed replaces by its own at ZeRO 1 to 3"),
        ("adafactor", 0, "the optimizer Adafactor keeps this state for each parameter: col_var, row_var, step"),
        ("adafactor", 1, "the optimizer Adafactor keeps this state for each parameter: col_var, row_var, step"),
    ],
)
def test_training_refuses_an_optimizer_with_other_state(tmp_path, name, zero, reason):
    corpus = make_corpus(tmp_path / "corpus")
    train(tmp_path / "run", 1, PLAN, f"--optimizer {name} --zero-stage {zero} --data-path", corpus, expect=2, main=register_and_train)
    assert reason in " ".join(printed(tmp_path / "run").split())


def test_an_optimizer_that_fails_or_forgets_its_groups_is_refused(registered):
    groups = [{"params": [torch.ones(4, 3, requires_grad=True)], "weight_decay": 0.1, "lr_scale": 0.5}]
    groups.append({"params": [torch.ones(3, requires_grad=True)], "weight_decay": 0.0})
    options = dataclasses.replace(ScheduleOptions(), optimizer="own")
    for make, message in (
        (
            lambda groups, options, offloaded: torch.optim.Muon(groups),
            "the optimizer own cannot be made of the parameter groups: ValueError",
        ),
        (
            lambda groups, options, offloaded: torch.optim.SGD([p for group in groups for p in group["params"]]),
            "has dropped the key 'lr_scale'",
        ),
    ):
        registered("own", make)
        with pytest.raises(ConfigError, match=message):
            make_optimizer(groups, options)
    registered("own", lambda groups, options, offloaded: torch.optim.LBFGS([p for group in groups for p in group["params"]]))
    with pytest.raises(ConfigError, match="LBFGS fails in a step on a few elements: TypeError"):
        require_elementwise(options, offloaded=False, device=torch.device("cpu"))
    registered("own", lambda groups, options, offloaded: torch.optim.SGD(groups, lr=options.lr, momentum=0.9))
    assert [group.get("lr_scale") for group in make_optimizer(groups, options).param_groups] == [0.5, None]


def test_only_deepspeeds_warning_of_an_untested_optimizer_is_hidden(caplog):
    from deepspeed.utils import logger

    logger.addHandler(caplog.handler)
    try:
        with _checked_optimizer():
            logger.warning("You are using ZeRO with an untested optimizer")
            logger.warning("another")
        logger.warning("an untested optimizer, later")
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records] == ["another", "an untested optimizer, later"]


def test_full_matrices_are_for_the_optimizer_that_collects_them(registered):
    registered("own", OptimizerType(lambda groups, options, offloaded: torch.optim.SGD(groups, lr=0.1), full_matrices=True))
    options = dataclasses.replace(ScheduleOptions(), optimizer="own")
    optimizer = make_optimizer([{"params": [torch.ones(4, 3, requires_grad=True)], "weight_decay": 0.1}], options)
    with pytest.raises(ConfigError, match="own is registered with full_matrices and is made as SGD"):
        require_attachable(optimizer, options)
