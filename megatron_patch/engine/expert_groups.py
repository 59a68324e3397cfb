"""Tells DeepSpeed which parameters are experts that data-parallel ranks divide, and which ranks hold the same ones.

In: the model, its parameters, the groups. Out: the keys that mark a parameter group of experts. DeepSpeed knows experts by three signs:
a module that is one of its own layers, `allreduce` and `group_name` of a parameter, and a group of parameters with `moe` and `name`.
Without them it would sum the gradients of different experts, and training would be wrong without an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from megatron_patch.model.sharding import is_expert_parameter
from megatron_patch.parallel.groups import Groups


def mark_experts(model: nn.Module, names: Mapping[nn.Parameter, str], groups: Groups) -> dict[str, Any]:
    """Marks the experts of a model for DeepSpeed; every rank must call it, because it creates process groups.

    Args:
        model: the module that DeepSpeed gets.
        names: this rank's parameters -> their names.
        groups: this rank's coordinates and process groups.

    Returns:
        Further keys of a parameter group of experts.
    """
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups as deepspeed_groups

    class ExpertMarker(MoE):  # type: ignore[misc]
        """An empty layer, by which DeepSpeed learns that the model has experts."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = 1

        def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
            """Does nothing: the groups exist already."""

    # Different experts are on the tensor-parallel ranks, too: together they are neighbors.
    size = groups.grid.tensor_parallel_size * groups.experts.size
    name = f"ep_size_{size}"
    deepspeed_groups._create_expert_and_data_parallel(size, pp_size=groups.grid.pipeline_parallel_size)
    for parameter, of in names.items():
        if is_expert_parameter(of):
            parameter.allreduce, parameter.group_name = False, name  # type: ignore[attr-defined]
    model.add_module("expert_marker", ExpertMarker())
    return {"moe": True, "name": name}
