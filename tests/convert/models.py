"""Tiny checkpoints of a given shape with random weights, and a tiny tokenizer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_patch.convert.checkpoint_io import write_weights
from megatron_patch.convert.tensor_names import parameter_shapes
from megatron_patch.model.shape import ModelShape
from tests.model.shapes import BIASED, GPT2, LINEAR, LLAMA, LLAMA3, QWEN3, TIED

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
    "gpt2": GPT2,
    "gpt2-untied": dataclasses.replace(GPT2, tie_embeddings=False),
}
"""Every family, tied and untied, grouped queries and one group, both kinds of rotary scaling."""


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
