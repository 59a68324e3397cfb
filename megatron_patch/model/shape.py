"""The model's shape as plain numbers (no torch), and the checks that it can be built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_patch.errors import ConfigError


@dataclass(frozen=True)
class ModelShape:
    """Everything that decides which parameters a model has and how they are used.

    Args:
        num_layers: transformer blocks.
        hidden_size: H, width of the residual stream.
        num_attention_heads: query heads.
        num_query_groups: key-value heads.
        head_size: width of a head.
        ffn_hidden_size: width of the feed-forward layer.
        vocab_size: V, token ids are below it.
        padded_vocab_size: rows of the embedding; those from V on are never read nor predicted.
        max_positions: longest sequence of positions.
        normalization: kind of normalisation.
        norm_epsilon: added to the mean square or variance.
        activation: "swiglu" (gated) or "gelu" (tanh form).
        position_embedding: rotary or learned.
        rotary_base: base of the rotary frequencies.
        rotary_scaling: how the frequencies are lowered for longer contexts: not at all, all by one factor, or the slow ones (Llama 3).
        rotary_factor: by how much.
        rotary_low_frequency_factor: Llama 3: waves longer than `rotary_original_positions` over this are scaled whole.
        rotary_high_frequency_factor: Llama 3: waves shorter than `rotary_original_positions` over this are left alone.
        rotary_original_positions: Llama 3: the context that the frequencies were made for.
        qk_norm: RMSNorm of each head's queries and keys before the rotation (Qwen3).
        attention_bias: bias of the attention's output projection.
        qkv_bias: biases of the query, key and value projections.
        mlp_bias: biases of the feed-forward layer.
        tie_embeddings: the head is the embedding's transpose.
        init_std: standard deviation of initial weights.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_size: int
    ffn_hidden_size: int
    vocab_size: int
    padded_vocab_size: int
    max_positions: int
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    norm_epsilon: float = 1e-5
    activation: Literal["swiglu", "gelu"] = "swiglu"
    position_embedding: Literal["rope", "learned"] = "rope"
    rotary_base: float = 10000.0
    rotary_scaling: Literal["none", "linear", "llama3"] = "none"
    rotary_factor: float = 1.0
    rotary_low_frequency_factor: float = 1.0
    rotary_high_frequency_factor: float = 4.0
    rotary_original_positions: int = 8192
    qk_norm: bool = False
    attention_bias: bool = False
    qkv_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    init_std: float = 0.02


def check_shape(shape: ModelShape) -> None:
    """Refuses shapes that cannot be built.

    Raises:
        ConfigError: naming the flags.
    """
    for name in (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "head_size",
        "ffn_hidden_size",
        "vocab_size",
        "max_positions",
    ):
        if getattr(shape, name) < 1:
            raise ConfigError(f"{name} = {getattr(shape, name)}", "whole numbers from 1")
    if shape.num_attention_heads % shape.num_query_groups:
        raise ConfigError(
            f"{shape.num_attention_heads} attention heads in {shape.num_query_groups} query groups",
            "a number of heads that --num-query-groups divides",
            "change --num-query-groups",
        )
    if shape.position_embedding == "rope" and shape.head_size % 2:
        raise ConfigError(f"heads of {shape.head_size} with rotary positions", "an even head size", "change --kv-channels or --hidden-size")
    if shape.padded_vocab_size < shape.vocab_size:
        raise ConfigError(f"{shape.padded_vocab_size} embedding rows for {shape.vocab_size} ids", "at least as many rows as ids")
    if shape.norm_epsilon <= 0 or shape.init_std <= 0 or shape.rotary_base <= 0:
        raise ConfigError("--norm-epsilon, --init-method-std or --rotary-base is not above zero", "numbers above zero")
    _check_rotary_scaling(shape)


def _check_rotary_scaling(shape: ModelShape) -> None:
    if shape.rotary_scaling == "none":
        if shape.rotary_factor != 1.0:
            raise ConfigError(
                f"--rope-scaling-factor {shape.rotary_factor} without --rope-scaling", "linear or llama3", "give --rope-scaling"
            )
        return
    if shape.position_embedding != "rope":
        raise ConfigError(f"--rope-scaling {shape.rotary_scaling} with learned positions", "rotary positions", "remove the flag")
    if shape.rotary_factor < 1.0:
        raise ConfigError(f"--rope-scaling-factor {shape.rotary_factor}", "numbers from 1")
    low, high = shape.rotary_low_frequency_factor, shape.rotary_high_frequency_factor
    if shape.rotary_scaling == "llama3" and (not 0 < low < high or shape.rotary_original_positions < 1):
        raise ConfigError(
            f"--rope-low-freq-factor {low}, --rope-high-freq-factor {high}, --rope-original-positions {shape.rotary_original_positions}",
            "a low factor above 0 and below the high one, positions from 1",
        )
