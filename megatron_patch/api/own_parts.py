"""A user's optimizer or model for one run. In: a resolved run and a function. Out: the run with it; what it cannot do is refused by name.

Checkpoints record the function's name, not its code: a resumed run needs a function of the same name.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_patch.config.context_checks import check_own_model
from megatron_patch.config.resolve import RunConfig
from megatron_patch.errors import ConfigError
from megatron_patch.model.own_model import OwnModel
from megatron_patch.optimizers.registry import OPTIMIZERS
from megatron_patch.utils.units import plural

if TYPE_CHECKING:
    import torch

    from megatron_patch.model.shape import ModelShape
    from megatron_patch.parallel.tensor import TensorParallel

MakeOptimizer = Callable[[Sequence[dict[str, Any]]], "torch.optim.Optimizer"]
"""Makes an optimizer of parameter groups, each with its `params` and its `weight_decay`.

The optimizer works element by element and keeps any number of tensors of the parameter's shape that start from zeros, and optionally the
number of steps (`megatron_patch.optimizers.state`).
"""
MakeModel = Callable[["ModelShape", "TensorParallel"], "torch.nn.Module"]
"""Makes a module of the model's shape, and of the ranks that share its layers."""


def name_of(function: Any, parameter: str) -> str:
    """Returns the name of a function or class; of a partial function, the name of what it calls.

    Raises:
        ConfigError: it cannot be called, or has no name by which a checkpoint could tell it from others.
    """
    if not callable(function):
        raise ConfigError(
            f"{parameter}={function!r} is not a function", "a function or a class", f"define a function, and give it as {parameter}="
        )
    name = getattr(getattr(function, "func", function), "__name__", None) or type(function).__name__
    if name == "<lambda>":
        raise ConfigError(
            f"{parameter}= is a lambda, which has no name",
            "a function or class with a name, which checkpoints record",
            f"define it with def, and give its name as {parameter}=",
        )
    return str(name)


def check_takes(function: Any, what: str, *arguments: str, do: str | None = None) -> None:
    """Checks that a function of the user can be called with the arguments that it will get.

    Args:
        function: a function or class.
        what: how the error calls it, such as "optimizer=radam".
        arguments: names of the arguments, for the message.
        do: what to do; None: to change its parameters.

    Raises:
        ConfigError: it takes other arguments.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # some builtins have none
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise ConfigError(
            f"{what} takes {signature}: {error}",
            f"what can be called with ({', '.join(arguments)})",
            do or f"give it {plural(len(arguments), 'parameter')}: {', '.join(arguments)}",
        ) from error


@contextlib.contextmanager
def with_optimizer(run: RunConfig, optimizer: MakeOptimizer | None) -> Iterator[RunConfig]:
    """Yields the run with a user's optimizer, which is registered during the block.

    Raises:
        ConfigError: the run names an optimizer as well, or the name is one of the program's own.
    """
    if optimizer is None:
        yield run
        return
    name = name_of(optimizer, "optimizer")
    check_takes(optimizer, f"optimizer={name}", "groups")
    if "optimizer" in run.origins and run.options.schedule.optimizer != name:
        raise ConfigError(
            f"optimizer={name}, and the run has --optimizer {run.options.schedule.optimizer}", "one of the two", "remove one of them"
        )
    if name in OPTIMIZERS:
        raise ConfigError(
            f"optimizer={name} has the name of a registered optimizer", f"other names than {', '.join(OPTIMIZERS)}", "rename the function"
        )
    OPTIMIZERS[name] = lambda groups, options, offloaded: optimizer(groups)
    try:
        yield replace(run, options=replace(run.options, schedule=replace(run.options.schedule, optimizer=name)))
    finally:
        del OPTIMIZERS[name]


def with_model(run: RunConfig, model: MakeModel | None) -> RunConfig:
    """Returns the run with a user's model.

    Raises:
        ConfigError: the run asks for what a user's model cannot do: a pipeline, tensor parallelism unless it builds shards,
            context parallelism unless it shares heads, recomputation, experts.
    """
    if model is None:
        return run
    own, engine = OwnModel(name_of(model, "model"), model), run.options.engine
    if not isinstance(model, type) and hasattr(model, "named_parameters"):
        raise ConfigError(
            f"model= is a module that is already built, a {own.name}",
            "a function of (shape, parallel) that builds the module",
            "define a function that builds it, and give that as model=",
        )
    check_takes(model, f"model={own.name}", "shape", "parallel")
    if engine.pipeline_model_parallel_size > 1:
        raise ConfigError(
            f"model={own.name} with --pipeline-model-parallel-size {engine.pipeline_model_parallel_size}: it builds all layers",
            "1 with a model of your own",
            "remove --pipeline-model-parallel-size; --zero-stage 3 and tensor parallelism divide a model, too",
        )
    if engine.tensor_model_parallel_size > 1 and not own.declares("tensor_parallel"):
        raise ConfigError(
            f"model={own.name} with --tensor-model-parallel-size {engine.tensor_model_parallel_size}, but it does not declare that "
            "it builds shards",
            "1, or a function whose attribute tensor_parallel is True and which builds the shards of parallel.rank of parallel.size",
            f"set {own.name}.tensor_parallel = True if its layers are those of megatron_patch.parallel.tensor, or use --zero-stage 3",
        )
    if engine.recompute_granularity != "none":
        raise ConfigError(
            f"model={own.name} with --recompute-granularity {engine.recompute_granularity}, of which it knows nothing",
            "--recompute-granularity none with a model of your own, which may call torch.utils.checkpoint itself",
            "remove --recompute-granularity",
        )
    if run.shape.experts is not None:
        raise ConfigError(
            f"model={own.name} with --num-experts {run.shape.experts.count}: the load of experts is balanced and saved only in the "
            "program's own model",
            "a model of your own without --num-experts, or --num-experts without a model of your own",
            "remove --num-experts, or model=",
        )
    if not own.declares("context_parallel"):
        check_own_model(own.name, run.plan)
    return replace(run, own_model=own)
