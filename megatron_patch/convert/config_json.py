"""The keys of a Hugging Face config.json: reading them with checks, and the two schemas of the built-in architectures.

In: a configuration as a dict, or a `ModelShape`. Out: the shape's fields, or the configuration's keys. The functions of Llama's schema also
serve architectures that are registered from outside and differ from it by a few keys.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from megatron_patch.errors import CheckpointError
from megatron_patch.model.shape import ModelShape

_LARGEST_COUNT = 1_000_000_000
_LARGEST_REAL = 1e30
MOST_LAYERS = 10_000
"""Largest number of layers for each of which something is read."""


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
        found: collects the errors of all keys, so that they are reported together; a key with an error then gives a value with which the
            others can still be read. None: the first error is raised.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str,
        do: str = "use the model's original config.json",
        found: list[CheckpointError] | None = None,
    ) -> None:
        self._values, self.where, self._do, self._found = values, where, do, found
        self._refused: set[str] = set()

    def number(self, key: str, default: int | None = None, least: int = 1) -> int:
        """Returns a whole number from `least` to a billion; a missing or null key gives the default.

        Raises:
            CheckpointError: the value is something else, or the key is missing and has no default.
        """
        value = self._values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _LARGEST_COUNT:
            self._refuse(key, value, f"a whole number from {least} to {_LARGEST_COUNT:,}")
            return max(least, 1) if default is None else default
        return value

    def real(self, key: str, default: float, above_zero: bool = False) -> float:
        """Returns a number as a float; a missing key gives the default.

        Raises:
            CheckpointError: the value is not a finite number, or not above zero where it must be.
        """
        value = self._values.get(key, default)
        # Compared, not converted: an integer may be too large for a float.
        if not isinstance(value, int | float) or isinstance(value, bool) or not -_LARGEST_REAL <= value <= _LARGEST_REAL:
            self._refuse(key, value, f"a number of at most {_LARGEST_REAL:g} in size")
            return default
        if above_zero and value <= 0:
            self._refuse(key, value, "a number above 0")
            return default
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Returns true or false; a missing or null key gives the default.

        Raises:
            CheckpointError: the value is something else.
        """
        value = self._values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            self._refuse(key, value, "true or false")
            return default
        return value

    def per_layer(self, key: str, layers: int, allowed: tuple[Any, ...], longer: bool = False) -> list[Any] | None:
        """Returns a list with a value for each layer, or None where the key is missing or null.

        Args:
            key: the key.
            layers: number of layers.
            allowed: the supported values.
            longer: whether the list may be longer; what is too much is left out.

        Raises:
            CheckpointError: the value is no list of this length, or has other values.
        """
        value = self._values.get(key)
        if value is None or "num_hidden_layers" in self._refused:
            return None
        fits = isinstance(value, list) and (len(value) == layers or (longer and len(value) > layers))
        if not fits or not all(type(item) is type(allowed[0]) and item in allowed for item in value[:layers]):
            self._refuse(key, value, f"a list with {' or '.join(map(repr, allowed))} for each of {layers} layers")
            return None
        found: list[Any] = value[:layers]
        return found

    def without(self, *keys: str) -> ConfigReader:
        """Returns a reader of the same configuration in which these keys are missing."""
        return ConfigReader({key: value for key, value in self._values.items() if key not in keys}, self.where, self._do, self._found)

    def part(self, key: str, values: Mapping[str, Any]) -> ConfigReader:
        """Returns a reader of the values under a key."""
        return ConfigReader(values, f"{self.where}: {key}", self._do, self._found)

    def _refuse(self, key: str, value: Any, allowed: str) -> None:
        self._report(CheckpointError(f"{self.where}: {key} is {_shown(value)}", allowed, self._do), key)

    def _report(self, error: CheckpointError, key: str) -> None:
        self._refused.add(key)
        if self._found is None:
            raise error
        self._found.append(error)

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
            error = CheckpointError(
                f"{self.where}: {key} is {_shown(value)}, which megatron_patch does not implement",
                " or ".join(repr(option) for option in allowed),
                "convert another model",
            )
            self._report(error, key)


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
        **_read_rotary(values, rotary_base, values.number("max_position_embeddings", positions)),
    }


_FULL, _SLIDING = "full_attention", "sliding_attention"


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
    kinds = values.per_layer("layer_types", layers, (_FULL, _SLIDING))
    window = None
    if values.flag("use_sliding_window", False) and values.get("sliding_window", default) is not None:
        window = values.number("sliding_window", default)
    if window is None:
        if kinds is not None and _SLIDING in kinds:
            values.require("layer_types", None, ([_FULL] * layers,))
        return {}
    if kinds is None and without_rotation is not None:
        full = tuple(layer for layer in range(layers) if layer not in without_rotation)
    elif kinds is None:
        full = tuple(range(min(values.number("max_window_layers", 28, least=0), layers)))
    else:
        full = tuple(layer for layer in range(layers) if kinds[layer] == _FULL)
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
        "layer_types": [_FULL if layer in shape.full_layers else _SLIDING for layer in range(shape.num_layers)],
    }


def read_mistral(values: ConfigReader) -> dict[str, Any]:
    """Returns the shape's fields from a configuration of Mistral, whose layers all have the window or none.

    Raises:
        CheckpointError: a missing key, or a value that the model does not support.
    """
    layers = values.number("num_hidden_layers")
    check_layers(values, layers)
    window = None if values.get("sliding_window", 4096) is None else values.number("sliding_window", 4096)
    values.per_layer("layer_types", layers, (_FULL if window is None else _SLIDING,))
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
    return {**found, **windows, **_read_rotary_by_kind(values, 500000.0, "rope_theta", 500000.0, bool(windows))}


def write_olmo3(shape: ModelShape) -> dict[str, Any]:
    """Returns the keys of a shape in Olmo 3's schema."""
    return {**write_olmo2(shape), **_write_layer_types(shape), **_write_rotary_by_kind(shape)}


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
        **_read_rotary(values, 10000.0, values.number("max_position_embeddings", 8192)),
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
        **_read_rotary_by_kind(values, 1e6, "rope_local_base_freq", 1e4, bool(windows), positions=131072),
        "logit_softcap": _read_softcap(values, "final_logit_softcapping", None),
        "qk_norm": True,
    }


def write_gemma3(shape: ModelShape) -> dict[str, Any]:
    """Returns the keys of a shape in Gemma 3's schema."""
    local = {} if shape.windowed_rotary_base is None else {"rope_local_base_freq": shape.windowed_rotary_base}
    return {**_write_gemma(shape), **_write_rotary_by_kind(shape), **local}


def _read_alternating_windows(values: ConfigReader, every: int) -> dict[str, Any]:
    """The windows of an architecture in which layers without one are given by `layer_types`, or else are every N-th layer."""
    layers = values.number("num_hidden_layers")
    check_layers(values, layers)
    kinds = values.per_layer("layer_types", layers, (_FULL, _SLIDING))
    if kinds is None:
        kinds = [_SLIDING if (layer + 1) % every else _FULL for layer in range(layers)]
    if _SLIDING not in kinds:
        return {}
    if values.get("sliding_window", 4096) is None:
        raise CheckpointError(
            f"{values.where}: sliding_window is None, but layers have a window",
            "a number of positions, or layer_types with full_attention in all layers",
            "use the model's original config.json",
        )
    full = tuple(layer for layer in range(layers) if kinds[layer] == _FULL)
    return {"window": values.number("sliding_window", 4096), "full_layers": full}


def _write_layer_types(shape: ModelShape) -> dict[str, Any]:
    return {
        # transformers makes a mask for windows even if no layer has one.
        "sliding_window": 4096 if shape.window is None else shape.window,
        "layer_types": [_FULL if shape.window_of(layer) is None else _SLIDING for layer in range(shape.num_layers)],
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
        "rope_scaling": _write_rotary_scaling(shape),
        "attention_dropout": 0.0,
    }


def _read_rotary(values: ConfigReader, base: float, positions: int) -> dict[str, Any]:
    """The rotary base and scaling, from `rope_parameters` or from the older `rope_theta` and `rope_scaling`.

    Args:
        values: the configuration.
        base: the rotary base where it is missing.
        positions: the length of the context, for YaRN without its original one.
    """
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    return _read_frequencies(values, "rope_parameters", values.get("rope_theta", base), given, base, positions)


def _read_frequencies(values: ConfigReader, key: str, theta: Any, given: Any, base: float, positions: int) -> dict[str, Any]:
    """The rotary base and scaling of some layers.

    Args:
        values: the configuration.
        key: the key of `given`, for messages.
        theta: the base where `given` has none.
        given: the values under this key.
        base: the base where `theta` is missing.
        positions: the length of the context, for YaRN without its original one.
    """
    if not isinstance(given, dict):
        given = {"rope_type": given}
    merged = {"rope_type": given.get("type", "default"), "rope_theta": theta, **given}
    rope = values.part(key, merged)
    rope.require("rope_type", "default", ("default", "linear", "llama3", "yarn"))
    rope.require("partial_rotary_factor", 1.0, (1.0, None))
    result: dict[str, Any] = {"rotary_base": rope.real("rope_theta", base)}
    kind = rope.get("rope_type")
    if kind not in ("linear", "llama3", "yarn"):
        return result
    if kind == "yarn":
        return result | _read_yarn(rope, positions)
    result |= {"rotary_scaling": kind, "rotary_factor": rope.real("factor", 0.0)}
    if kind == "llama3":
        result |= {
            "rotary_low_frequency_factor": rope.real("low_freq_factor", 0.0),
            "rotary_high_frequency_factor": rope.real("high_freq_factor", 0.0),
            "rotary_original_positions": rope.number("original_max_position_embeddings"),
        }
    return result


def _read_rotary_by_kind(
    values: ConfigReader, base: float, windowed_key: str, windowed_base: float, windows: bool, positions: int = 2048
) -> dict[str, Any]:
    """The rotary bases and scaling of layers with and without a window (Olmo 3, Gemma 3).

    Args:
        values: the configuration. Newer ones have `rope_parameters` with values for each kind; older ones `rope_theta` and `rope_scaling`
            for layers without a window, and `windowed_key` for those with one, which are not scaled.
        base: the rotary base of the former where it is missing.
        windowed_key: the older key of the base of the latter.
        windowed_base: that base where it is missing.
        windows: whether there are layers with a window.
        positions: length of the context where it is missing.
    """
    positions = values.number("max_position_embeddings", positions)
    nested = values.get("rope_parameters") or {}
    if (
        not isinstance(nested, dict)
        or not all(isinstance(nested.get(kind) or {}, dict) for kind in (_FULL, _SLIDING))
        or "rope_type" in nested
    ):
        raise CheckpointError(
            f"{values.where}: rope_parameters is {_shown(nested)}",
            f"an object with {_FULL} and {_SLIDING}, or rope_theta and rope_scaling",
            "use the model's original config.json",
        )
    scaling = values.get("rope_scaling") or {}
    full = {**scaling, **(nested.get(_FULL) or {})} if isinstance(scaling, dict) else scaling
    found = _read_frequencies(values, f"rope_parameters {_FULL}", values.get("rope_theta", base), full, base, positions)
    if not windows:
        return found
    sliding = nested.get(_SLIDING) or {}
    windowed = _read_frequencies(
        values, f"rope_parameters {_SLIDING}", values.get(windowed_key, windowed_base), sliding, windowed_base, positions
    )
    if windowed == found:
        return found
    values.part(f"rope_parameters {_SLIDING}", sliding).require("rope_type", "default", ("default",))
    return {**found, "windowed_rotary_base": windowed["rotary_base"]}


def _write_rotary_by_kind(shape: ModelShape) -> dict[str, Any]:
    full = {"rope_theta": shape.rotary_base, **(_write_rotary_scaling(shape) or {"rope_type": "default"})}
    plain = {"rope_theta": shape.windowed_rotary_base, "rope_type": "default"}
    return {"rope_parameters": {_FULL: full, _SLIDING: full if shape.windowed_rotary_base is None else plain}}


def _read_yarn(rope: ConfigReader, positions: int) -> dict[str, Any]:
    """The values of YaRN, with those that transformers takes where a key is missing or null."""
    rope.require("truncate", True, (True, None))
    original = rope.number("original_max_position_embeddings", positions)
    factor = positions / original if rope.get("factor") is None else rope.real("factor", 0.0)

    def default_factor(mscale: float = 1.0) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    given = None
    if rope.get("attention_factor") is not None:
        given = rope.real("attention_factor", 1.0)
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        whole, part = default_factor(rope.real("mscale", 1.0)), default_factor(rope.real("mscale_all_dim", 1.0))
        if part == 0:
            rope.require("mscale_all_dim", 1.0, (1.0, 0.0))
        given = whole / part
    return {
        "rotary_scaling": "yarn",
        "rotary_factor": factor,
        "rotary_original_positions": original,
        "rotary_beta_fast": rope.real("beta_fast", 32.0) if rope.get("beta_fast") else 32.0,
        "rotary_beta_slow": rope.real("beta_slow", 1.0) if rope.get("beta_slow") else 1.0,
        "rotary_attention_factor": None if given == default_factor() else given,
    }


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
    if shape.rotary_scaling == "yarn":
        scaling["original_max_position_embeddings"] = shape.rotary_original_positions
        if (shape.rotary_beta_fast, shape.rotary_beta_slow) != (32.0, 1.0):
            scaling |= {"beta_fast": shape.rotary_beta_fast, "beta_slow": shape.rotary_beta_slow}
        if shape.rotary_attention_factor is not None:
            scaling["attention_factor"] = shape.rotary_attention_factor
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
