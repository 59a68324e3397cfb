"""A model of the user's own in place of `GPTModel`: any module that has the same parameters and the same forward pass.

In: a function of (shape, parallel) that builds it. Out: the module, checked, so that the optimizer's groups, initial weights, tensor
parallelism and checkpoints, which all go by parameter names, work on it. Torch is imported inside of functions: dry runs do not need it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_patch.errors import ConfigError
from megatron_patch.model.parameters import parameters_of_layers
from megatron_patch.model.shape import ModelShape
from megatron_patch.model.sharding import shard_of
from megatron_patch.utils.units import plural

if TYPE_CHECKING:
    import torch
    from torch import nn

    from megatron_patch.parallel.tensor import TensorParallel

_SHOWN = 12
_CONTRACT = "forward(inputs, labels, label_weights, position_ids, documents), which returns (sum of losses, sum of weights)"


@dataclass(frozen=True)
class OwnModel:
    """A model that the user builds.

    Args:
        name: the name that checkpoints record.
        build: builds the module, or the shards of this rank of `parallel`, from (shape, parallel).
    """

    name: str
    build: Callable[[ModelShape, TensorParallel], nn.Module]

    def declares(self, ability: str) -> bool:
        """Whether the function has an attribute of this name that is True.

        Args:
            ability: "tensor_parallel" (it builds the shards of `parallel`), "context_parallel" (its forward pass takes a `ContextParallel`
                after the documents) or "zero_3" (each parameter is only used inside of the forward pass of the module that holds it).
        """
        return getattr(self.build, ability, False) is True


def build_own_model(own: OwnModel, shape: ModelShape, parallel: TensorParallel, zero_level: int = 0) -> nn.Module:
    """Builds and checks a user's model, on the default device.

    Args:
        own: the model.
        shape: the model's shape.
        parallel: the ranks that share each layer.
        zero_level: ZeRO level of the engine that will run it.

    Raises:
        ConfigError: the function returns no module, or one whose parameters, buffers or losses are not those that the program needs; the
            error names all differences of parameters.
    """
    from torch import nn

    module = own.build(shape, parallel)
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"model={own.name} returns {type(module).__name__}",
            "a torch.nn.Module",
            "return the module that the function builds",
        )
    if zero_level == 3:
        _check_partitioning(own, module)
    _check_parameters(own, module, shape, parallel)
    _check_buffers(own, module)
    _check_first_losses(own, module)
    return module


def _check_partitioning(own: OwnModel, module: nn.Module) -> None:
    from megatron_patch.model.gpt import GPTModel

    if not isinstance(module, GPTModel) and not own.declares("zero_3"):
        raise ConfigError(
            f"model={own.name} with --zero-stage 3, under which only the forward pass of a module has the module's parameters",
            "--zero-stage 0 to 2; GPTModel, also changed; or a function whose attribute zero_3 is True, because no module uses the "
            "parameters of another one",
            f"lower --zero-stage, or set {own.name}.zero_3 = True",
        )


def _check_parameters(own: OwnModel, module: nn.Module, shape: ModelShape, parallel: TensorParallel) -> None:
    expected = {}
    for name, size in parameters_of_layers(shape).items():
        shard = shard_of(name, shape, parallel.rank, parallel.size)
        expected[name] = size if shard is None else tuple(n // shard.count if dim == shard.dim else n for dim, n in enumerate(size))
    # Under ZeRO 3 a parameter is partitioned as soon as it is made, and DeepSpeed keeps its shape.
    found = {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in module.named_parameters()}
    problems = [f"{name} {list(size)} is missing" for name, size in expected.items() if name not in found]
    problems += [f"{name} {list(size)} is unknown" for name, size in found.items() if name not in expected]
    problems += [
        f"{name} is {list(found[name])} instead of {list(size)}" for name, size in expected.items() if found.get(name, size) != size
    ]
    problems += [f"{name} is frozen (requires_grad is False)" for name, one in module.named_parameters() if not one.requires_grad]
    if problems:
        more = f"; and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
        raise ConfigError(
            f"the parameters of model={own.name} differ in {plural(len(problems), 'place')}: {'; '.join(problems[:_SHOWN])}{more}",
            "the names and shapes of megatron_patch.model.parameters.parameters_of_layers(shape), all of them trained",
            "rename or resize them; a model with other parameters needs another --model-family, --qk-layernorm or the like",
        )


def _check_buffers(own: OwnModel, module: nn.Module) -> None:
    stored = set(module.state_dict(keep_vars=True)) - {name for name, _ in module.named_parameters(remove_duplicate=False)}
    if stored:
        raise ConfigError(
            f"model={own.name} has persistent buffers: {', '.join(sorted(stored)[:_SHOWN])}",
            "parameters, and buffers that the constructor computes, because checkpoints hold parameters only",
            "register them with register_buffer(name, tensor, persistent=False)",
        )


def _check_first_losses(own: OwnModel, module: nn.Module) -> None:
    """Checks what the module returns for its first batch with labels."""
    from megatron_patch.ops import IGNORE_INDEX

    def check(_: nn.Module, arguments: tuple[Any, ...], result: object) -> None:
        _inputs, labels, label_weights, *_more = (*arguments, None, None, None)
        if labels is None:
            return
        handle.remove()
        check_losses(own.name, result, None if label_weights is not None else int((labels != IGNORE_INDEX).sum()))

    handle = module.register_forward_hook(check)


def check_losses(name: str, result: object, labels: int | None) -> None:
    """Checks what a user's model returned for a batch with labels.

    Args:
        name: the name of the model.
        result: what its forward pass returned.
        labels: number of scored labels; None if they have weights other than 1.

    Raises:
        ConfigError: it is not the sum of the losses and the sum of the weights.
    """
    import torch

    parts = result if isinstance(result, tuple) else ()
    if len(parts) != 2 or not all(torch.is_tensor(part) and part.numel() == 1 for part in parts):
        kinds = [f"a tensor of shape {list(part.shape)}" if torch.is_tensor(part) else type(part).__name__ for part in parts]
        what = f"a tuple of {len(parts)} ({', '.join(kinds)})" if isinstance(result, tuple) else type(result).__name__
        raise ConfigError(f"model={name} returns {what} for a batch with labels", _CONTRACT, "return the two sums, each a scalar tensor")
    if torch.is_grad_enabled() and not parts[0].requires_grad:
        raise ConfigError(
            f"model={name} returns a sum of losses without gradients",
            "a sum of losses that is computed of the parameters",
            "remove detach(), torch.no_grad() and conversions to numbers from its forward pass",
        )
    weights = float(parts[1].detach())
    if labels is not None and abs(weights - labels) > 0.01 * labels:
        raise ConfigError(
            f"model={name} returns {weights:g} as the sum of weights of {plural(labels, 'scored label')}",
            _CONTRACT,
            "return sums, not means: the program divides by the number of labels of the global batch",
        )


class OwnModelForInference:
    """A user's module with the interface of `InferenceModel`, without a cache of earlier positions.

    Args:
        module: the module, in evaluation mode.
        shape: the model's shape.
    """

    def __init__(self, module: nn.Module, shape: ModelShape) -> None:
        self._module, self.shape = module, shape

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self._module.parameters()).device

    def __call__(self, inputs: torch.Tensor, labels: torch.Tensor) -> Any:
        """Returns (sum of losses, sum of weights) over the labels of a batch."""
        return self._module(inputs, labels, None, None, None)

    def logits(self, input_ids: torch.Tensor, *, cache: object = None, last_only: bool = False) -> torch.Tensor:
        """Returns the logits [B, T, V], or those of the last position only."""
        assert cache is None
        logits: torch.Tensor = self._module(input_ids, None, None, None, None)
        return logits[:, -1:] if last_only else logits
