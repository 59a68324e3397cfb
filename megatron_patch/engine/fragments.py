"""Flat views of the float32 weights and optimizer state that this rank holds, whatever the ZeRO level, named by parameter.

In: a DeepSpeed engine. Out: `Fragment`s. Each is a span `[start, start + numel)` of one flattened parameter (or of this rank's
tensor-parallel shard of it), with views of its master weight and of each kind of optimizer state. Checkpoints and initial weights work on
fragments, so they need not know how ZeRO lays out its memory. Fragments are named by parameter, shard and span, so that a checkpoint of
fragments can be loaded into any other layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_patch.engine.swapping import SubGroups
from megatron_patch.model.sharding import Shard, is_expert_parameter
from megatron_patch.optimizers.state import base_optimizer, ensure_state, state_kinds


@dataclass(frozen=True)
class Fragment:
    """A span of one parameter that this rank holds.

    Args:
        name: the parameter's name.
        shape: shape of the full parameter.
        shard: the tensor-parallel shard that contains the span; None if the parameter is not sharded.
        start: first element of the span in the flattened shard.
        numel: number of elements of the span.
        tensors: "weight" and each kind of optimizer state, such as "exp_avg" -> float32 [numel], views that show and set the current
            values. With NVMe offload they are valid until the tensors of another fragment are looked up.
    """

    name: str
    shape: tuple[int, ...]
    shard: Shard | None
    start: int
    numel: int
    tensors: Mapping[str, torch.Tensor]


def fragments(
    engine: Any,
    names: dict[torch.nn.Parameter, str],
    shards: Mapping[str, Shard],
    share: tuple[int, int] | None,
    on_nvme: SubGroups | None = None,
    expert_share: tuple[int, int] | None = None,
) -> list[Fragment]:
    """Returns this rank's fragments, in the order of the parameters; with NVMe offload, in the order of the sub-groups.

    Args:
        engine: the engine that `deepspeed.initialize` returned.
        names: parameter -> its name.
        shards: name -> this rank's tensor-parallel shard, for the sharded parameters.
        share: (rank, ranks): under ZeRO 0, where each rank holds all weights, return this rank's equal share of them; None: return all.
        expert_share: `share` among the ranks that hold the same experts, if not all data-parallel ranks do.
        on_nvme: the sub-groups on NVMe, to be kept open while the fragments are used; None without NVMe offload.
    """
    optimizer = base_optimizer(engine.optimizer)
    result = []
    for parameter, name in names.items() if on_nvme is None else sorted(names.items(), key=lambda item: on_nvme.of(item[0])):
        own_share = expert_share if expert_share is not None and is_expert_parameter(name) else share
        located = locate(engine, optimizer, parameter, own_share)
        if located is None:
            continue
        flat, offset, start, numel = located
        if numel <= 0:
            continue
        tensors: Mapping[str, torch.Tensor]
        if on_nvme is None:
            state = ensure_state(optimizer, flat)
            full = {"weight": flat.detach(), **{kind: state[kind] for kind in state_kinds(state)}}
            tensors = {kind: tensor.view(-1).narrow(0, offset, numel) for kind, tensor in full.items()}
        else:
            tensors = on_nvme.views(on_nvme.of(parameter), offset, numel)
        shard = shards.get(name)
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        result.append(Fragment(name, shape if shard is None else shard.full_shape(shape), shard, start, numel, tensors))
    return result


class HostBuffers:
    """Host memory for a snapshot, which is written to disk while training continues; the memory is reused by the next snapshot.

    Args:
        pin_memory: use page-locked memory, into which copies from a GPU are several times faster.
    """

    def __init__(self, pin_memory: bool) -> None:
        self._pin = pin_memory
        self._buffers: dict[tuple[str, str, int], torch.Tensor] = {}

    def copy(self, local: Sequence[Fragment]) -> list[Fragment]:
        """Returns copies of the fragments in host memory; the copies of the previous call are overwritten."""
        previous, self._buffers = self._buffers, {}
        result = []
        for fragment in local:
            tensors = {}
            for kind, tensor in fragment.tensors.items():
                key = (kind, fragment.name, fragment.start)
                buffer = previous.get(key)
                if buffer is None or buffer.shape != tensor.shape:
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pin)
                self._buffers[key] = tensors[kind] = buffer.copy_(tensor, non_blocking=self._pin)
            result.append(replace(fragment, tensors=tensors))
        if self._pin:
            torch.cuda.synchronize()
        return result


def locate(
    engine: Any, optimizer: torch.optim.Optimizer, parameter: Any, share: tuple[int, int] | None
) -> tuple[torch.Tensor, int, int, int] | None:
    """Returns where this rank holds a parameter: (tensor of the optimizer, offset in it, offset in the flattened parameter, elements).

    None if this rank holds nothing of it.
    """
    zero = engine.optimizer
    if hasattr(parameter, "ds_id"):  # ZeRO 3: equal spans, the last padded
        group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
        start = parameter.ds_tensor.ds_numel * parameter.ds_zero_partition_rank
        return zero.fp32_partitioned_groups_flat[group], offset, start, min(padded, parameter.ds_numel - start)
    if hasattr(parameter, "_hp_mapping"):  # ZeRO 1 and 2
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = optimizer.param_groups[mapping.param_group_index]["params"][0]
        return flat, mapping.hp_fragment_address.start, mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
    rank, ranks = share or (0, 1)
    start, end = (parameter.numel() * edge // ranks for edge in (rank, rank + 1))
    return parameter, start, start, end - start
