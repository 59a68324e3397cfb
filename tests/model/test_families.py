"""Model families: a registered family is a preset of `--model-family`, and an error for a wrong name suggests the nearest one."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_patch.errors import ConfigError
from megatron_patch.model.expert_shape import ExpertShape
from megatron_patch.model.families import FAMILIES, Family, family_of_shape
from tests.config.test_resolve import RUN, resolve
from tests.model.shapes import BIASED, GEMMA2, GEMMA3, GPT2, LLAMA, OLMO2, QWEN3

SMOLLM3 = dataclasses.replace(LLAMA, num_layers=4, unrotated_layers=(3,))


def test_a_registered_family_sets_the_defaults_and_flags_win(monkeypatch):
    monkeypatch.setitem(FAMILIES, "qwen2", Family(norm_epsilon=1e-6, qkv_bias=True, tie_embeddings=True))
    shape = resolve(*RUN, "--model-family", "qwen2").shape
    assert (shape.norm_epsilon, shape.qkv_bias, shape.attention_bias, shape.mlp_bias, shape.tie_embeddings) == (
        1e-6,
        True,
        False,
        False,
        True,
    )
    shape = resolve(*RUN, "--model-family", "qwen2", "--norm-epsilon", "1e-3", "--untie-embeddings-and-output-weights").shape
    assert (shape.norm_epsilon, shape.qkv_bias, shape.tie_embeddings) == (1e-3, True, False)


def test_an_unknown_family_is_refused_with_the_registered_names_and_the_nearest():
    with pytest.raises(ConfigError) as caught:
        resolve(*RUN, "--model-family", "lama")
    assert caught.value.what == "--model-family lama is not a known name"
    assert (caught.value.allowed, caught.value.do) == (
        "llama, qwen3, mistral, smollm3, olmo2, olmo3, gemma2, gemma3, qwen3_moe, mixtral, olmoe, dots1, gpt2",
        "did you mean llama?",
    )


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        (LLAMA, "llama"),
        (BIASED, "llama"),
        (QWEN3, "qwen3"),
        (SMOLLM3, "smollm3"),
        (OLMO2, "olmo2"),
        (GEMMA2, "gemma2"),
        (GEMMA3, "gemma3"),
        (GPT2, "gpt2"),
        (dataclasses.replace(QWEN3, experts=ExpertShape(4, 2, 8)), "qwen3_moe"),
        (dataclasses.replace(LLAMA, experts=ExpertShape(4, 2, 8)), "mixtral"),
        (dataclasses.replace(QWEN3, qk_norm_scope="all", experts=ExpertShape(4, 2, 8)), "olmoe"),
    ],
)
def test_the_family_of_a_shape_is_the_one_with_its_kinds_of_layers(shape, name):
    assert family_of_shape(shape) == name
