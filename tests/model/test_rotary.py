"""Scaled rotary frequencies, compared with transformers and with their definition."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from megatron_patch.errors import CheckpointError, ConfigError
from megatron_patch.model.rotary import attention_factor, rotary_frequencies, rotary_tables
from megatron_patch.model.shape import check_shape
from megatron_patch.training.resume_checks import check_weights_of
from tests.config.test_resolve import resolve
from tests.model.shapes import GPT2, LINEAR, LLAMA, LLAMA3
from tests.model.shapes import YARN as YARN_SMALL

LLAMA_3_2 = dataclasses.replace(
    LLAMA, head_size=64, rotary_base=500000.0, rotary_scaling="llama3", rotary_factor=32.0, rotary_original_positions=8192
)


YARN = {
    "yarn": YARN_SMALL,
    "qwen2.5": dataclasses.replace(YARN_SMALL, head_size=128, rotary_base=1e6, rotary_factor=4.0, rotary_original_positions=32768),
    "betas": dataclasses.replace(YARN_SMALL, rotary_beta_fast=8.0, rotary_beta_slow=2.0, rotary_attention_factor=1.25),
    "all scaled": dataclasses.replace(YARN_SMALL, rotary_original_positions=3),
    "none scaled": dataclasses.replace(YARN_SMALL, rotary_base=2.0, rotary_original_positions=10**6),
}


@pytest.mark.parametrize("shape", YARN.values(), ids=YARN)
def test_yarn_is_that_of_transformers(shape):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": "yarn", "rope_theta": shape.rotary_base, "factor": shape.rotary_factor}
    parameters |= {"original_max_position_embeddings": shape.rotary_original_positions, "beta_fast": shape.rotary_beta_fast}
    parameters |= {"beta_slow": shape.rotary_beta_slow, "attention_factor": shape.rotary_attention_factor}
    config = transformers.LlamaConfig(head_dim=shape.head_size, rope_parameters=parameters, max_position_embeddings=1 << 17)
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    torch.testing.assert_close(rotary_frequencies(shape, torch.float32), expected, rtol=3e-7, atol=0.0)
    assert attention_factor(shape) == pytest.approx(factor, rel=1e-15)
    cos, sin = rotary_tables(torch.arange(50), shape, torch.float64)
    torch.testing.assert_close((cos**2 + sin**2).sqrt(), torch.full_like(cos, factor), rtol=1e-12, atol=0.0)


def test_yarn_keeps_high_frequencies_and_scales_low_ones():
    plain = dataclasses.replace(YARN["qwen2.5"], rotary_scaling="none", rotary_factor=1.0)
    before, after = (rotary_frequencies(shape, torch.float64) for shape in (plain, YARN["qwen2.5"]))
    turns = 32768 * before / (2 * math.pi)
    assert torch.equal(after[turns > 40], before[turns > 40]) and torch.equal(after[turns < 0.8], before[turns < 0.8] / 4)
    between = (turns > 1.3) & (turns < 25)
    assert bool(between.any()) and bool(((after < before) & (after > before / 4))[between].all())


@pytest.mark.parametrize("shape", [LINEAR, LLAMA3, LLAMA_3_2], ids=["linear", "llama3", "llama-3.2-1b"])
def test_frequencies_are_those_of_transformers(shape):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": shape.rotary_scaling, "rope_theta": shape.rotary_base, "factor": shape.rotary_factor}
    if shape.rotary_scaling == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": shape.rotary_original_positions}
    config = transformers.LlamaConfig(head_dim=shape.head_size, rope_parameters=parameters, max_position_embeddings=1 << 17)
    expected, _ = ROPE_INIT_FUNCTIONS[shape.rotary_scaling](config, torch.device("cpu"))
    torch.testing.assert_close(rotary_frequencies(shape, torch.float32), expected, rtol=3e-7, atol=0.0)


def test_llama3_leaves_short_waves_alone_and_scales_long_ones():
    plain = dataclasses.replace(LLAMA_3_2, rotary_scaling="none", rotary_factor=1.0)
    before, after = (rotary_frequencies(shape, torch.float64).tolist() for shape in (plain, LLAMA_3_2))
    kinds = set()
    for was, now in zip(before, after, strict=True):
        wave = 2 * math.pi / was
        if wave < 8192 / 4:
            kinds.add("alone")
            assert now == was
        elif wave > 8192:
            kinds.add("scaled")
            assert now == was / 32
        else:
            kinds.add("between")
            assert was / 32 < now < was
    assert kinds == {"alone", "scaled", "between"}


def test_linear_scaling_reads_positions_closer_together():
    far = rotary_tables(torch.tensor([[0, 4, 400]]), LINEAR, torch.float64)
    near = rotary_tables(torch.tensor([[0, 1, 100]]), LLAMA, torch.float64)
    for mine, theirs in zip(far, near, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (dataclasses.replace(LINEAR, rotary_factor=0.5), "--rope-scaling-factor 0.5"),
        (dataclasses.replace(LLAMA, rotary_factor=2.0), "without --rope-scaling"),
        (dataclasses.replace(LLAMA3, rotary_low_frequency_factor=4.0), "--rope-low-freq-factor 4.0"),
        (dataclasses.replace(YARN_SMALL, rotary_beta_slow=40.0), "--rope-beta-fast 32.0, --rope-beta-slow 40.0"),
        (dataclasses.replace(YARN_SMALL, rotary_attention_factor=0.0), "--rope-attention-factor 0.0"),
        (dataclasses.replace(LINEAR, rotary_attention_factor=1.0), "--rope-attention-factor 1.0 with --rope-scaling linear"),
        (dataclasses.replace(GPT2, rotary_scaling="linear", rotary_factor=2.0), "learned positions"),
    ],
)
def test_scalings_that_make_no_sense_are_refused(shape, words):
    with pytest.raises(ConfigError, match=words):
        check_shape(shape)


MODEL = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --vocab-size 64 --seq-length 16 --global-batch-size 4 --train-tokens 1024 --dry-run"


def test_flags_reach_the_shape_and_checkpoints_without_them_stay_readable():
    scaled = resolve(*MODEL.split(), "--rope-scaling", "llama3", "--rope-scaling-factor", "32", "--rope-original-positions", "4096")
    assert (scaled.shape.rotary_scaling, scaled.shape.rotary_factor, scaled.shape.rotary_original_positions) == ("llama3", 32.0, 4096)
    plain = resolve(*MODEL.split())
    old = {
        name: value for name, value in dataclasses.asdict(plain.shape).items() if not name.startswith("rotary_") or name == "rotary_base"
    }

    state = SimpleNamespace(weights_only=True, config={}, model=old)

    check_weights_of(state, plain)
    with pytest.raises(CheckpointError, match=r"--rope-scaling-factor 32.0 \(checkpoint: 1.0\)"):
        check_weights_of(state, scaled)


def test_a_new_run_from_weights_may_have_a_longer_context_but_no_other_model():
    run = resolve(*MODEL.split())

    model = dataclasses.asdict(dataclasses.replace(run.shape, max_positions=999, init_std=1.0))
    state = SimpleNamespace(weights_only=True, config={}, model=model)

    check_weights_of(state, run)
    model |= {"norm_epsilon": 0.5, "activation": "gelu"}
    with pytest.raises(CheckpointError, match=r"--swiglu swiglu \(checkpoint: gelu\); --norm-epsilon 1e-05 \(checkpoint: 0.5\)"):
        check_weights_of(state, run)
