"""The keys of experts in a Hugging Face config.json: Qwen3-MoE, Mixtral, OLMoE and Dots1.

In: a configuration as a dict, or a `ModelShape`. Out: the shape's fields, or the configuration's keys. transformers trains with the
auxiliary loss and the noise of the router that a configuration names; they do not change what a model computes and are kept for an export.
"""

from __future__ import annotations

from typing import Any

from megatron_patch.convert.config_json import check_layers, read_llama, write_llama
from megatron_patch.convert.config_reader import ConfigReader
from megatron_patch.convert.rotary_json import FULL_LAYERS, SLIDING_LAYERS
from megatron_patch.model.expert_shape import ExpertShape
from megatron_patch.model.shape import ModelShape


def _experts(shape: ModelShape) -> ExpertShape:
    assert shape.experts is not None
    return shape.experts


def _count(values: ConfigReader, key: str, other: str, default: int | None) -> int:
    """The number of experts; newer versions of transformers write `other`."""
    return values.number(key if values.get(key) is not None or values.get(other) is None else other, default)


def read_qwen3_moe(values: ConfigReader) -> dict[str, Any]:
    """Returns the shape's fields from a configuration of Qwen3-MoE.

    Raises:
        CheckpointError: a missing key, or a value that the model does not support.
    """
    layers = values.number("num_hidden_layers")
    check_layers(values, layers)
    step, without = values.number("decoder_sparse_step", 1), values.numbers("mlp_only_layers")
    windowed = values.flag("use_sliding_window", False) and values.get("sliding_window", 4096) is not None
    return {
        **read_llama(values, positions=32768, windows=True),
        "num_query_groups": values.number("num_key_value_heads", 4),
        "window": values.number("sliding_window", 4096) if windowed else None,
        "qk_norm": True,
        "experts": ExpertShape(
            count=_count(values, "num_experts", "num_local_experts", 128),
            top_k=values.number("num_experts_per_tok", 8),
            ffn_hidden_size=values.number("moe_intermediate_size", 768),
            renormalized=values.flag("norm_topk_prob", False),
            dense_layers=tuple(layer for layer in range(layers) if layer in without or (layer + 1) % step),
        ),
    }


def write_qwen3_moe(shape: ModelShape) -> dict[str, Any]:
    """Returns the keys of a shape in Qwen3-MoE's schema."""
    experts = _experts(shape)
    return {
        **write_llama(shape),
        "use_sliding_window": shape.window is not None,
        "sliding_window": shape.window,
        "attention_bias": shape.qkv_bias,
        "num_experts": experts.count,
        "num_experts_per_tok": experts.top_k,
        "moe_intermediate_size": experts.ffn_hidden_size,
        "norm_topk_prob": experts.renormalized,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(experts.dense_layers),
        "router_aux_loss_coef": 0.001,
    }


def read_mixtral(values: ConfigReader) -> dict[str, Any]:
    """Returns the shape's fields from a configuration of Mixtral, whose `intermediate_size` is the width of an expert.

    Raises:
        CheckpointError: a missing key, or a value that the model does not support.
    """
    return {
        **read_llama(values, norm_epsilon=1e-5, positions=131072, rotary_base=1e6),
        "num_query_groups": values.number("num_key_value_heads", 8),
        "window": None if values.get("sliding_window") is None else values.number("sliding_window"),
        "attention_bias": False,
        "qkv_bias": False,
        "experts": ExpertShape(
            count=_count(values, "num_local_experts", "num_experts", 8),
            top_k=values.number("num_experts_per_tok", 2),
            ffn_hidden_size=values.number("intermediate_size"),
        ),
    }


def write_mixtral(shape: ModelShape) -> dict[str, Any]:
    """Returns the keys of a shape in Mixtral's schema."""
    experts = _experts(shape)
    return {
        **write_llama(shape),
        "intermediate_size": experts.ffn_hidden_size,
        "sliding_window": shape.window,
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.top_k,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    }


def read_olmoe(values: ConfigReader) -> dict[str, Any]:
    """Returns the shape's fields from a configuration of OLMoE, whose `intermediate_size` is the width of an expert.

    Raises:
        CheckpointError: a missing key, or a value that the model does not support.
    """
    values.require("clip_qkv", None, (None,))
    return {
        **read_llama(values, norm_epsilon=1e-5, positions=4096),
        "qk_norm": True,
        "qk_norm_scope": "all",
        "experts": ExpertShape(
            count=_count(values, "num_experts", "num_local_experts", 64),
            top_k=values.number("num_experts_per_tok", 8),
            ffn_hidden_size=values.number("intermediate_size"),
            renormalized=values.flag("norm_topk_prob", False),
        ),
    }


def write_olmoe(shape: ModelShape) -> dict[str, Any]:
    """Returns the keys of a shape in OLMoE's schema."""
    experts = _experts(shape)
    return {
        **write_llama(shape),
        "intermediate_size": experts.ffn_hidden_size,
        "attention_bias": shape.qkv_bias,
        "clip_qkv": None,
        "num_experts": experts.count,
        "num_experts_per_tok": experts.top_k,
        "norm_topk_prob": experts.renormalized,
        "router_aux_loss_coef": 0.01,
        # The default is an id of the published vocabulary.
        "pad_token_id": None,
    }


def read_dots1(values: ConfigReader) -> dict[str, Any]:
    """Returns the shape's fields from a configuration of Dots1.

    Raises:
        CheckpointError: a missing key, or a value that the model does not support.
    """
    values.require("n_group", 1, (1, None))
    values.require("topk_group", 1, (1, None))
    values.require("scoring_func", "sigmoid", ("sigmoid", "noaux_tc"))
    values.require("topk_method", "noaux_tc", ("noaux_tc",))
    values.require("moe_layer_freq", 1, (1,))
    layers = values.number("num_hidden_layers")
    check_layers(values, layers)
    width = values.number("moe_intermediate_size", 1408)
    return {
        **read_llama(values, windows=True),
        "num_query_groups": values.number("num_key_value_heads", 32),
        "qk_norm": True,
        "experts": ExpertShape(
            count=_count(values, "n_routed_experts", "num_local_experts", None),
            top_k=values.number("num_experts_per_tok"),
            ffn_hidden_size=width,
            shared_ffn_hidden_size=width * values.number("n_shared_experts"),
            score="sigmoid",
            renormalized=values.flag("norm_topk_prob", False),
            scaling=values.real("routed_scaling_factor", 1.0, above_zero=True),
            bias=True,
            dense_layers=tuple(range(min(values.number("first_k_dense_replace", 0, least=0), layers))),
        ),
        **_read_dots1_windows(values, layers),
    }


def _read_dots1_windows(values: ConfigReader, layers: int) -> dict[str, Any]:
    """The windows of the layers that `layer_types` names, or else of those from `max_window_layers` on."""
    kinds = values.per_layer("layer_types", layers, (FULL_LAYERS, SLIDING_LAYERS))
    if values.get("sliding_window", 4096) is None:
        if kinds is not None and SLIDING_LAYERS in kinds:
            values.require("layer_types", None, ([FULL_LAYERS] * layers,))
        return {}
    if kinds is None:
        first = values.number("max_window_layers", 62, least=0)
        kinds = [FULL_LAYERS if layer < first else SLIDING_LAYERS for layer in range(layers)]
    full = tuple(layer for layer in range(layers) if kinds[layer] == FULL_LAYERS)
    return {"window": values.number("sliding_window", 4096), "full_layers": full} if len(full) < layers else {}


def write_dots1(shape: ModelShape) -> dict[str, Any]:
    """Returns the keys of a shape in Dots1's schema."""
    experts = _experts(shape)
    return {
        **write_llama(shape),
        "attention_bias": shape.qkv_bias,
        "sliding_window": shape.window,
        "max_window_layers": next((layer for layer in range(shape.num_layers) if shape.window_of(layer) is not None), shape.num_layers),
        "layer_types": [FULL_LAYERS if shape.window_of(layer) is None else SLIDING_LAYERS for layer in range(shape.num_layers)],
        "n_routed_experts": experts.count,
        "n_shared_experts": experts.shared_ffn_hidden_size // experts.ffn_hidden_size,
        "num_experts_per_tok": experts.top_k,
        "moe_intermediate_size": experts.ffn_hidden_size,
        "first_k_dense_replace": len(experts.dense_layers),
        "norm_topk_prob": experts.renormalized,
        "routed_scaling_factor": experts.scaling,
        # What vLLM reads, and transformers takes for granted.
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
    }
