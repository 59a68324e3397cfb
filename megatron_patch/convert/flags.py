"""The flags of the program that make a given shape: what a run must say to train on from an imported model."""

from __future__ import annotations

from megatron_patch.model.shape import ModelShape


def flags_of(shape: ModelShape) -> list[str] | None:
    """The model's flags, as words of a command line; None where no flags make this shape (biases in the attention layers alone)."""
    if shape.attention_bias != shape.mlp_bias:
        return None
    family = "gpt2" if shape.normalization == "LayerNorm" else "qwen3" if shape.qk_norm else "llama"
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
    if family != "gpt2":
        values["disable-bias-linear"] = not shape.mlp_bias
        if shape.qkv_bias and not shape.mlp_bias:
            values["add-qkv-bias"] = True
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]
