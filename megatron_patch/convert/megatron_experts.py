"""The experts of a checkpoint of Megatron-LM: their shape from its arguments, and a tensor for each expert in place of one for all.

In: arguments, or tensors by the names of Megatron-Core. Out: `ExpertShape`; the tensors by the names of its `SequentialMLP`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_patch.config.layer_patterns import dense_blocks
from megatron_patch.config.options import ExpertOptions
from megatron_patch.convert.config_reader import ConfigReader
from megatron_patch.errors import CheckpointError, ConfigError
from megatron_patch.model.expert_shape import ExpertShape
from megatron_patch.model.shape import ModelShape

_DO = "import a checkpoint that Megatron-LM saved"
_REFUSED: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
    ("expert_model_parallel_size", 1, (1, None)),
    ("expert_tensor_parallel_size", 1, (1, None)),
    ("moe_router_score_function", "softmax", ("softmax", "sigmoid")),
    ("moe_router_num_groups", None, (None, 1)),
    ("moe_expert_capacity_factor", None, (None,)),
    ("moe_apply_probs_on_input", False, (False, None)),
    ("moe_shared_expert_gate", False, (False, None)),
)


def experts_of_arguments(arguments: Mapping[str, Any], where: str, layers: int, ffn_hidden_size: int) -> ExpertShape | None:
    """Returns the shape of the experts, from the arguments that Megatron-LM stores in a checkpoint; None: there are none.

    Args:
        arguments: the arguments by name.
        where: the file, for messages.
        layers: blocks of the model.
        ffn_hidden_size: width of the feed-forward layer of a block without experts.

    Raises:
        CheckpointError: a value that the model does not support.
    """
    if arguments.get("num_experts") in (None, False):
        return None
    values = ConfigReader(arguments, where, _DO)
    for name, default, allowed in _REFUSED:
        values.require(name, default, allowed)
    name = "moe_router_load_balancing_type"
    balancing = arguments.get(name, "aux_loss")
    for kind in balancing if isinstance(balancing, list | tuple) else [balancing]:
        ConfigReader({name: kind}, where, _DO).require(name, "aux_loss", ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"))
    score, top_k = arguments.get("moe_router_score_function", "softmax"), values.number("moe_router_topk", 2)
    shared = arguments.get("moe_shared_expert_intermediate_size")
    frequency = arguments.get("moe_layer_freq", 1)
    text = f"[{','.join(map(str, frequency))}]" if isinstance(frequency, list | tuple) else str(frequency)
    try:
        dense = dense_blocks(ExpertOptions(moe_layer_freq=text), layers)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error.what}", error.allowed, _DO) from error
    scaling = arguments.get("moe_router_topk_scaling_factor")
    return ExpertShape(
        count=values.number("num_experts"),
        top_k=top_k,
        ffn_hidden_size=values.number("moe_ffn_hidden_size", ffn_hidden_size),
        shared_ffn_hidden_size=0 if shared is None else values.number("moe_shared_expert_intermediate_size"),
        score=score,
        # Megatron divides sigmoids by their sum, but not that of a single expert.
        renormalized=top_k > 1 if score == "sigmoid" else not values.flag("moe_router_pre_softmax", False),
        scaling=1.0 if scaling is None else values.real("moe_router_topk_scaling_factor", 1.0, above_zero=True),
        bias=values.flag("moe_router_enable_expert_bias", False),
        dense_layers=dense,
    )


def each_expert(found: Mapping[str, torch.Tensor], shape: ModelShape, where: str) -> dict[str, torch.Tensor]:
    """Returns tensors in which those of all experts of `GroupedMLP`, stored as [inputs, outputs], are one tensor for each expert.

    Args:
        found: the tensors by name.
        shape: the model's shape.
        where: the file, for messages.

    Raises:
        CheckpointError: such a tensor has another size.
    """
    result: dict[str, torch.Tensor] = {}
    for name, tensor in found.items():
        module, _, kind = name.rpartition(".")
        if not module.endswith(".mlp.experts") or kind not in ("weight1", "weight2") or shape.experts is None:
            result[name] = tensor
            continue
        experts, hidden = shape.experts, shape.hidden_size
        inner = experts.ffn_hidden_size
        matrix = (hidden, 2 * inner) if kind == "weight1" else (inner, hidden)
        if tensor.numel() != experts.count * matrix[0] * matrix[1]:
            raise CheckpointError(
                f"{where}: tensor {name} has shape {tuple(tensor.shape)}",
                f"{experts.count} experts of {matrix[0]} x {matrix[1]}, by its arguments",
                "use arguments and weights of one checkpoint",
            )
        for expert, part in enumerate(tensor.reshape(experts.count, *matrix)):
            result[f"{module}.local_experts.{expert}.linear_fc{kind[-1]}.weight"] = part.t()
    return result
