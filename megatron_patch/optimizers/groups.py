"""The parameter groups of an optimizer. In: a rank's named parameters and the options. Out: groups, each with its own rate and decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from megatron_patch.config.options import ScheduleOptions
from megatron_patch.model.parameters import is_hidden_matrix
from megatron_patch.model.sharding import VOCABULARY_PARAMETERS, is_expert_parameter
from megatron_patch.optimizers.registry import OptimizerType

LR_SCALE = "lr_scale"
"""Key of a group: its learning rate as a multiple of the schedule's."""
HIDDEN = "hidden"
"""Key that only the group of the hidden matrices has, for an optimizer that needs full matrices."""


def parameter_groups(
    names: Mapping[nn.Parameter, str], options: ScheduleOptions, optimizer: OptimizerType, experts: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Returns the parameter groups of an optimizer, without empty ones.

    They are, in this order: hidden matrices, if the optimizer needs full matrices; word embeddings and head, if they have a rate or decay
    of their own; all other matrices; weights of norms and biases, to which weight decay does not apply.

    Args:
        names: a rank's parameters -> their names, in the order of the model.
        options: learning rates and weight decays.
        optimizer: the optimizer that will step them.
        experts: further keys of groups of experts that data-parallel ranks divide, each of which follows the group it was taken from.

    Returns:
        Groups with `params`, `weight_decay`, and, if they differ from the default, `LR_SCALE` and `HIDDEN`.
    """
    vocabulary_decay = options.weight_decay if options.embedding_weight_decay is None else options.embedding_weight_decay
    hidden_decay = options.weight_decay if options.muon_weight_decay is None else options.muon_weight_decay
    vocabulary_apart = options.decoupled_lr is not None or options.embedding_weight_decay is not None
    hidden: dict[str, Any] = {"params": [], "weight_decay": hidden_decay, HIDDEN: True, **_scale(options.muon_lr, options)}
    vocabulary: dict[str, Any] = {"params": [], "weight_decay": vocabulary_decay, **_scale(options.decoupled_lr, options)}
    matrices: dict[str, Any] = {"params": [], "weight_decay": options.weight_decay}
    vectors: dict[str, Any] = {"params": [], "weight_decay": 0.0}
    for parameter, name in names.items():
        # With ZeRO 3, a parameter is empty while no layer uses it; `ds_shape` is its full shape.
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        if optimizer.full_matrices and is_hidden_matrix(name, dimensions):
            group = hidden
        elif dimensions < 2:
            group = vectors
        else:
            group = vocabulary if vocabulary_apart and name in VOCABULARY_PARAMETERS else matrices
        group["params"].append(parameter)
    found = [hidden, vocabulary, matrices, vectors]
    if experts is not None:
        found = [part for group in found for part in _without_experts(group, names, experts)]
    return [group for group in found if group["params"]]


def _without_experts(group: dict[str, Any], names: Mapping[nn.Parameter, str], keys: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a group without the parameters of experts, and a group of these with further keys."""
    parts: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in group["params"]:
        parts[is_expert_parameter(names[parameter])].append(parameter)
    return [{**group, "params": parts[0]}, {**group, **keys, "params": parts[1]}]


def _scale(lr: float | None, options: ScheduleOptions) -> dict[str, float]:
    return {} if lr is None or lr == options.lr else {LR_SCALE: lr / options.lr}
