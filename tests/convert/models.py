"""Tiny checkpoints of a given shape with random weights, and a tiny tokenizer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_patch.convert.checkpoint_io import write_weights
from megatron_patch.convert.tensor_names import parameter_shapes
from megatron_patch.model.expert_shape import ExpertShape
from megatron_patch.model.shape import ModelShape
from tests.model.shapes import BIASED, GEMMA2, GEMMA3, GPT2, LINEAR, LLAMA, LLAMA3, OLMO2, QWEN3, TIED, YARN

QWEN2 = dataclasses.replace(LLAMA, qkv_bias=True, tie_embeddings=True)
SHAPES = {
    "llama": LLAMA,
    "tied": TIED,
    "biased": dataclasses.replace(BIASED, num_query_groups=4),
    "one-group": dataclasses.replace(BIASED, attention_bias=False, qkv_bias=False, mlp_bias=False),
    "linear": LINEAR,
    "llama3": LLAMA3,
    "llama3-tied": dataclasses.replace(LLAMA3, tie_embeddings=True),
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3-tied": dataclasses.replace(QWEN3, tie_embeddings=True, head_size=16),
    "yarn": YARN,
    "yarn factor": dataclasses.replace(YARN, rotary_beta_fast=16.0, rotary_beta_slow=2.0, rotary_attention_factor=1.4),
    "mistral": dataclasses.replace(LLAMA, window=7),
    "mistral yarn": dataclasses.replace(YARN, window=1),
    "qwen2 windows": dataclasses.replace(QWEN2, num_layers=3, window=5, full_layers=(0,)),
    "qwen2 pattern": dataclasses.replace(QWEN2, num_layers=4, window=5, full_layers=(1, 3)),
    "qwen2 yarn": dataclasses.replace(QWEN2, head_size=16, rotary_scaling="yarn", rotary_factor=4.0, rotary_original_positions=32),
    "qwen3 windows": dataclasses.replace(QWEN3, window=9),
    "smollm3": dataclasses.replace(LLAMA, num_layers=5, unrotated_layers=(3,), tie_embeddings=True, norm_epsilon=1e-6),
    "smollm3 windows": dataclasses.replace(LLAMA, num_layers=4, unrotated_layers=(0, 3), window=6, full_layers=(1, 2)),
    "smollm3 pattern": dataclasses.replace(
        LLAMA, num_layers=3, window=6, full_layers=(1,), attention_bias=True, qkv_bias=True, mlp_bias=True
    ),
    "olmo2": dataclasses.replace(OLMO2, num_query_groups=1, head_size=8, rotary_base=5e5),
    "olmo2 tied": dataclasses.replace(OLMO2, tie_embeddings=True, norm_epsilon=1e-6),
    "olmo3": dataclasses.replace(OLMO2, num_layers=4, window=6, full_layers=(3,)),
    "olmo3 yarn": dataclasses.replace(
        YARN, norm_placement="post", qk_norm=True, qk_norm_scope="all", window=6, full_layers=(0,), windowed_rotary_base=500.0
    ),
    "gemma2": dataclasses.replace(GEMMA2, num_layers=3, window=5, full_layers=(1,), head_size=8, query_scalar=36.0),
    "gemma2 plain": dataclasses.replace(GEMMA2, attention_softcap=None, logit_softcap=None, tie_embeddings=False, num_query_groups=1),
    "gemma3": dataclasses.replace(GEMMA3, window=5, full_layers=(1,), windowed_rotary_base=500.0),
    "gemma3 scaled": dataclasses.replace(
        GEMMA3, window=5, full_layers=(0,), windowed_rotary_base=1e4, rotary_scaling="linear", rotary_factor=8.0, logit_softcap=3.0
    ),
    "qwen3_moe": dataclasses.replace(QWEN3, experts=ExpertShape(6, 3, 20)),
    "mixtral": dataclasses.replace(LLAMA, ffn_hidden_size=20, experts=ExpertShape(4, 2, 20)),
    "olmoe": dataclasses.replace(
        LLAMA, ffn_hidden_size=12, qk_norm=True, qk_norm_scope="all", experts=ExpertShape(5, 2, 12, renormalized=False)
    ),
    "dots1": dataclasses.replace(
        QWEN3, num_layers=3, experts=ExpertShape(6, 3, 12, 24, score="sigmoid", scaling=2.5, bias=True, dense_layers=(0,))
    ),
    "gpt2": GPT2,
    "gpt2-untied": dataclasses.replace(GPT2, tie_embeddings=False),
}
"""Every family, tied and untied, grouped queries and one group, every rotary scaling, windows, layers without rotation."""


def random_parameters(shape: ModelShape, seed: int = 0) -> dict[str, torch.Tensor]:
    """Returns random values of every parameter, also of norms and biases, so that a lost or swapped one is noticed."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, size in parameter_shapes(shape).items():
        value = torch.randn(size, generator=generator) * 0.2
        result[name] = value + 1.0 if "norm" in name and name.endswith("weight") else value
    return result


def make_checkpoint(folder: Path, shape: ModelShape, parameters=None, precision="fp32", options=None, **extra) -> Path:
    """Writes a checkpoint that holds only weights."""
    parameters = parameters or random_parameters(shape)
    return write_weights(folder, shape, [list(parameters)], parameters.items(), precision, options or {"seq_length": 16}, **extra)


def make_tokenizer(folder: Path, vocab_size: int) -> Path:
    """Writes a byte-level tokenizer.json with an end-of-document token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["the cat sat on the mat and the dog sat on the log"] * 3, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}))
    return folder
