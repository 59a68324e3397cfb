"""Builds the command line that continues training from an imported model."""

from __future__ import annotations

from megatron_patch.model.expert_shape import ExpertShape
from megatron_patch.model.families import FAMILIES, family_of_shape
from megatron_patch.model.shape import ModelShape


def training_flags(shape: ModelShape, family: str) -> list[str] | None:
    """Returns the model flags that give a shape, as words of a command line.

    Args:
        shape: the shape.
        family: the value of --model-family; where it is not registered, the registered one with the shape's kinds of layers is used.

    Returns:
        The words, or None if no combination of flags gives this shape: biases only in the attention layers, or sigmoids of experts that are
        not divided by their sum.
    """
    experts = shape.experts
    if shape.attention_bias != shape.mlp_bias or (experts is not None and experts.score == "sigmoid" and not experts.renormalized):
        return None
    family = family if family in FAMILIES else family_of_shape(shape)
    preset = FAMILIES[family]
    values: dict[str, object] = {
        "model-family": family,
        "num-layers": shape.num_layers,
        "hidden-size": shape.hidden_size,
        "num-attention-heads": shape.num_attention_heads,
        "num-query-groups": shape.num_query_groups,
        "kv-channels": shape.head_size,
        "ffn-hidden-size": shape.ffn_hidden_size,
        "vocab-size": shape.vocab_size,
        "norm-epsilon": shape.norm_epsilon,
        "untie-embeddings-and-output-weights": not shape.tie_embeddings,
    }
    if shape.padded_vocab_size % 128 or shape.padded_vocab_size - shape.vocab_size >= 128:
        values["make-vocab-size-divisible-by"] = shape.padded_vocab_size
    if shape.normalization != preset.normalization:
        values["normalization"] = shape.normalization
    if (shape.activation == "swiglu") != preset.swiglu:
        values["swiglu"] = shape.activation == "swiglu"
    if (shape.activation == "geglu") != preset.geglu:
        values["geglu"] = shape.activation == "geglu"
    if shape.zero_centered_norms != preset.zero_centered_norms:
        values["zero-centered-norms"] = shape.zero_centered_norms
    if shape.scaled_embeddings != preset.scaled_embeddings:
        values["scale-embeddings"] = shape.scaled_embeddings
    if shape.query_scalar is not None:
        values["query-pre-attn-scalar"] = shape.query_scalar
    if shape.attention_softcap != preset.attention_softcap:
        values["attn-logit-softcapping"] = shape.attention_softcap or 0
    if shape.logit_softcap != preset.logit_softcap:
        values["final-logit-softcapping"] = shape.logit_softcap or 0
    if shape.position_embedding != preset.position_embedding:
        values["position-embedding-type"] = "rope" if shape.position_embedding == "rope" else "learned_absolute"
    if shape.norm_placement != preset.norm_placement:
        values["norm-placement"] = shape.norm_placement
    if shape.qk_norm != preset.qk_norm:
        values["qk-layernorm"] = shape.qk_norm
    if shape.qk_norm and shape.qk_norm_scope != preset.qk_norm_scope:
        values["qk-norm-scope"] = shape.qk_norm_scope
    if shape.position_embedding == "learned":
        values["max-position-embeddings"] = shape.max_positions
    else:
        values["rotary-base"] = shape.rotary_base
    if shape.rotary_scaling != "none":
        values |= {"rope-scaling": shape.rotary_scaling, "rope-scaling-factor": shape.rotary_factor}
    if shape.rotary_scaling == "llama3":
        values |= {
            "rope-low-freq-factor": shape.rotary_low_frequency_factor,
            "rope-high-freq-factor": shape.rotary_high_frequency_factor,
            "rope-original-positions": shape.rotary_original_positions,
        }
    if shape.rotary_scaling == "yarn":
        values |= {
            "rope-original-positions": shape.rotary_original_positions,
            "rope-beta-fast": shape.rotary_beta_fast,
            "rope-beta-slow": shape.rotary_beta_slow,
        }
    if shape.rotary_attention_factor is not None:
        values["rope-attention-factor"] = shape.rotary_attention_factor
    if shape.window is not None:
        values["window-size"] = f"{shape.window - 1},0"
    if shape.windowed_rotary_base is not None:
        values["windowed-rotary-base"] = shape.windowed_rotary_base
    if shape.full_layers:
        values["window-attn-skip-freq"] = _pattern(shape.full_layers, shape.num_layers, 0)
    every = preset.no_rope_freq if shape.position_embedding == "rope" else None
    if shape.unrotated_layers != (() if every is None else tuple(range(every - 1, shape.num_layers, every))):
        values["no-rope-freq"] = _pattern(shape.unrotated_layers, shape.num_layers, 1) if shape.unrotated_layers else 0
    if shape.mlp_bias != preset.linear_bias or not preset.linear_bias:
        values["disable-bias-linear"] = not shape.mlp_bias
    if not shape.mlp_bias and (shape.qkv_bias or preset.qkv_bias):
        values["add-qkv-bias"] = shape.qkv_bias
    if experts is not None:
        values |= _expert_flags(experts, shape.num_layers)
    return [word for name, value in values.items() for word in (f"--{name}", *([] if value is None else [str(value)]))]


def _expert_flags(experts: ExpertShape, num_layers: int) -> dict[str, object]:
    """Returns the flags of experts with their values; None: the flag is a switch."""
    values: dict[str, object] = {
        "num-experts": experts.count,
        "moe-router-topk": experts.top_k,
        "moe-ffn-hidden-size": experts.ffn_hidden_size,
    }
    if experts.shared_ffn_hidden_size:
        values["moe-shared-expert-intermediate-size"] = experts.shared_ffn_hidden_size
    if experts.score != "softmax":
        values["moe-router-score-function"] = experts.score
    if not experts.renormalized:
        values["moe-router-pre-softmax"] = None
    if experts.scaling != 1.0:
        values["moe-router-topk-scaling-factor"] = experts.scaling
    if experts.bias:
        values["moe-router-enable-expert-bias"] = None
    if experts.dense_layers:
        values["moe-layer-freq"] = "[" + ",".join(str(int(layer not in experts.dense_layers)) for layer in range(num_layers)) + "]"
    return values


def _pattern(layers: tuple[int, ...], num_layers: int, mark: int) -> str:
    """Returns blocks in Megatron's notation: N for every N-th, or a list in which they have the mark, 0 or 1, and all others the other."""
    every = layers[0] + 1
    if layers == tuple(range(every - 1, num_layers, every)):
        return str(every)
    return "[" + ",".join(str(mark if layer in layers else 1 - mark) for layer in range(num_layers)) + "]"
