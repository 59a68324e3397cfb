"""Where this rank's float32 weights and moments live, whatever ZeRO stage holds them, as flat views named by parameter.

In: a DeepSpeed engine. Out: `Fragment`s, each a span `[start, start + numel)` of one flattened parameter (or of the part of it that a
tensor-parallel rank holds) with live views of its master weight and its two moments. Checkpoints, the switch of stages and replica checks
all work on fragments, so none of them needs to know how a ZeRO stage lays its memory out; and as fragments are named by parameter, part and
span, a checkpoint of fragments can be read back into any other layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_patch.engine.optimizer import MOMENTS, base_optimizer, ensure_moments
from megatron_patch.engine.swapping import SubGroups
from megatron_patch.model.sharding import Shard


@dataclass(frozen=True)
class Fragment:
    """A span of one parameter that this rank owns.

    Args:
        name: the parameter's name.
        shape: the whole parameter's shape.
        shard: the tensor-parallel part that the span is of, or None where the parameter is not cut.
        start: first element of the span in the flattened part.
        numel: elements of the span.
        tensors: "weight", "exp_avg", "exp_avg_sq" -> float32 [numel], live views; of what is on NVMe, valid until those of another fragment
            are looked up.
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
) -> list[Fragment]:
    """This rank's fragments in the order of the parameters, or of the sub-groups that are on NVMe.

    Args:
        engine: what `deepspeed.initialize` returned.
        names: each parameter's name.
        shards: which part of it this rank holds, where it is cut.
        share: (rank, ranks): where all ranks hold everything (ZeRO 0) the fragments are this rank's equal share of it;
            None: all of it.
        on_nvme: open for as long as the fragments are used, where weights or moments are on NVMe.
    """
    optimizer = base_optimizer(engine.optimizer)
    result = []
    for parameter, name in names.items() if on_nvme is None else sorted(names.items(), key=lambda item: on_nvme.of(item[0])):
        located = _locate(engine, optimizer, parameter, share)
        if located is None:
            continue
        flat, offset, start, numel = located
        if numel <= 0:
            continue
        tensors: Mapping[str, torch.Tensor]
        if on_nvme is None:
            state = ensure_moments(optimizer, flat)
            whole = {"weight": flat.detach(), **{key: state[key] for key in MOMENTS}}
            tensors = {key: tensor.view(-1).narrow(0, offset, numel) for key, tensor in whole.items()}
        else:
            tensors = on_nvme.views(on_nvme.of(parameter), offset, numel)
        shard = shards.get(name)
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        result.append(Fragment(name, shape if shard is None else shard.whole_shape(shape), shard, start, numel, tensors))
    return result


class HostCopies:
    """Copies of fragments in the host's memory, which a file is written from while training goes on; the memory is kept for the next.

    Args:
        pin_memory: page-locked, as copies from a GPU are several times faster into.
    """

    def __init__(self, pin_memory: bool) -> None:
        self._pin = pin_memory
        self._kept: dict[tuple[str, str, int], torch.Tensor] = {}

    def copies(self, found: Sequence[Fragment]) -> list[Fragment]:
        """The same fragments with tensors that training does not touch; those of the call before are overwritten."""
        before, self._kept = self._kept, {}
        result = []
        for fragment in found:
            tensors = {}
            for kind, tensor in fragment.tensors.items():
                key = (kind, fragment.name, fragment.start)
                kept = before.get(key)
                if kept is None or kept.shape != tensor.shape:
                    kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pin)
                self._kept[key] = tensors[kind] = kept.copy_(tensor, non_blocking=self._pin)
            result.append(replace(fragment, tensors=tensors))
        if self._pin:
            torch.cuda.synchronize()
        return result


def _locate(
    engine: Any, optimizer: torch.optim.Optimizer, parameter: Any, share: tuple[int, int] | None
) -> tuple[torch.Tensor, int, int, int] | None:
    """(tensor of the optimizer, offset in it, offset in the flattened parameter, elements), or None where nothing is here."""
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
