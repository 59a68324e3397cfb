"""The rotary positions of a Hugging Face config.json: bases and scaling, for all layers alike or for those with and without a window.

In: a configuration, or a `ModelShape`. Out: the shape's fields, or the configuration's keys.
"""

from __future__ import annotations

import math
from typing import Any

from megatron_patch.convert.config_reader import ConfigReader, shown_value
from megatron_patch.errors import CheckpointError
from megatron_patch.model.shape import ModelShape

FULL_LAYERS, SLIDING_LAYERS = "full_attention", "sliding_attention"
"""The names of the two kinds of layers in `layer_types` and `rope_parameters`."""


def read_rotary(values: ConfigReader, base: float, positions: int) -> dict[str, Any]:
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


def read_rotary_by_kind(
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
        or not all(isinstance(nested.get(kind) or {}, dict) for kind in (FULL_LAYERS, SLIDING_LAYERS))
        or "rope_type" in nested
    ):
        raise CheckpointError(
            f"{values.where}: rope_parameters is {shown_value(nested)}",
            f"an object with {FULL_LAYERS} and {SLIDING_LAYERS}, or rope_theta and rope_scaling",
            "use the model's original config.json",
        )
    scaling = values.get("rope_scaling") or {}
    full = {**scaling, **(nested.get(FULL_LAYERS) or {})} if isinstance(scaling, dict) else scaling
    found = _read_frequencies(values, f"rope_parameters {FULL_LAYERS}", values.get("rope_theta", base), full, base, positions)
    if not windows:
        return found
    sliding = nested.get(SLIDING_LAYERS) or {}
    windowed = _read_frequencies(
        values, f"rope_parameters {SLIDING_LAYERS}", values.get(windowed_key, windowed_base), sliding, windowed_base, positions
    )
    if windowed == found:
        return found
    values.part(f"rope_parameters {SLIDING_LAYERS}", sliding).require("rope_type", "default", ("default",))
    return {**found, "windowed_rotary_base": windowed["rotary_base"]}


def write_rotary_by_kind(shape: ModelShape) -> dict[str, Any]:
    """Returns the key `rope_parameters` with values for layers with and without a window; the inverse of `read_rotary_by_kind`."""
    full = {"rope_theta": shape.rotary_base, **(write_rotary_scaling(shape) or {"rope_type": "default"})}
    plain = {"rope_theta": shape.windowed_rotary_base, "rope_type": "default"}
    return {"rope_parameters": {FULL_LAYERS: full, SLIDING_LAYERS: full if shape.windowed_rotary_base is None else plain}}


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


def write_rotary_scaling(shape: ModelShape) -> dict[str, Any] | None:
    """Returns the value of `rope_scaling`, or None without scaling."""
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
