"""The model's shape as plain numbers (no torch), and the check that it can be built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_patch.errors import ConfigError
from megatron_patch.model.expert_shape import ExpertShape, check_expert_shape


@dataclass(frozen=True)
class ModelShape:
    """The architecture of a model: everything that determines its parameters and their use.

    Args:
        num_layers: transformer blocks.
        hidden_size: H, width of the residual stream.
        num_attention_heads: query heads.
        num_query_groups: key-value heads.
        head_size: width of a head.
        ffn_hidden_size: width of the feed-forward layer.
        vocab_size: V, number of token ids.
        padded_vocab_size: rows of the embedding and the head; those from V on are padding, which is never read or predicted.
        max_positions: largest number of positions of a sample.
        normalization: kind of norm.
        norm_epsilon: added to the mean square or variance.
        zero_centered_norms: weights of norms are stored minus 1 (Gemma); RMSNorm only.
        activation: "swiglu" or "geglu" (gated), or "gelu"; GELU in its tanh form.
        position_embedding: rotary or learned absolute positions.
        rotary_base: base of the rotary frequencies.
        rotary_scaling: how the frequencies are divided for longer contexts: none, "linear" (all frequencies), "llama3" and "yarn" (the low
            ones).
        rotary_factor: the divisor.
        rotary_low_frequency_factor: llama3: wavelengths longer than `rotary_original_positions` / this are scaled by the full factor.
        rotary_high_frequency_factor: llama3: wavelengths shorter than `rotary_original_positions` / this are not scaled.
        rotary_original_positions: llama3 and yarn: the context length before scaling.
        rotary_beta_fast: yarn: frequencies with more turns than this in the original context are not scaled.
        rotary_beta_slow: yarn: frequencies with fewer turns than this in the original context are scaled by the full factor.
        rotary_attention_factor: yarn: factor of the rotated queries and keys; None: 1 + 0.1 ln(factor).
        window: positions that a position attends to at most: itself and those before it; None: all up to itself.
        full_layers: numbers, from 0, of the blocks without a window, in ascending order; empty without `window`.
        unrotated_layers: numbers, from 0, of the blocks whose queries and keys are not rotated, in ascending order.
        windowed_rotary_base: base of the rotary frequencies of the blocks with a window, which are then not scaled (Olmo 3, Gemma 3);
            None: those of all blocks are the same.
        norm_placement: "pre": attention and feed-forward layer read the normalized residual stream; "post": they read the residual stream,
            and what they return is normalized before it is added (OLMo 2); "both" (Gemma).
        qk_norm: RMSNorm of queries and keys before the rotation.
        qk_norm_scope: with `qk_norm`: of each "head" (Qwen3), or over the width of "all" heads together (OLMo 2).
        query_scalar: scores of attention are divided by the root of this; None: of the head size.
        attention_softcap: c of the scores of attention, which are c·tanh(score / c) before the mask (Gemma 2); None: they are not capped.
        logit_softcap: the same of the head's logits; None: they are not capped.
        scaled_embeddings: whether word embeddings are multiplied by √H, rounded to the dtype of their weights (Gemma).
        attention_bias: bias of the attention's output projection.
        qkv_bias: biases of the query, key and value projections.
        mlp_bias: biases of the feed-forward layer.
        tie_embeddings: whether the head uses the embedding's weight.
        init_std: standard deviation of initial weights.
        experts: the experts of blocks that have them in place of one feed-forward layer; None: no block has any.
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
    zero_centered_norms: bool = False
    activation: Literal["swiglu", "geglu", "gelu"] = "swiglu"
    position_embedding: Literal["rope", "learned"] = "rope"
    rotary_base: float = 10000.0
    rotary_scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    rotary_factor: float = 1.0
    rotary_low_frequency_factor: float = 1.0
    rotary_high_frequency_factor: float = 4.0
    rotary_original_positions: int = 8192
    rotary_beta_fast: float = 32.0
    rotary_beta_slow: float = 1.0
    rotary_attention_factor: float | None = None
    window: int | None = None
    full_layers: tuple[int, ...] = ()
    unrotated_layers: tuple[int, ...] = ()
    windowed_rotary_base: float | None = None
    norm_placement: Literal["pre", "post", "both"] = "pre"
    qk_norm: bool = False
    qk_norm_scope: Literal["head", "all"] = "head"
    query_scalar: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    scaled_embeddings: bool = False
    attention_bias: bool = False
    qkv_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    init_std: float = 0.02
    experts: ExpertShape | None = None

    @property
    def norms_before(self) -> bool:
        """Whether a block normalizes what attention and feed-forward layer read."""
        return self.norm_placement != "post"

    @property
    def norms_after(self) -> bool:
        """Whether a block normalizes what attention and feed-forward layer return."""
        return self.norm_placement != "pre"

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer has a gate."""
        return self.activation != "gelu"

    @property
    def learned_positions(self) -> int | None:
        """Number of learned positions; None: positions are rotary."""
        return self.max_positions if self.position_embedding == "learned" else None

    def window_of(self, layer: int) -> int | None:
        """Returns the window of a block, numbered from 0, in positions; None: it has none."""
        return None if layer in self.full_layers else self.window

    def experts_of(self, layer: int) -> ExpertShape | None:
        """Returns the experts of a block, numbered from 0; None: it has an ordinary feed-forward layer."""
        return None if self.experts is None or layer in self.experts.dense_layers else self.experts

    def expert_layers(self, layers: range) -> int:
        """Returns how many of these layers are blocks with experts: 0 is the embedding, 1 to `num_layers` are the blocks."""
        return sum(self.experts_of(layer - 1) is not None for layer in layers if 1 <= layer <= self.num_layers)

    @property
    def windowed_layers(self) -> int:
        """Number of the blocks with a window."""
        return 0 if self.window is None else self.num_layers - len(self.full_layers)


def default_ffn_hidden_size(hidden_size: int, gated: bool) -> int:
    """Returns the width of the feed-forward layer that is not given: 8/3 of H, rounded up to a multiple of 256, or 4 H for GELU."""
    return -(-8 * hidden_size // 768) * 256 if gated else 4 * hidden_size


def check_shape(shape: ModelShape) -> None:
    """Checks that a model of this shape can be built.

    Raises:
        ConfigError: it cannot; the error names the flags.
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
            raise ConfigError(f"{name} is {getattr(shape, name)}", "whole numbers from 1", "give another value")
    if shape.num_attention_heads % shape.num_query_groups:
        raise ConfigError(
            f"--num-attention-heads {shape.num_attention_heads} is not a multiple of --num-query-groups {shape.num_query_groups}",
            "query groups that divide the number of heads",
            "change --num-query-groups",
        )
    if shape.position_embedding == "rope" and shape.head_size % 2:
        raise ConfigError(
            f"a head size of {shape.head_size} with rotary positions", "even head sizes", "change --kv-channels or --hidden-size"
        )
    if shape.padded_vocab_size < shape.vocab_size:
        raise ConfigError(
            f"{shape.padded_vocab_size} embedding rows for {shape.vocab_size} token ids", "at least 1 row for each id", "add padding rows"
        )
    if shape.norm_epsilon <= 0 or shape.init_std <= 0 or shape.rotary_base <= 0:
        raise ConfigError(
            f"--norm-epsilon {shape.norm_epsilon}, --init-method-std {shape.init_std}, --rotary-base {shape.rotary_base}",
            "numbers above 0",
            "change the one that is not",
        )
    _check_norms_and_caps(shape)
    _check_layers(shape)
    _check_rotary_scaling(shape)
    if shape.experts is not None:
        check_expert_shape(shape.experts, shape.num_layers)
        if not shape.gated or shape.mlp_bias:
            raise ConfigError(
                "--num-experts with GELU or with biases",
                "--swiglu or --geglu, and --disable-bias-linear: experts are gated and have no biases",
                "change the one that is not so",
            )


def _check_norms_and_caps(shape: ModelShape) -> None:
    if shape.zero_centered_norms and (shape.normalization != "RMSNorm" or shape.qk_norm_scope != "head"):
        raise ConfigError(
            "--zero-centered-norms with LayerNorm, or with --qk-norm-scope all",
            "--normalization RMSNorm and --qk-norm-scope head",
            "remove --zero-centered-norms, or change the other one",
        )
    for flag, value in (
        ("--query-pre-attn-scalar", shape.query_scalar),
        ("--attn-logit-softcapping", shape.attention_softcap),
        ("--final-logit-softcapping", shape.logit_softcap),
    ):
        if value is not None and value <= 0:
            raise ConfigError(f"{flag} {value}", "numbers above 0", "give another value, or leave it out")


def _check_layers(shape: ModelShape) -> None:
    if shape.window is not None and shape.window < 1:
        raise ConfigError(f"a window of {shape.window} positions", "at least 1 position", "give another --window-size")
    if shape.unrotated_layers and shape.position_embedding != "rope":
        raise ConfigError("--no-rope-freq with learned positions", "rotary positions", "remove --no-rope-freq")
    if shape.windowed_rotary_base is not None:
        if shape.window is None or shape.position_embedding != "rope":
            raise ConfigError(
                f"--windowed-rotary-base {shape.windowed_rotary_base} in a model without blocks that have a window and rotary positions",
                "--windowed-rotary-base together with --window-size and rotary positions",
                "give --window-size, or remove --windowed-rotary-base",
            )
        if shape.windowed_rotary_base <= 0:
            raise ConfigError(f"--windowed-rotary-base {shape.windowed_rotary_base}", "numbers above 0", "give another base")
    if shape.qk_norm_scope != "head" and not shape.qk_norm:
        raise ConfigError(
            "--qk-norm-scope all without --qk-layernorm",
            "--qk-norm-scope all with --qk-layernorm",
            "give --qk-layernorm, or remove the scope",
        )
    if shape.full_layers and (shape.window is None or len(shape.full_layers) >= shape.num_layers):
        raise ConfigError("blocks without a window in a model in which no block has one", "no such blocks", "leave the window out")
    for name in ("full_layers", "unrotated_layers"):
        layers = getattr(shape, name)
        if list(layers) != sorted(set(layers)) or not all(0 <= layer < shape.num_layers for layer in layers):
            raise ConfigError(f"{name} is {layers}", f"blocks from 0 to {shape.num_layers - 1}, in ascending order", "give other blocks")


def _check_rotary_scaling(shape: ModelShape) -> None:
    if shape.rotary_scaling == "none":
        if shape.rotary_factor != 1.0:
            raise ConfigError(
                f"--rope-scaling-factor {shape.rotary_factor} without --rope-scaling", "linear, llama3 or yarn", "give --rope-scaling"
            )
        return
    if shape.position_embedding != "rope":
        raise ConfigError(f"--rope-scaling {shape.rotary_scaling} with learned positions", "rotary positions", "remove --rope-scaling")
    if shape.rotary_factor < 1.0:
        raise ConfigError(f"--rope-scaling-factor {shape.rotary_factor}", "numbers from 1", "give a larger factor")
    low, high = shape.rotary_low_frequency_factor, shape.rotary_high_frequency_factor
    if shape.rotary_scaling == "llama3" and (not 0 < low < high or shape.rotary_original_positions < 1):
        raise ConfigError(
            f"--rope-low-freq-factor {low}, --rope-high-freq-factor {high}, --rope-original-positions {shape.rotary_original_positions}",
            "a low factor above 0 and below the high factor, and at least 1 original position",
            "use the values of the model's config.json",
        )
    fast, slow = shape.rotary_beta_fast, shape.rotary_beta_slow
    if shape.rotary_scaling == "yarn" and (not 0 < slow < fast or shape.rotary_original_positions < 1 or shape.rotary_base <= 1):
        raise ConfigError(
            f"--rope-beta-fast {fast}, --rope-beta-slow {slow}, --rope-original-positions {shape.rotary_original_positions}, "
            f"--rotary-base {shape.rotary_base}",
            "a slow beta above 0 and below the fast one, at least 1 original position, and a base above 1",
            "use the values of the model's config.json",
        )
    if shape.rotary_attention_factor is not None and (shape.rotary_scaling != "yarn" or shape.rotary_attention_factor <= 0):
        raise ConfigError(
            f"--rope-attention-factor {shape.rotary_attention_factor} with --rope-scaling {shape.rotary_scaling}",
            "numbers above 0, with --rope-scaling yarn",
            "remove --rope-attention-factor, or give --rope-scaling yarn",
        )
