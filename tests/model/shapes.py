"""Tiny model shapes of every family."""

from __future__ import annotations

import dataclasses

from megatron_patch.model.shape import ModelShape

LLAMA = ModelShape(
    num_layers=2,
    hidden_size=24,
    num_attention_heads=4,
    num_query_groups=2,
    head_size=6,
    ffn_hidden_size=40,
    vocab_size=53,
    padded_vocab_size=64,
    max_positions=32,
    init_std=0.2,
)
TIED = dataclasses.replace(LLAMA, tie_embeddings=True)
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True, norm_epsilon=1e-6)
BIASED = dataclasses.replace(LLAMA, num_query_groups=1, head_size=8, rotary_base=500.0, attention_bias=True, qkv_bias=True, mlp_bias=True)
"""All biases, one key-value head, and heads that together are wider than the hidden size."""
GPT2 = dataclasses.replace(
    LLAMA,
    num_query_groups=4,
    ffn_hidden_size=96,
    normalization="LayerNorm",
    activation="gelu",
    position_embedding="learned",
    attention_bias=True,
    qkv_bias=True,
    mlp_bias=True,
    tie_embeddings=True,
)
OLMO2 = dataclasses.replace(LLAMA, norm_placement="post", qk_norm=True, qk_norm_scope="all")
GEMMA3 = dataclasses.replace(
    LLAMA,
    norm_epsilon=1e-6,
    norm_placement="both",
    zero_centered_norms=True,
    activation="geglu",
    scaled_embeddings=True,
    query_scalar=9.0,
    qk_norm=True,
    tie_embeddings=True,
)
GEMMA2 = dataclasses.replace(GEMMA3, qk_norm=False, query_scalar=None, attention_softcap=0.5, logit_softcap=2.0)
"""Caps that matter: scores and logits are larger than they."""
FAMILIES = {
    "llama": LLAMA,
    "tied": TIED,
    "qwen3": QWEN3,
    "biased": BIASED,
    "olmo2": OLMO2,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "gpt2": GPT2,
}
LINEAR = dataclasses.replace(LLAMA, rotary_scaling="linear", rotary_factor=4.0)
LLAMA3 = dataclasses.replace(
    LLAMA, num_attention_heads=2, num_query_groups=1, head_size=16, rotary_scaling="llama3", rotary_factor=8.0, rotary_original_positions=64
)
"""Has rotary frequencies of every kind: unscaled, interpolated and fully scaled."""
YARN = dataclasses.replace(LLAMA3, rotary_scaling="yarn", rotary_factor=4.0, rotary_original_positions=32)
