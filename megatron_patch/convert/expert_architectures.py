"""The built-in architectures of transformers with experts.

In: nothing. Out: `QWEN3_MOE`, `MIXTRAL`, `OLMOE` and `DOTS1`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_patch.convert.architecture import LLAMA_LAYERS, Architecture, any_windows, of_experts
from megatron_patch.convert.expert_json import (
    read_dots1,
    read_mixtral,
    read_olmoe,
    read_qwen3_moe,
    write_dots1,
    write_mixtral,
    write_olmoe,
    write_qwen3_moe,
)
from megatron_patch.convert.tensor_names import EXPERT_NAMES, FUSED_EXPERT_NAMES, MIXTRAL_NAMES
from megatron_patch.model.shape import ModelShape

_EXPERT_LAYERS: Mapping[str, Any] = {
    **{field: value for field, value in LLAMA_LAYERS.items() if field != "experts"},
    "mlp_bias": False,
    "experts.score": "softmax",
    "experts.bias": False,
    "experts.shared_ffn_hidden_size": 0,
    "experts.scaling": 1.0,
    "experts.dense_layers": (),
}


QWEN3_MOE = Architecture(
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    "qwen3_moe",
    required=lambda shape: {
        **_EXPERT_LAYERS,
        "window": shape.window,
        "qk_norm": True,
        "attention_bias": shape.qkv_bias,
        "experts.dense_layers": of_experts(shape, "dense_layers"),
    },
    read_config=read_qwen3_moe,
    write_config=write_qwen3_moe,
    tensors=EXPERT_NAMES,
    also_reads=(FUSED_EXPERT_NAMES,),
)
MIXTRAL = Architecture(
    "MixtralForCausalLM",
    "mixtral",
    "mixtral",
    required=lambda shape: {
        **_EXPERT_LAYERS,
        "window": shape.window,
        "qkv_bias": False,
        "attention_bias": False,
        "experts.renormalized": True,
    },
    read_config=read_mixtral,
    write_config=write_mixtral,
    tensors=MIXTRAL_NAMES,
    also_reads=(FUSED_EXPERT_NAMES,),
)
OLMOE = Architecture(
    "OlmoeForCausalLM",
    "olmoe",
    "olmoe",
    required=lambda shape: {
        **_EXPERT_LAYERS,
        "qk_norm": True,
        "qk_norm_scope": "all",
        "attention_bias": shape.qkv_bias,
        "hidden_size": shape.num_attention_heads * shape.head_size,
    },
    read_config=read_olmoe,
    write_config=write_olmoe,
    tensors=EXPERT_NAMES,
    also_reads=(FUSED_EXPERT_NAMES,),
)


def _dots1_layers(shape: ModelShape) -> Mapping[str, Any]:
    """Returns what Dots1 requires: fields and their values."""
    width, shared, dense = 1, 0, 0
    if (experts := shape.experts) is not None:
        width, shared, dense = experts.ffn_hidden_size, experts.shared_ffn_hidden_size, len(experts.dense_layers)
    return {
        **_EXPERT_LAYERS,
        **any_windows(shape),
        "qk_norm": True,
        "attention_bias": shape.qkv_bias,
        "experts.score": "sigmoid",
        "experts.bias": of_experts(shape, "bias"),
        "experts.scaling": of_experts(shape, "scaling"),
        # Whole experts, at least one.
        "experts.shared_ffn_hidden_size": max(1, round(shared / width)) * width,
        "experts.dense_layers": tuple(range(dense)),
    }


DOTS1 = Architecture(
    "Dots1ForCausalLM",
    "dots1",
    "dots1",
    required=_dots1_layers,
    read_config=read_dots1,
    write_config=write_dots1,
    tensors=EXPERT_NAMES,
    also_reads=(FUSED_EXPERT_NAMES,),
    biased=True,
)
