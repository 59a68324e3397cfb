"""Model families: the presets that `--model-family` chooses from (no torch).

A family gives the model options their defaults; each option can still be given by its own flag. A further family is registered by name,
before the command line is read: `FAMILIES["mine"] = Family(qk_norm=True)`. Its conversion from and to Hugging Face is an
`Architecture` of `megatron_patch.convert.architectures`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_patch.model.shape import ModelShape
from megatron_patch.utils.registry import lookup


@dataclass(frozen=True)
class Family:
    """Defaults of the model options; the fields are those of `ModelShape`.

    Args:
        normalization: default of --normalization.
        norm_epsilon: default of --norm-epsilon.
        swiglu: default of --swiglu: a gated feed-forward layer with SiLU, or else GELU in its tanh form.
        position_embedding: default of --position-embedding-type: rotary, or learned absolute positions.
        no_rope_freq: default of --no-rope-freq as a number: every N-th block has no rotation; None: all have.
        norm_placement: default of --norm-placement.
        zero_centered_norms: default of --zero-centered-norms.
        geglu: default of --geglu, where neither --swiglu nor --no-swiglu is given: a gated feed-forward layer with GELU.
        scaled_embeddings: default of --scale-embeddings.
        attention_softcap: default of --attn-logit-softcapping; None: scores are not capped.
        logit_softcap: default of --final-logit-softcapping; None: logits are not capped.
        qk_norm: default of --qk-layernorm.
        qk_norm_scope: default of --qk-norm-scope, where queries and keys are normalized.
        linear_bias: biases in all linear layers of a block; the opposite of the default of --disable-bias-linear.
        qkv_bias: default of --add-qkv-bias: biases in the query, key and value projections, even without `linear_bias`.
        tie_embeddings: the output head is the embedding's transpose; the opposite of --untie-embeddings-and-output-weights.
        experts: a family of mixtures of experts, which needs --num-experts; all other options of experts are given by their flags.
    """

    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    norm_epsilon: float = 1e-5
    swiglu: bool = True
    position_embedding: Literal["rope", "learned"] = "rope"
    no_rope_freq: int | None = None
    norm_placement: Literal["pre", "post", "both"] = "pre"
    zero_centered_norms: bool = False
    geglu: bool = False
    scaled_embeddings: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    qk_norm: bool = False
    qk_norm_scope: Literal["head", "all"] = "head"
    linear_bias: bool = False
    qkv_bias: bool = False
    tie_embeddings: bool = False
    experts: bool = False


_GEMMA: dict[str, Any] = {
    "norm_epsilon": 1e-6,
    "norm_placement": "both",
    "zero_centered_norms": True,
    "swiglu": False,
    "geglu": True,
    "scaled_embeddings": True,
    "tie_embeddings": True,
}
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "qwen3": Family(norm_epsilon=1e-6, qk_norm=True),
    "mistral": Family(),
    "smollm3": Family(norm_epsilon=1e-6, no_rope_freq=4, tie_embeddings=True),
    "olmo2": Family(norm_placement="post", qk_norm=True, qk_norm_scope="all"),
    "olmo3": Family(norm_placement="post", qk_norm=True, qk_norm_scope="all"),
    "gemma2": Family(**_GEMMA, attention_softcap=50.0, logit_softcap=30.0),
    "gemma3": Family(**_GEMMA, qk_norm=True),
    "qwen3_moe": Family(norm_epsilon=1e-6, qk_norm=True, experts=True),
    "mixtral": Family(experts=True),
    "olmoe": Family(qk_norm=True, qk_norm_scope="all", experts=True),
    "dots1": Family(qk_norm=True, experts=True),
    "gpt2": Family(normalization="LayerNorm", swiglu=False, position_embedding="learned", linear_bias=True, tie_embeddings=True),
}
"""Name, as `--model-family` takes it -> the family. Open to further entries."""


def family_by_name(name: str) -> Family:
    """Returns a registered family.

    Raises:
        ConfigError: no family has this name; the error lists the registered names and suggests the nearest one.
    """
    return lookup(FAMILIES, name, "--model-family", home="megatron_patch.model.families.FAMILIES")


def family_of_shape(shape: ModelShape) -> str:
    """Returns the name of the first registered family with a shape's kinds of norm, activation, positions and layers, or of the nearest."""

    def differences(name: str) -> int:
        family = FAMILIES[name]
        return (
            (family.normalization != shape.normalization)
            + (family.swiglu != (shape.activation == "swiglu"))
            + (family.position_embedding != shape.position_embedding)
            + (family.geglu != (shape.activation == "geglu"))
            + (family.norm_placement != shape.norm_placement)
            + ((family.attention_softcap is None) != (shape.attention_softcap is None))
            + ((family.logit_softcap is None) != (shape.logit_softcap is None))
            + (family.qk_norm != shape.qk_norm)
            + (family.qk_norm_scope != shape.qk_norm_scope)
            + ((family.no_rope_freq is not None) != bool(shape.unrotated_layers))
            + (family.experts != (shape.experts is not None))
        )

    return min(FAMILIES, key=differences)
