"""Hugging Face's config.json and our `ModelShape`: which architecture a shape has there, and the way back.

In: a shape, or a configuration as a dict. Out: the other. What one side cannot say is refused with the key's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_patch.errors import CheckpointError, ConfigError
from megatron_patch.model.shape import ModelShape, check_shape


@dataclass(frozen=True)
class Architecture:
    """A kind of model that transformers knows.

    Args:
        name: of its class with a head.
        model_type: its short name.
        norm_epsilon: where a configuration does not say.
        positions: where a configuration does not say.
    """

    name: str
    model_type: str
    norm_epsilon: float
    positions: int


LLAMA = Architecture("LlamaForCausalLM", "llama", 1e-6, 2048)
QWEN2 = Architecture("Qwen2ForCausalLM", "qwen2", 1e-6, 32768)
QWEN3 = Architecture("Qwen3ForCausalLM", "qwen3", 1e-6, 32768)
GPT2 = Architecture("GPT2LMHeadModel", "gpt2", 1e-5, 1024)
ARCHITECTURES = {architecture.name: architecture for architecture in (LLAMA, QWEN2, QWEN3, GPT2)}
Ids = int | list[int] | None
"""A special token: one id, several of which each counts, or none."""
_GELU = ("gelu_new", "gelu_pytorch_tanh")


def architecture_of(shape: ModelShape) -> Architecture:
    """The architecture that computes what a shape computes.

    Raises:
        ConfigError: there is none.
    """
    if shape.normalization == "LayerNorm":
        found: dict[str, Any] = {
            "activation": (shape.activation, "gelu"),
            "positions": (shape.position_embedding, "learned"),
            "biases of queries, keys and values": (shape.qkv_bias, True),
            "bias of the attention's output": (shape.attention_bias, True),
            "biases of the feed-forward layer": (shape.mlp_bias, True),
            "query groups": (shape.num_query_groups, shape.num_attention_heads),
            "size of all heads": (shape.num_attention_heads * shape.head_size, shape.hidden_size),
            "norm of queries and keys": (shape.qk_norm, False),
        }
        _require(GPT2, found)
        return GPT2
    if shape.qk_norm:
        architecture, attention_bias, mlp_bias = QWEN3, shape.qkv_bias, False
    elif shape.qkv_bias and not shape.attention_bias:
        architecture, attention_bias, mlp_bias = QWEN2, False, False
    else:
        architecture, attention_bias, mlp_bias = LLAMA, shape.qkv_bias, shape.mlp_bias
    found = {
        "activation": (shape.activation, "swiglu"),
        "positions": (shape.position_embedding, "rope"),
        "bias of the attention's output": (shape.attention_bias, attention_bias),
        "biases of the feed-forward layer": (shape.mlp_bias, mlp_bias),
    }
    _require(architecture, found)
    return architecture


def _require(architecture: Architecture, found: Mapping[str, tuple[Any, Any]]) -> None:
    for what, (value, needed) in found.items():
        if value != needed:
            raise ConfigError(
                f"a model with {what}: {value}; {architecture.name}, the nearest architecture, has {needed}",
                "the shapes of " + ", ".join(ARCHITECTURES),
                "no export is possible for this model",
            )


def config_of(shape: ModelShape, dtype: str, bos_id: Ids, eos_id: Ids) -> dict[str, Any]:
    """The config.json of a shape, with the keys that both old and new versions of transformers read.

    Args:
        shape: the model's shape.
        dtype: torch's name of the weights' dtype.
        bos_id: id that begins a text, where there is one.
        eos_id: id that ends a text, where there is one.

    Raises:
        ConfigError: no architecture has this shape.
    """
    architecture = architecture_of(shape)
    config: dict[str, Any] = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "vocab_size": shape.vocab_size,
        "initializer_range": shape.init_std,
        "tie_word_embeddings": shape.tie_embeddings,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if architecture is GPT2:
        return config | {
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
    config |= {
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
        "rope_scaling": _rope_scaling(shape),
        "attention_dropout": 0.0,
    }
    if architecture is QWEN3:
        return config | {"attention_bias": shape.qkv_bias, "use_sliding_window": False}
    if architecture is QWEN2:
        return config | {"use_sliding_window": False}
    return config | {"attention_bias": shape.qkv_bias, "mlp_bias": shape.mlp_bias}


def _rope_scaling(shape: ModelShape) -> dict[str, Any] | None:
    if shape.rotary_scaling == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": shape.rotary_scaling, "factor": shape.rotary_factor}
    if shape.rotary_scaling == "llama3":
        scaling |= {
            "low_freq_factor": shape.rotary_low_frequency_factor,
            "high_freq_factor": shape.rotary_high_frequency_factor,
            "original_max_position_embeddings": shape.rotary_original_positions,
        }
    return scaling


def special_ids(config: Mapping[str, Any], vocab_size: int) -> dict[str, Ids]:
    """What a configuration says begins and ends a text, as far as these are ids of the model."""

    def is_id(value: Any) -> bool:
        return type(value) is int and 0 <= value < vocab_size

    found = {key: config.get(key) for key in ("bos_token_id", "eos_token_id")}
    return {key: ids for key, ids in found.items() if is_id(ids) or (isinstance(ids, list) and ids and all(map(is_id, ids)))}


class _Config:
    """A configuration whose missing and impossible keys are told by name."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values, self._where = values, where

    def number(self, key: str, default: int | None = None) -> int:
        value = self._values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{self._where}: {key} is {value!r}", "a whole number from 1", "take the model's own config.json")
        return value

    def real(self, key: str, default: float) -> float:
        value = self._values.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise CheckpointError(f"{self._where}: {key} is {value!r}", "a number", "take the model's own config.json")
        return float(value)

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)

    def require(self, key: str, default: Any, allowed: tuple[Any, ...]) -> None:
        value = self._values.get(key, default)
        if value not in allowed:
            raise CheckpointError(
                f"{self._where}: {key} is {value!r}",
                " or ".join(repr(option) for option in allowed),
                "this model computes something that the program does not",
            )


def shape_of(config: Mapping[str, Any], where: str, divisible_by: int = 128) -> ModelShape:
    """The shape of a Hugging Face model.

    Args:
        config: its config.json.
        where: the file, for messages.
        divisible_by: the embedding's rows here are a multiple of this.

    Raises:
        CheckpointError: an unknown architecture, a missing key, a value that our model does not compute.
    """
    names = config.get("architectures") or []
    architecture = ARCHITECTURES.get(names[0]) if isinstance(names, list) and len(names) == 1 else None
    if architecture is None and not names:
        architecture = next((known for known in ARCHITECTURES.values() if known.model_type == config.get("model_type")), None)
    if architecture is None:
        raise CheckpointError(
            f"{where}: architecture {names or config.get('model_type')!r}",
            ", ".join(ARCHITECTURES),
            "convert a model of one of these kinds",
        )
    if config.get("quantization_config"):
        raise CheckpointError(f"{where}: the model is quantized", "weights in float32, bfloat16 or float16", "take the original weights")
    values = _Config(config, where)
    vocab = values.number("vocab_size")
    common: dict[str, Any] = {"vocab_size": vocab, "padded_vocab_size": -(-vocab // divisible_by) * divisible_by}
    init_std = values.real("initializer_range", 0.02)
    common["init_std"] = init_std if init_std > 0 else 0.02
    shape = _gpt2_shape(values, common) if architecture is GPT2 else _llama_shape(values, common, architecture)
    try:
        check_shape(shape)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error.what}", error.allowed) from error
    return shape


def _gpt2_shape(values: _Config, common: dict[str, Any]) -> ModelShape:
    values.require("activation_function", "gelu_new", _GELU)
    values.require("scale_attn_weights", True, (True,))
    values.require("scale_attn_by_inverse_layer_idx", False, (False,))
    values.require("add_cross_attention", False, (False,))
    hidden, heads = values.number("n_embd"), values.number("n_head")
    return ModelShape(
        num_layers=values.number("n_layer"),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        head_size=hidden // heads,
        ffn_hidden_size=values.number("n_inner", 4 * hidden),
        max_positions=values.number("n_positions", GPT2.positions),
        normalization="LayerNorm",
        norm_epsilon=values.real("layer_norm_epsilon", GPT2.norm_epsilon),
        activation="gelu",
        position_embedding="learned",
        attention_bias=True,
        qkv_bias=True,
        mlp_bias=True,
        tie_embeddings=bool(values.get("tie_word_embeddings", True)),
        **common,
    )


def _llama_shape(values: _Config, common: dict[str, Any], architecture: Architecture) -> ModelShape:
    values.require("hidden_act", "silu", ("silu", "swish"))
    values.require("use_sliding_window", False, (False, None))
    values.require("partial_rotary_factor", 1.0, (1.0, None))
    hidden, heads = values.number("hidden_size"), values.number("num_attention_heads")
    bias = bool(values.get("attention_bias", False))
    return ModelShape(
        num_layers=values.number("num_hidden_layers"),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=values.number("num_key_value_heads", heads),
        head_size=values.number("head_dim", 128 if architecture is QWEN3 else hidden // heads),
        ffn_hidden_size=values.number("intermediate_size"),
        max_positions=values.number("max_position_embeddings", architecture.positions),
        norm_epsilon=values.real("rms_norm_eps", architecture.norm_epsilon),
        qk_norm=architecture is QWEN3,
        attention_bias=bias and architecture is not QWEN2,
        qkv_bias=bias or architecture is QWEN2,
        mlp_bias=architecture is LLAMA and bool(values.get("mlp_bias", False)),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        **_rotary(values),
        **common,
    )


def _rotary(values: _Config) -> dict[str, Any]:
    """Base and scaling, from `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(given, dict):
        given = {"rope_type": given}
    rope = _Config({"rope_type": given.get("type", "default"), "rope_theta": values.get("rope_theta", 10000.0), **given}, "rope_parameters")
    rope.require("rope_type", "default", ("default", "linear", "llama3"))
    rope.require("partial_rotary_factor", 1.0, (1.0, None))
    result: dict[str, Any] = {"rotary_base": rope.real("rope_theta", 10000.0)}
    kind = rope.get("rope_type")
    if kind == "default":
        return result
    result |= {"rotary_scaling": kind, "rotary_factor": rope.real("factor", 0.0)}
    if kind == "llama3":
        result |= {
            "rotary_low_frequency_factor": rope.real("low_freq_factor", 0.0),
            "rotary_high_frequency_factor": rope.real("high_freq_factor", 0.0),
            "rotary_original_positions": rope.number("original_max_position_embeddings"),
        }
    return result
