"""The optimizer of a run: which one it is, the state that it keeps for each parameter, and what a switch does to that state.

In: parameter groups and the schedule's options. Out: an optimizer that keeps two moments for each parameter, `exp_avg` and `exp_avg_sq`,
and one number of steps. Checkpoints, ZeRO and the switch rely on these two names, so every optimizer in `OPTIMIZERS` must use them.

A user's own script adds an optimizer before it calls `megatron_patch.training.pretrain.main`:

    from megatron_patch.engine.optimizer import OPTIMIZERS

    OPTIMIZERS["adam"] = lambda groups, options, offloaded: torch.optim.Adam(groups, lr=options.lr)

Torch is imported inside of functions: a dry run checks the name of the optimizer and does not need torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from megatron_patch.config.options import ScheduleOptions
from megatron_patch.errors import ConfigError
from megatron_patch.utils.registry import lookup
from megatron_patch.utils.units import plural

if TYPE_CHECKING:
    import torch

MOMENTS = ("exp_avg", "exp_avg_sq")


def _adamw(groups: Sequence[dict[str, Any]], options: ScheduleOptions, offloaded: bool) -> torch.optim.Optimizer:
    """Returns NVIDIA Apex's fused AdamW if it is installed and the optimizer steps on a GPU, else the fused AdamW of torch."""
    import torch

    settings: dict[str, Any] = {
        "lr": options.lr,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_eps,
        "weight_decay": options.weight_decay,
    }
    if torch.cuda.is_available() and not offloaded:
        try:
            # The package named apex on PyPI is a different one, which lacks this class.
            from apex.optimizers import FusedAdam
        except (ImportError, AttributeError):
            pass
        else:
            return FusedAdam(groups, adam_w_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


OPTIMIZERS: dict[str, Callable[[Sequence[dict[str, Any]], ScheduleOptions, bool], torch.optim.Optimizer]] = {"adamw": _adamw}
"""What `--optimizer NAME` accepts: name -> function of (parameter groups, schedule options, whether the optimizer steps in host memory)."""


def optimizer_by_name(name: str) -> Callable[[Sequence[dict[str, Any]], ScheduleOptions, bool], torch.optim.Optimizer]:
    """Returns the registered maker of an optimizer.

    Raises:
        ConfigError: no optimizer has this name; the error lists the registered names and suggests the nearest one.
    """
    return lookup(OPTIMIZERS, name, "--optimizer", home="megatron_patch.engine.optimizer.OPTIMIZERS")


def make_optimizer(groups: Sequence[dict[str, Any]], options: ScheduleOptions, offloaded: bool = False) -> torch.optim.Optimizer:
    """Returns the optimizer that `--optimizer` names.

    Args:
        groups: parameter groups, each with its own `weight_decay`.
        options: the optimizer's name and settings.
        offloaded: whether the optimizer steps in host memory, where the kernels of Apex cannot run.

    Raises:
        ConfigError: no optimizer of that name is registered, or what is registered makes no optimizer, or one of other parameters.
    """
    given = [parameter for group in groups for parameter in group["params"]]
    optimizer = optimizer_by_name(options.optimizer)(groups, options, offloaded)
    import torch

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
        ConfigError: it does not.
    """
    import torch

    if options.optimizer == "adamw":
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
        for gradient in gradients:
            undecayed.grad = torch.ones_like(undecayed)
            for part, piece in zip(parts, gradient.split(sizes), strict=True):
                part.grad = piece.clone().view(part.shape)
            for group in optimizer.param_groups:
                group["lr"] = 0.01
            optimizer.step()
        return torch.cat([part.detach().flatten() for part in parts])

    whole, reason = after_two_steps([(8, 6)]), ""
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


def ensure_moments(optimizer: torch.optim.Optimizer, tensor: torch.Tensor) -> dict[str, Any]:
    """Returns the state of a tensor. If the optimizer has not stepped yet, the state is made: zero moments, zero steps.

    Raises:
        ConfigError: the optimizer keeps other state than the two moments and the number of steps.
    """
    state = optimizer.state[tensor]
    if MOMENTS[0] not in state:
        state.update(_new_state(optimizer, tensor))
    return state


def _new_state(optimizer: torch.optim.Optimizer, tensor: torch.Tensor) -> dict[str, Any]:
    """Returns a fresh state for a tensor; its form (what counts the steps) is taken from a step of the optimizer on a probe of zeros."""
    import torch

    probe = torch.zeros(2, dtype=tensor.dtype, device=tensor.device)
    probe.grad = torch.zeros_like(probe)
    groups = optimizer.param_groups
    # A copy of a group, so that an optimizer that counts steps in its groups does not count this one.
    optimizer.param_groups = [{**groups[0], "params": [probe]}]
    try:
        optimizer.step()
    except Exception as error:
        raise ConfigError(
            f"the optimizer {type(optimizer).__name__} fails in a step on two elements: {type(error).__name__}: {error}",
            "an optimizer whose step() takes no arguments and accepts parameters of any shape",
            "choose another --optimizer, or correct the one that you registered",
        ) from error
    finally:
        optimizer.param_groups = groups
    state: dict[str, Any] = optimizer.state.pop(probe, {})
    moments = {name for name, value in state.items() if torch.is_tensor(value) and (value.shape, value.dtype) == (probe.shape, probe.dtype)}
    others = state.keys() - moments - {"step"}
    if moments != set(MOMENTS) or others:
        raise ConfigError(
            f"the optimizer {type(optimizer).__name__} keeps this state for each parameter: {', '.join(sorted(state)) or 'none'}",
            "exp_avg and exp_avg_sq, each with the parameter's shape and dtype, and optionally the number of steps as step",
            "choose another --optimizer, or register one that keeps its state under these names",
        )
    step = {} if "step" not in state else {"step": state["step"].zero_() if torch.is_tensor(state["step"]) else 0}
    return {**step, **{name: torch.zeros_like(tensor) for name in MOMENTS}}


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


def zero_moments(states: Iterable[dict[str, Any]]) -> None:
    """Sets both moments of each state to zero."""
    for state in states:
        for name in MOMENTS:
            if name in state:
                state[name].zero_()
