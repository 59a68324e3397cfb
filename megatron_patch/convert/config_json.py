"""The keys of a Hugging Face config.json in the schemas of the built-in architectures.

In: a configuration as a dict, or a `ModelShape`. Out: the shape's fields, or the configuration's keys. The functions of Llama's schema also
serve architectures that are registered from outside and differ from it by a few keys.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from megatron_patch.convert.config_reader import ConfigReader
from megatron_patch.convert.rotary_json import (
    FULL_LAYERS,
    SLIDING_LAYERS,
    read_rotary,
    read_rotary_by_kind,
    write_rotary_by_kind,
    write_rotary_scaling,
)
from megatron_patch.errors import CheckpointError
from megatron_patch.model.shape import ModelShape

MOST_LAYERS = 10_000
"""Largest number of layers for each of which something is read."""


def read_llama(
    values: ConfigReader,
    norm_epsilon: float = 1e-6,
    positions: int = 2048,
    head_size: int | None = None,
    windows: bool = False,
    rotary_base: float = 10000.0,
) -> dict[str, Any]:
    """Returns the shape's fields from a configuration in Llama's schema, without biases other than `attention_bias` and without windows.

    Args:
        values: the configuration.
        norm_epsilon: the value where `rms_norm_eps` is missing.
        positions: the value where `max_position_embeddings` is missing.
        head_size: the value where `head_dim` is missing; None: hidden size / heads.
        windows: whether the architecture has windows, which `read_windows` reads; False: they are refused.
        rotary_base: the value where `rope_theta` is missing.

    Raises:
        CheckpointError: a missing key, or a value that the model does not support.
    """
    values.require("hidden_act", "silu", ("silu", "swish"))
    if not windows:
        values.require("use_sliding_window", False, (False, None))
    values.require("partial_rotary_factor", 1.0, (1.0, None))
    hidden, heads = values.number("hidden_size"), values.number("num_attention_heads")
    bias = values.flag("attention_bias", False)
    return {
        "num_layers": values.number("num_hidden_layers"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": values.number("num_key_value_heads", heads),
        "head_size": values.number("head_dim", head_size or hidden // heads),
        "ffn_hidden_size": values.number("intermediate_size"),
        "max_positions": values.number("max_position_embeddings", positions),
        "norm_epsilon": values.real("rms_norm_eps", norm_epsilon),
        "attention_bias": bias,
        "qkv_bias": bias,
        "tie_embeddings": values.flag("tie_word_embeddings", False),
        **read_rotary(values, rotary_base, values.number("max_position_embeddings", positions)),
    }


def read_windows(values: ConfigReader, default: int | None = 4096, without_rotation: Collection[int] | None = None) -> dict[str, Any]:
    """Returns the shape's fields of windows, from `use_sliding_window`, `sliding_window`, `layer_types` and `max_window_layers`.

    Args:
        values: the configuration.
        default: the window where `sliding_window` is missing; None: no window.
        without_rotation: the layers that have a window where `layer_types` is missing (SmolLM3); None: those from `max_window_layers` on.

    Raises:
        CheckpointError: a value that the architecture does not have, or layers with a window whose length is not given.
    """
    layers = values.number("num_hidden_layers")
    check_layers(values, layers)
    kinds = values.per_layer("layer_types", layers, (FULL_LAYERS, SLIDING_LAYERS))
    window = None
    if values.flag("use_sliding_window", False) and values.get("sliding_window", default) is not None:
        window = values.number("sliding_window", default)
    if window is None:
        if kinds is not None and SLIDING_LAYERS in kinds:
            values.require("layer_types", None, ([FULL_LAYERS] * layers,))
        return {}
    if kinds is None and without_rotation is not None:
        full = tuple(layer for layer in range(layers) if layer not in without_rotation)
    elif kinds is None:
        full = tuple(range(min(values.number("max_window_layers", 28, least=0), layers)))
    else:
        full = tuple(layer for layer in range(layers) if kinds[layer] == FULL_LAYERS)
    return {"window": window, "full_layers": full} if len(full) < layers else {}


def check_layers(values: ConfigReader, layers: int, key: str = "num_hidden_layers") -> None:
    """Checks that a number of layers is not absurdly large, before something is made for each of them.

    Raises:
        CheckpointError: it is.
    """
    if layers > MOST_LAYERS:
        raise CheckpointError(
            f"{values.where}: {key} is {layers}", f"whole numbers up to {MOST_LAYERS:,}", "use the model's original config.json"
        )


def write_windows(shape: ModelShape) -> dict[str, Any]:
    """Returns the keys of a shape's windows, for Qwen2, Qwen3 and SmolLM3."""
    if shape.window is None:
        return {"use_sliding_window": False}
    first = next((layer for layer in range(shape.num_layers) if layer not in shape.full_layers), shape.num_layers)
    return {
        "use_sliding_window": True,
        "sliding_window": shape.window,
        # Older versions of transformers read this one; it says the same if only the first layers have no window.
        "max_window_layers": first,
        "layer_types": [FULL_LAYERS if layer in shape.full_layers else SLIDING_LAYERS for layer in range(shape.num_layers)],
    }


def read_mistral(values: ConfigReader) -> dict[str, Any]:
    """Returns the shape's fields from a configuration of Mistral, whose layers all have the window or none.

    Raises:
        CheckpointError: a missing key, or a value that the model does not support.
    """
    layers = values.number("num_hidden_layers")
    check_layers(values, layers)
    window = None if values.get("sliding_window", 4096) is None else values.number("sliding_window", 4096)
    values.per_layer("layer_types", layers, (FULL_LAYERS if window is None else SLIDING_LAYERS,))
    return {
        **read_llama(values, positions=131072),
        "num_query_groups": values.number("num_key_value_heads", 8),
        "window": window,
        "attention_bias": False,
        "qkv_bias": False,
    }


def read_olmo2(values: ConfigReader) -> dict[str, Any]:
    """Returns the shape's fields from a configuration of OLMo 2.

    Raises:
        CheckpointError: a missing key, or a value that the model does not support.
    """
    return {**read_llama(values, norm_epsilon=1e-5), "norm_placement": "post", "qk_norm": True, "qk_norm_scope": "all"}


def write_olmo2(shape: ModelShape) -> dict[str, Any]:
    """Returns the keys of a shape in OLMo 2's schema."""
    # The default of the padding token is an id of the published vocabulary.
    return {**write_llama(shape), "attention_bias": shape.qkv_bias, "pad_token_id": None}


def read_olmo3(values: ConfigReader) -> dict[str, Any]:
    """Returns the shape's fields from a configuration of Olmo 3: OLMo 2 with windows in most layers, which are not scaled.

    Raises:
        CheckpointError: a missing key, or a value that the model does not support.
    """
    found = read_olmo2(values.without("rope_parameters", "rope_scaling"))
    windows = _read_alternating_windows(values, every=4)
    if windows and not values.get("rope_parameters"):
        # In layers with a window, older versions of transformers take another value, newer ones take this one.
        values.require("rope_theta", 500000.0, (500000.0,))
    return {**found, **windows, **read_rotary_by_kind(values, 500000.0, "rope_theta", 500000.0, bool(windows))}


def write_olmo3(shape: ModelShape) -> dict[str, Any]:
    """Returns the keys of a shape in Olmo 3's schema."""
    return {**write_olmo2(shape), **_write_layer_types(shape), **write_rotary_by_kind(shape)}


def _read_gemma(values: ConfigReader, positions: int) -> dict[str, Any]:
    """The fields that Gemma 2 and 3 have in common, without rotary frequencies and windows."""
    values.require("hidden_activation", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",))
    values.require("use_bidirectional_attention", False, (False, None))
    # Older files have a hidden_act that transformers does not read.
    found = read_llama(values.without("hidden_act", "rope_parameters", "rope_scaling"), positions=positions, head_size=256)
    scalar = values.real("query_pre_attn_scalar", 256, above_zero=True)
    return {
        **found,
        "num_query_groups": values.number("num_key_value_heads", 4),
        "norm_placement": "both",
        "zero_centered_norms": True,
        "activation": "geglu",
        "query_scalar": None if scalar == found["head_size"] else scalar,
        "scaled_embeddings": True,
        "tie_embeddings": values.flag("tie_word_embeddings", True),
    }


def _read_softcap(values: ConfigReader, key: str, default: float | None) -> float | None:
    """A soft cap; null: none."""
    return None if values.get(key, default) is None else values.real(key, default or 1.0, above_zero=True)


def _write_gemma(shape: ModelShape) -> dict[str, Any]:
    scalar = shape.head_size if shape.query_scalar is None else shape.query_scalar
    return {
        **{key: value for key, value in write_llama(shape).items() if key != "hidden_act"},
        **_write_layer_types(shape),
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": shape.qkv_bias,
        # transformers takes whole numbers only.
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "attn_logit_softcapping": shape.attention_softcap,
        "final_logit_softcapping": shape.logit_softcap,
        "pad_token_id": None,
    }


def read_gemma2(values: ConfigReader) -> dict[str, Any]:
    """Returns the shape's fields from a configuration of Gemma 2.

    Raises:
        CheckpointError: a missing key, or a value that the model does not support.
    """
    return {
        **_read_gemma(values, positions=8192),
        **_read_alternating_windows(values, every=2),
        **read_rotary(values, 10000.0, values.number("max_position_embeddings", 8192)),
        "attention_softcap": _read_softcap(values, "attn_logit_softcapping", 50.0),
        "logit_softcap": _read_softcap(values, "final_logit_softcapping", 30.0),
    }


def write_gemma2(shape: ModelShape) -> dict[str, Any]:
    """Returns the keys of a shape in Gemma 2's schema."""
    return _write_gemma(shape)


def read_gemma3(values: ConfigReader) -> dict[str, Any]:
    """Returns the shape's fields from a configuration of Gemma 3's language model.

    Raises:
        CheckpointError: a missing key, or a value that the model does not support.
    """
    # transformers reads it, and does not compute it.
    values.require("attn_logit_softcapping", None, (None,))
    windows = _read_alternating_windows(values, every=values.number("sliding_window_pattern", 6))
    return {
        **_read_gemma(values, positions=131072),
        **windows,
        **read_rotary_by_kind(values, 1e6, "rope_local_base_freq", 1e4, bool(windows), positions=131072),
        "logit_softcap": _read_softcap(values, "final_logit_softcapping", None),
        "qk_norm": True,
    }


def write_gemma3(shape: ModelShape) -> dict[str, Any]:
    """Returns the keys of a shape in Gemma 3's schema."""
    local = {} if shape.windowed_rotary_base is None else {"rope_local_base_freq": shape.windowed_rotary_base}
    return {**_write_gemma(shape), **write_rotary_by_kind(shape), **local}


def _read_alternating_windows(values: ConfigReader, every: int) -> dict[str, Any]:
    """The windows of an architecture in which layers without one are given by `layer_types`, or else are every N-th layer."""
    layers = values.number("num_hidden_layers")
    check_layers(values, layers)
    kinds = values.per_layer("layer_types", layers, (FULL_LAYERS, SLIDING_LAYERS))
    if kinds is None:
        kinds = [SLIDING_LAYERS if (layer + 1) % every else FULL_LAYERS for layer in range(layers)]
    if SLIDING_LAYERS not in kinds:
        return {}
    if values.get("sliding_window", 4096) is None:
        raise CheckpointError(
            f"{values.where}: sliding_window is None, but layers have a window",
            "a number of positions, or layer_types with full_attention in all layers",
            "use the model's original config.json",
        )
    full = tuple(layer for layer in range(layers) if kinds[layer] == FULL_LAYERS)
    return {"window": values.number("sliding_window", 4096), "full_layers": full}


def _write_layer_types(shape: ModelShape) -> dict[str, Any]:
    return {
        # transformers makes a mask for windows even if no layer has one.
        "sliding_window": 4096 if shape.window is None else shape.window,
        "layer_types": [FULL_LAYERS if shape.window_of(layer) is None else SLIDING_LAYERS for layer in range(shape.num_layers)],
    }


def read_smollm3(values: ConfigReader) -> dict[str, Any]:
    """Returns the shape's fields from a configuration of SmolLM3, some of whose layers have no rotation.

    Raises:
        CheckpointError: a missing key, or a value that the model does not support.
    """
    layers = values.number("num_hidden_layers")
    check_layers(values, layers)
    rotated = values.per_layer("no_rope_layers", layers, (1, 0), longer=True)
    if rotated is None:
        every = values.number("no_rope_layer_interval", 4)
        rotated = [int((layer + 1) % every != 0) for layer in range(layers)]
    unrotated = tuple(layer for layer in range(layers) if not rotated[layer])
    return {
        **read_llama(values, positions=32768, windows=True, rotary_base=2e6),
        **read_windows(values, None, unrotated),
        "num_query_groups": values.number("num_key_value_heads", 4),
        "unrotated_layers": unrotated,
        "mlp_bias": values.flag("mlp_bias", False),
        "tie_embeddings": values.flag("tie_word_embeddings", True),
    }


def write_smollm3(shape: ModelShape) -> dict[str, Any]:
    """Returns the keys of a shape in SmolLM3's schema; in its list a 1 is a layer with rotation."""
    return {
        **write_llama(shape),
        **write_windows(shape),
        "no_rope_layers": [int(layer not in shape.unrotated_layers) for layer in range(shape.num_layers)],
        "attention_bias": shape.qkv_bias,
        "mlp_bias": shape.mlp_bias,
        # The default is an id of the published vocabulary.
        "pad_token_id": None,
    }


def write_llama(shape: ModelShape) -> dict[str, Any]:
    """Returns the keys of a shape in Llama's schema, without `attention_bias` and `mlp_bias`."""
    return {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rotary_base,
        "rope_scaling": write_rotary_scaling(shape),
        "attention_dropout": 0.0,
    }


def read_gpt2(values: ConfigReader) -> dict[str, Any]:
    """Returns the shape's fields from a configuration in GPT-2's schema.

    Raises:
        CheckpointError: a missing key, or a value that the model does not support.
    """
    values.require("activation_function", "gelu_new", ("gelu_new", "gelu_pytorch_tanh"))
    values.require("scale_attn_weights", True, (True,))
    values.require("scale_attn_by_inverse_layer_idx", False, (False,))
    values.require("add_cross_attention", False, (False,))
    hidden, heads = values.number("n_embd"), values.number("n_head")
    return {
        "num_layers": values.number("n_layer"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "head_size": hidden // heads,
        "ffn_hidden_size": values.number("n_inner", 4 * hidden),
        "max_positions": values.number("n_positions", 1024),
        "normalization": "LayerNorm",
        "norm_epsilon": values.real("layer_norm_epsilon", 1e-5),
        "activation": "gelu",
        "position_embedding": "learned",
        "attention_bias": True,
        "qkv_bias": True,
        "mlp_bias": True,
        "tie_embeddings": values.flag("tie_word_embeddings", True),
    }


def write_gpt2(shape: ModelShape) -> dict[str, Any]:
    """Returns the keys of a shape in GPT-2's schema."""
    return {
        "n_positions": shape.max_positions,
        "n_embd": shape.hidden_size,
        "n_layer": shape.num_layers,
        "n_head": shape.num_attention_heads,
        "n_inner": shape.ffn_hidden_size,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": shape.norm_epsilon,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
