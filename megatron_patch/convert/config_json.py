"""The keys of a Hugging Face config.json: reading them with checks, and the two schemas of the built-in architectures.

In: a configuration as a dict, or a `ModelShape`. Out: the shape's fields, or the configuration's keys. The functions of Llama's schema also
serve architectures that are registered from outside and differ from it by a few keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_patch.errors import CheckpointError
from megatron_patch.model.shape import ModelShape

_LARGEST_COUNT = 1_000_000_000
_LARGEST_REAL = 1e30


def _shown(value: Any) -> str:
    """Returns a value as text for a message, without the end of a long one."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


class ConfigReader:
    """Reads a configuration's keys and reports missing and unsupported ones by name.

    Args:
        values: the configuration.
        where: the file, for messages.
        do: what to do about a value that cannot be used.
    """

    def __init__(self, values: Mapping[str, Any], where: str, do: str = "use the model's original config.json") -> None:
        self._values, self.where, self._do = values, where, do

    def number(self, key: str, default: int | None = None) -> int:
        """Returns a whole number from 1 to a billion; a missing or null key gives the default.

        Raises:
            CheckpointError: the value is something else, or the key is missing and has no default.
        """
        value = self._values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST_COUNT:
            raise self._refusal(key, value, f"a whole number from 1 to {_LARGEST_COUNT:,}")
        return value

    def real(self, key: str, default: float) -> float:
        """Returns a number as a float; a missing key gives the default.

        Raises:
            CheckpointError: the value is not a finite number.
        """
        value = self._values.get(key, default)
        # Compared, not converted: an integer may be too large for a float.
        if not isinstance(value, int | float) or isinstance(value, bool) or not -_LARGEST_REAL <= value <= _LARGEST_REAL:
            raise self._refusal(key, value, f"a number of at most {_LARGEST_REAL:g} in size")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Returns true or false; a missing or null key gives the default.

        Raises:
            CheckpointError: the value is something else.
        """
        value = self._values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self._refusal(key, value, "true or false")
        return value

    def _refusal(self, key: str, value: Any, allowed: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} is {_shown(value)}", allowed, self._do)

    def get(self, key: str, default: Any = None) -> Any:
        """Returns a value as it is; a missing key gives the default."""
        return self._values.get(key, default)

    def require(self, key: str, default: Any, allowed: tuple[Any, ...]) -> None:
        """Checks that a key has one of the values that the model supports.

        Args:
            key: the key.
            default: the value that transformers uses where the key is missing.
            allowed: the supported values.

        Raises:
            CheckpointError: the value is another one.
        """
        value = self._values.get(key, default)
        if value not in allowed:
            raise CheckpointError(
                f"{self.where}: {key} is {_shown(value)}, which megatron_patch does not implement",
                " or ".join(repr(option) for option in allowed),
                "convert another model",
            )


def read_llama(values: ConfigReader, norm_epsilon: float = 1e-6, positions: int = 2048, head_size: int | None = None) -> dict[str, Any]:
    """Returns the shape's fields from a configuration in Llama's schema, without biases other than `attention_bias`.

    Args:
        values: the configuration.
        norm_epsilon: the value where `rms_norm_eps` is missing.
        positions: the value where `max_position_embeddings` is missing.
        head_size: the value where `head_dim` is missing; None: hidden size / heads.

    Raises:
        CheckpointError: a missing key, or a value that the model does not support.
    """
    values.require("hidden_act", "silu", ("silu", "swish"))
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
        **_read_rotary(values),
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
        "rope_scaling": _write_rotary_scaling(shape),
        "attention_dropout": 0.0,
    }


def _read_rotary(values: ConfigReader) -> dict[str, Any]:
    """The rotary base and scaling, from `rope_parameters` or from the older `rope_theta` and `rope_scaling`."""
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(given, dict):
        given = {"rope_type": given}
    merged = {"rope_type": given.get("type", "default"), "rope_theta": values.get("rope_theta", 10000.0), **given}
    rope = ConfigReader(merged, f"{values.where}: rope_parameters")
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


def _write_rotary_scaling(shape: ModelShape) -> dict[str, Any] | None:
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
