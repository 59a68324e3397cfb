"""Makes an optimizer and works with its state: the tensors that it keeps for each parameter, and its number of steps.

In: parameter groups and the schedule's options. Out: an optimizer, and its state by **kind**: the names of the tensors of a parameter's
shape that it keeps, such as `exp_avg` and `exp_avg_sq` of AdamW. Which kinds there are is found out from the optimizer, parameter by
parameter. Checkpoints, NVMe offload and the switch treat all kinds alike; they need an optimizer whose state starts from zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from megatron_patch.config.options import ScheduleOptions
from megatron_patch.errors import ConfigError
from megatron_patch.optimizers.groups import LR_SCALE
from megatron_patch.optimizers.registry import optimizer_type
from megatron_patch.utils.units import plural

_STEP = "step"
_NOT_STATE = (_STEP, "weight")


@runtime_checkable
class MakesState(Protocol):
    """An optimizer that makes the state of a parameter itself, because a step on a probe would not show it."""

    def new_state(self, tensor: torch.Tensor) -> dict[str, Any]:
        """Returns the state of a tensor before the first step."""
        ...


def make_optimizer(groups: Sequence[dict[str, Any]], options: ScheduleOptions, offloaded: bool = False) -> torch.optim.Optimizer:
    """Returns the optimizer that `--optimizer` names.

    Args:
        groups: parameter groups, each with its own `weight_decay`.
        options: the optimizer's name and settings.
        offloaded: whether the optimizer steps in host memory, where the kernels of Apex cannot run.

    Raises:
        ConfigError: no optimizer of that name is registered; what is registered fails, makes no optimizer or one of other parameters, or
            drops the learning rate of a group.
    """
    given = [parameter for group in groups for parameter in group["params"]]
    scales = {id(parameter): group.get(LR_SCALE, 1.0) for group in groups for parameter in group["params"]}
    kind = optimizer_type(options.optimizer)
    try:
        optimizer = kind.make(groups, options, offloaded)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the optimizer {options.optimizer} cannot be made of the parameter groups: {type(error).__name__}: {error}",
            "an optimizer of parameters of any shape",
            "choose another --optimizer, or correct the one that you registered",
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"the optimizer {options.optimizer} is made as {type(optimizer).__name__}",
            "a torch.optim.Optimizer",
            "return the optimizer of the parameter groups",
        )
    steps = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    known = {id(parameter) for parameter in given}
    if steps != known:
        # Parameters that the optimizer lacks would keep their initial values, without an error.
        wrong = [f"lacks {plural(len(known - steps), 'parameter')}"] if known - steps else []
        wrong += [f"has {plural(len(steps - known), 'parameter')} of something else"] if steps - known else []
        raise ConfigError(
            f"the optimizer {options.optimizer} {' and '.join(wrong)}; it was given {plural(len(known), 'parameter')}",
            "an optimizer of exactly the parameters of all groups that it is given",
            "make the optimizer of all groups",
        )
    if any(scales[id(p)] != group.get(LR_SCALE, 1.0) for group in optimizer.param_groups for p in group["params"]):
        raise ConfigError(
            f"the optimizer {options.optimizer} has dropped the key {LR_SCALE!r} of its parameter groups",
            "an optimizer that keeps the groups that it is given, of which some have a learning rate of their own (--decoupled-lr)",
            "make the optimizer of the groups, not of their parameters, or leave out --decoupled-lr",
        )
    return optimizer


def require_elementwise(options: ScheduleOptions, offloaded: bool, device: torch.device) -> None:
    """Checks that an optimizer computes each element of a weight from the gradient and the state of that element alone.

    Under ZeRO and under tensor parallelism the optimizer of a rank sees spans of flattened weights, so that any other optimizer would
    compute something else there without an error. One step on a matrix is compared with the step on its flattened parts.

    Args:
        options: the optimizer's name and settings.
        offloaded: whether the optimizer steps in host memory.
        device: the device on which it steps otherwise.

    Raises:
        ConfigError: it does not, or it keeps state that a checkpoint cannot hold; see `probed_state`.
    """
    if options.optimizer == "adamw" or optimizer_type(options.optimizer).full_matrices:
        return
    device = torch.device("cpu") if offloaded else device
    values = torch.sin(torch.arange(96, dtype=torch.float32, device=device))
    weights, gradients = values[:48], torch.stack([values[48:], values[48:].flip(0)])

    def after_two_steps(shapes: Sequence[tuple[int, ...]]) -> torch.Tensor:
        sizes = [torch.Size(shape).numel() for shape in shapes]
        parts = [torch.nn.Parameter(part.clone().view(shape)) for part, shape in zip(weights.split(sizes), shapes, strict=True)]
        undecayed = torch.nn.Parameter(values[:6].clone())
        optimizer = make_optimizer(
            [{"params": parts, "weight_decay": options.weight_decay}, {"params": [undecayed], "weight_decay": 0.0}], options, offloaded
        )
        if not isinstance(optimizer, MakesState):
            probed_state(optimizer, parts[0])  # the state of a matrix, too: the error below advises to divide none
        for gradient in gradients:
            undecayed.grad = torch.ones_like(undecayed)
            for part, piece in zip(parts, gradient.split(sizes), strict=True):
                part.grad = piece.clone().view(part.shape)
            for group in optimizer.param_groups:
                group["lr"] = 0.01
            optimizer.step()
        return torch.cat([part.detach().flatten() for part in parts])

    try:
        whole, reason = after_two_steps([(8, 6)]), ""
    except ConfigError:
        raise
    except Exception as error:
        raise _failed_step(options.optimizer, error) from error
    try:
        if torch.allclose(whole, after_two_steps([(20,), (28,)]), rtol=1e-5, atol=1e-6):
            return
    except Exception as error:
        reason = f" ({type(error).__name__}: {error})"
    raise ConfigError(
        f"the optimizer {options.optimizer} steps differently on a matrix than on its flattened parts{reason}, as ZeRO and tensor "
        "parallelism divide it",
        "an optimizer that works element by element, or --zero-stage 0 without tensor parallelism, where it sees whole weights",
        "use --zero-stage 0 and --tensor-model-parallel-size 1, or another optimizer",
    )


def base_optimizer(wrapped: Any) -> torch.optim.Optimizer:
    """Returns the optimizer inside of DeepSpeed's wrappers."""
    while hasattr(wrapped, "optimizer"):
        wrapped = wrapped.optimizer
    return wrapped


def state_kinds(state: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the kinds of a parameter's state, which are the names of its tensors without the number of steps."""
    return tuple(name for name, value in state.items() if torch.is_tensor(value) and name not in _NOT_STATE)


def ensure_state(optimizer: torch.optim.Optimizer, tensor: torch.Tensor) -> dict[str, Any]:
    """Returns the state of a tensor. If the optimizer has not stepped yet, the state is made: zeros and no steps.

    Raises:
        ConfigError: the optimizer keeps state that a checkpoint cannot hold; see `probed_state`.
    """
    state = optimizer.state[tensor]
    if not state_kinds(state):
        state.update(optimizer.new_state(tensor) if isinstance(optimizer, MakesState) else probed_state(optimizer, tensor))
    return state


def probed_state(optimizer: torch.optim.Optimizer, tensor: torch.Tensor) -> dict[str, Any]:
    """Returns a fresh state for a tensor, in the form in which the optimizer keeps the state of a small probe.

    The probe is stepped twice: once from the optimizer's own initial state and once from zeros. Both must arrive at the same values,
    since resuming and the switch know no other initial state than zeros.

    Raises:
        ConfigError: a step on the probe fails, the optimizer keeps something else than tensors of the parameter's shape and a number of
            steps, or its state does not start from zeros.
    """
    name = type(optimizer).__name__
    allowed = "any number of tensors with the parameter's shape and dtype that start from zeros, and optionally the number of steps as step"
    advice = "choose another --optimizer, or register one with such a state"
    first, state = _step_on_probe(optimizer, tensor, {})
    kinds = {kind for kind, value in state.items() if torch.is_tensor(value) and (value.shape, value.dtype) == (first.shape, first.dtype)}
    if state.keys() - kinds - {_STEP} or not kinds:
        kept = f"the optimizer {name} keeps this state for each parameter: {', '.join(sorted(state)) or 'none'}"
        raise ConfigError(kept, allowed, advice)
    zeros = {kind: torch.zeros_like(value) if torch.is_tensor(value) else 0 for kind, value in state.items()}
    copies = {kind: value.clone() if torch.is_tensor(value) else value for kind, value in zeros.items()}
    second, _ = _step_on_probe(optimizer, tensor, copies)
    if not torch.equal(first, second):
        raise ConfigError(f"the optimizer {name} does not start from zeros: its state is {', '.join(sorted(state))}", allowed, advice)
    return {kind: torch.zeros_like(tensor) if kind in kinds else value for kind, value in zeros.items()}


def _failed_step(name: str, error: Exception) -> ConfigError:
    """Returns the error for an optimizer that fails in a step on a few elements."""
    return ConfigError(
        f"the optimizer {name} fails in a step on a few elements: {type(error).__name__}: {error}",
        "an optimizer whose step() takes no arguments and accepts parameters of any shape",
        "choose another --optimizer, or correct the one that you registered",
    )


def _step_on_probe(optimizer: torch.optim.Optimizer, tensor: torch.Tensor, state: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Returns two elements of the tensor's dtype after one step from a state, and their state then; the optimizer is left unchanged.

    The elements have as many dimensions as the tensor, because Adafactor keeps other state for a matrix than for a flat weight.
    """
    probe = torch.ones((1,) * (tensor.dim() - 1) + (2,), dtype=tensor.dtype, device=tensor.device)
    probe.grad = torch.tensor([0.5, -0.25], dtype=tensor.dtype, device=tensor.device).view(probe.shape)
    groups = optimizer.param_groups
    # A copy of a group, so that an optimizer that counts steps in its groups does not count this one.
    optimizer.param_groups = [{**groups[0], "params": [probe], "lr": 0.1}]
    if state:
        optimizer.state[probe] = state
    try:
        optimizer.step()
    except Exception as error:
        raise _failed_step(type(optimizer).__name__, error) from error
    finally:
        optimizer.param_groups = groups
    return probe, optimizer.state.pop(probe, {})


def _counts_in_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer counts steps for each parameter, as torch's do, and not in its groups, as those of Apex do."""
    return any("step" in state for state in optimizer.state.values())


def step_count(optimizer: torch.optim.Optimizer) -> int:
    """Returns the number of steps since the optimizer's state was made or reset; the bias correction depends on it."""
    holders = optimizer.state.values() if _counts_in_state(optimizer) else optimizer.param_groups
    return int(max((holder["step"] for holder in holders if "step" in holder), default=0))


def set_step_count(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Sets the number of steps since the optimizer's state was made or reset."""
    if not _counts_in_state(optimizer):
        for group in optimizer.param_groups:
            group["step"] = count
    for state in optimizer.state.values():
        if "step" not in state:
            continue
        if isinstance(state["step"], (int, float)):
            state["step"] = count
        else:
            state["step"].fill_(count)


def zero_state(states: Iterable[Mapping[str, Any]]) -> None:
    """Sets all kinds of each state to zero; the numbers of steps stay."""
    for state in states:
        for kind in state_kinds(state):
            state[kind].zero_()
