"""Attaches an optimizer that needs full matrices to DeepSpeed's partitions of them.

In: DeepSpeed's engine and its inner optimizer. Out: the optimizer knows which tensor holds which span of which matrix. DeepSpeed calls
`step` once with all parameters (ZeRO 0), once for each group with a flat partition of it (ZeRO 1 and 2), or once for each sub-group with
its flat partition (ZeRO 3); sub-groups contain full parameters of one group, the same on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from megatron_patch.config.options import ScheduleOptions
from megatron_patch.engine.deepspeed_config import EngineConfig
from megatron_patch.engine.fragments import locate
from megatron_patch.errors import ConfigError
from megatron_patch.model.parameters import is_hidden_matrix
from megatron_patch.model.sharding import Shard
from megatron_patch.optimizers.groups import HIDDEN
from megatron_patch.optimizers.muon import OrthogonalizedMomentum
from megatron_patch.optimizers.ownership import MatrixSpan
from megatron_patch.optimizers.registry import optimizer_type


def require_attachable(optimizer: torch.optim.Optimizer, options: ScheduleOptions) -> None:
    """Checks that an optimizer that needs full matrices can be attached where ZeRO or tensor parallelism divides them.

    Another one would step parts of matrices without an error.

    Args:
        optimizer: the optimizer.
        options: its name.

    Raises:
        ConfigError: it is registered with `full_matrices` but is of another class.
    """
    if optimizer_type(options.optimizer).full_matrices and not isinstance(optimizer, OrthogonalizedMomentum):
        raise ConfigError(
            f"the optimizer {options.optimizer} is registered with full_matrices and is made as {type(optimizer).__name__}",
            "OrthogonalizedMomentum or a subclass of it",
            "make a subclass of it, or register the optimizer without full_matrices",
        )


def attach_hidden_matrices(
    optimizer: OrthogonalizedMomentum,
    engine: Any,
    config: EngineConfig,
    names: Mapping[torch.nn.Parameter, str],
    shards: Mapping[str, Shard],
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> None:
    """Attaches the optimizer to all ranks of a group; each of them must call this.

    In float32 runs matrices are sent and orthogonalized in float32, else in bfloat16.

    Args:
        optimizer: the inner optimizer of `engine`.
        engine: the engine that `deepspeed.initialize` returned.
        config: precision and ZeRO level.
        names: this rank's parameters -> their names.
        shards: name -> this rank's tensor-parallel shard, for the sharded parameters.
        group: the ranks that hold the same layers; None: all.
        device: where matrices are orthogonalized.
    """
    units = _units(optimizer, engine.optimizer, config.zero_level)
    place = {id(tensor): (unit, index) for unit, tensors in enumerate(units) for index, tensor in enumerate(tensors)}
    spans: list[list[MatrixSpan]] = [[] for _ in units]
    for parameter, name in names.items():
        local = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if not is_hidden_matrix(name, len(local)):
            continue
        located = locate(engine, optimizer, parameter, None)
        if located is None or located[3] <= 0:
            continue
        flat, offset, start, numel = located
        unit, index = place[id(flat)]
        shard = shards.get(name)
        rows, columns = (local if shard is None or len(local) > 2 else shard.full_shape(local))[-2:]
        span = MatrixSpan(name, (rows, columns), shard, start, numel, index, offset)
        spans[unit] += [span] if len(local) == 2 else _spans_of_experts(span, local[0])
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    optimizer.attach(list(zip(units, spans, strict=True)), group, device, dtype)


def _spans_of_experts(span: MatrixSpan, count: int) -> list[MatrixSpan]:
    """Returns the spans of the matrices of experts, each a matrix of its own, in a span of a rank's experts.

    Args:
        span: span of the rank's part of the parameter; its shape is that of one expert.
        count: experts of the rank.
    """
    first, numel = (0 if span.shard is None else span.shard.index * count), math.prod(span.shape)
    found = []
    for expert in range(span.start // numel, -(-(span.start + span.numel) // numel)):
        start, end = max(span.start, expert * numel), min(span.start + span.numel, (expert + 1) * numel)
        name, offset = f"{span.name}[{first + expert}]", span.offset + start - span.start
        found.append(MatrixSpan(name, span.shape, None, start - expert * numel, end - start, span.tensor, offset))
    return found


def _units(optimizer: torch.optim.Optimizer, zero: Any, zero_level: int) -> list[list[torch.Tensor]]:
    """Returns the tensors that each call of the optimizer's `step` finds in a group of hidden matrices, call by call."""
    groups = optimizer.param_groups
    if zero_level == 3:
        flats, group_of = zero.fp32_partitioned_groups_flat, zero.sub_group_to_group_id
        return [[flat] for number, flat in enumerate(flats) if HIDDEN in groups[group_of[number]]]
    return [list(group["params"]) for group in groups if HIDDEN in group]
