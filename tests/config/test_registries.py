"""Entries that a user's own script adds to the registries of recipes, weights and tokenizers are used by their flags."""

from __future__ import annotations

import math

import pytest

from megatron_patch.config.resolve import load_config
from megatron_patch.config.stage_spec import RECIPES, StageSpec
from megatron_patch.errors import ConfigError
from megatron_patch.stages import POSITION_WEIGHTS
from megatron_patch.tokenizers.base import TOKENIZERS
from megatron_patch.tokenizers.null import NullTokenizer

RUN = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --train-tokens 64k --global-batch-size 8 --vocab-size 64"


def resolve(words):
    return load_config([*RUN.split(), "--data-path", "nowhere", *words.split()], ranks=1)


def test_a_registered_formula_weights_the_labels(monkeypatch):
    monkeypatch.setitem(POSITION_WEIGHTS, "sqrt", lambda k: 1 / math.sqrt(k + 1))
    patch, token = resolve("--patch-size 4 --position-weights sqrt").plan.stages
    raw = [1, 2**-0.5, 3**-0.5, 0.5]
    assert patch.position_weights == pytest.approx([4 * weight / sum(raw) for weight in raw])
    assert token.position_weights == (1.0,)


def test_a_registered_formula_may_not_give_impossible_weights(monkeypatch):
    monkeypatch.setitem(POSITION_WEIGHTS, "falling", lambda k: 1.0 - k)
    with pytest.raises(ConfigError, match="finite numbers from 0"):
        resolve("--patch-size 4 --position-weights falling")


def halves(options):
    half = StageSpec(name="coarse", patch_size=2 * options.patch_size, token_share=0.5, lr_decay_style="linear", batch="constant-positions")
    return half, StageSpec(name="fine", patch_size=options.patch_size)


def test_a_registered_recipe_makes_the_stages(monkeypatch):
    monkeypatch.setitem(RECIPES, "halves", halves)
    coarse, fine = resolve("--recipe halves --patch-size 2").plan.stages
    assert (coarse.name, coarse.patch_size, fine.name, fine.patch_size) == ("coarse", 4, "fine", 2)
    assert coarse.tokens == fine.tokens == 32_000 or coarse.tokens / fine.tokens == pytest.approx(1, abs=0.02)
    assert coarse.lr.style == "linear" and coarse.global_batch_size == 8


def test_flags_win_over_what_a_recipe_sets_and_the_patch_size_has_its_default(monkeypatch):
    monkeypatch.setitem(RECIPES, "halves", halves)
    run = resolve("--recipe halves --lr-decay-style constant --batch constant-tokens")
    coarse, fine = run.plan.stages
    assert coarse.lr.style == fine.lr.style == "constant" and coarse.global_batch_size == 2
    assert (coarse.patch_size, fine.patch_size) == (4, 2) and run.notes[0].startswith("--patch-size 2")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [(lambda options: (), "returns no stages"), (lambda options: (StageSpec(side="outptu"),), "side is 'outptu'")],
)
def test_a_recipe_that_returns_nonsense_is_refused(monkeypatch, recipe, words):
    monkeypatch.setitem(RECIPES, "wrong", recipe)
    with pytest.raises(ConfigError, match=words):
        resolve("--recipe wrong")


def test_a_registered_tokenizer_is_accepted(monkeypatch):
    monkeypatch.setitem(TOKENIZERS, "CharTokenizer", lambda options: NullTokenizer(256, 0))
    assert resolve("--tokenizer-type CharTokenizer").options.data.tokenizer_type == "CharTokenizer"


@pytest.mark.parametrize(
    ("words", "names", "do"),
    [
        ("--recipe patch-trian", "patch-train, token-superposition, token-level", "did you mean patch-train?"),
        ("--patch-size 4 --position-weights powr", "uniform, power, exponential, first, or 4 numbers", "did you mean power?"),
        ("--tokenizer-type huggingface", "HuggingFaceTokenizer, SentencePieceTokenizer", "did you mean HuggingFaceTokenizer?"),
    ],
)
def test_unknown_names_end_with_the_registered_ones_and_the_nearest(words, names, do):
    with pytest.raises(ConfigError) as error:
        resolve(words)
    assert error.value.allowed is not None and error.value.allowed.startswith(names)
    assert error.value.do == do
