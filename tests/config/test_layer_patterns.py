"""Windows and patterns of blocks: Megatron's notation against the rules of Megatron-Core, written out; every problem at once."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.config.layer_patterns import marked_blocks, window_positions
from megatron_patch.errors import ConfigError
from megatron_patch.model.families import FAMILIES
from megatron_patch.training.dry_run import architecture
from tests.config.test_resolve import RUN, resolve


@pytest.mark.parametrize("text", ["127,0", "(127, 0)", " 127 , 0 "])
def test_the_window_is_the_positions_before_a_position_and_itself(text):
    """Megatron: key j is seen by query i if i - left <= j <= i."""
    seen = [key for key in range(1000) if 500 - 127 <= key <= 500]
    assert window_positions(text) == len(seen) == 128
    assert window_positions("0,0") == 1


@given(st.integers(1, 40), st.integers(1, 12))
def test_a_number_is_every_nth_block(layers, every):
    """Megatron counts blocks from 1: full attention, or no rotation, where the number is a multiple."""
    expected = tuple(number - 1 for number in range(1, layers + 1) if number % every == 0)
    assert marked_blocks(str(every), layers, "window_attn_skip_freq", 0) == marked_blocks(str(every), layers, "no_rope_freq", 1) == expected


@pytest.mark.parametrize("text", ["[0,0,0,1,0,0,0,1]", "([0]*3+[1])*2", "2*([0]*3+[1])", "0,0,0,1,0,0,0,1", "([0]*3+[1]*1)*2"])
def test_a_list_has_a_number_for_each_block(text):
    assert marked_blocks(text, 8, "no_rope_freq", 1) == marked_blocks("4", 8, "no_rope_freq", 1) == (3, 7)
    assert marked_blocks(text, 8, "window_attn_skip_freq", 0) == (0, 1, 2, 4, 5, 6)


@pytest.mark.parametrize(
    "text", ["", "x", "0", "-1", "1.5", "[2]", "[True]", "[1]*-2", "[[1]]", "[1]**2", "(" * 3000, "[1]*9999999999", "f()"]
)
def test_no_other_expression_is_read(text):
    with pytest.raises(ConfigError, match="a whole number N from 1"):
        marked_blocks(text, 1, "no_rope_freq", 1)


def test_the_shape_is_the_same_however_it_is_written():
    def shape(*words):
        return resolve(*RUN, "--num-layers", "4", *words).shape

    window = shape("--window-size", "7,0", "--window-attn-skip-freq", "2")
    assert (window.window, window.full_layers, window.windowed_layers) == (8, (1, 3), 2)
    assert [window.window_of(layer) for layer in range(4)] == [8, None, 8, None]
    assert window == shape("--window-size", "(7,0)", "--window-attn-skip-freq", "[1,0]*2")
    everywhere = shape("--window-size", "7,0")
    assert (everywhere.window, everywhere.full_layers) == (8, ()) and everywhere == shape(
        "--window-size", "7,0", "--window-attn-skip-freq", "5"
    )
    assert shape() == shape("--window-size", "7,0", "--window-attn-skip-freq", "1"), "a window that no block has"
    assert shape("--no-rope-freq", "2").unrotated_layers == (1, 3) and shape("--no-rope-freq", "0") == shape()


def test_lists_of_a_yaml_file(tmp_path):
    (tmp_path / "run.yaml").write_text("window-size: [7, 0]\nwindow-attn-skip-freq: [1, 0]\nno-rope-freq: 2\n")
    shape = resolve(*RUN, "--config", str(tmp_path / "run.yaml")).shape
    assert (shape.window, shape.full_layers, shape.unrotated_layers) == (8, (1,), (1,))


def test_a_family_can_have_blocks_without_rotation(monkeypatch):
    monkeypatch.setitem(FAMILIES, "mine", dataclasses.replace(FAMILIES["llama"], no_rope_freq=2))
    assert resolve(*RUN, "--model-family", "mine").shape.unrotated_layers == (1,)
    assert resolve(*RUN, "--model-family", "mine", "--no-rope-freq", "0").shape.unrotated_layers == ()
    assert resolve(*RUN, "--model-family", "mine", "--position-embedding-type", "learned_absolute").shape.unrotated_layers == ()


def test_all_problems_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        resolve(
            *RUN,
            "--window-size",
            "4096",
            "--window-attn-skip-freq",
            "[1]",
            "--no-rope-freq",
            "x",
            "--lr-warmup-tokens",
            "5",
            "--lr-warmup-steps",
            "5",
        )
    text = " ".join(error.value.what.split())
    assert text.startswith("4 problems") and all(flag in text for flag in ("--window-size", "--window-attn-skip-freq", "--no-rope-freq"))


def test_what_families_lack_is_reported_with_the_rest():
    """Without data, also the end-of-document token that separating documents needs."""
    words = "--windowed-rotary-base 500 --swiglu --geglu --reset-attention-mask --no-rope-freq 2"
    with pytest.raises(ConfigError) as error:
        resolve(*RUN[:-2], "--dry-run", "--model-family", "gpt2", *words.split())
    text = " ".join(error.value.what.split())
    assert text.startswith("4 problems")
    for part in (
        "--windowed-rotary-base 500 without",
        "--swiglu together with --geglu",
        "without an end-of-document",
        "with learned positions",
    ):
        assert all(word in text for word in part.split()), part


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("--qk-norm-scope all", "--qk-norm-scope all without --qk-layernorm"),
        ("--zero-centered-norms --normalization LayerNorm", "--zero-centered-norms with LayerNorm"),
        ("--model-family olmo2 --zero-centered-norms", "or with --qk-norm-scope all"),
        (
            "--windowed-rotary-base 500 --window-size 3,0 --position-embedding-type learned_absolute",
            "--windowed-rotary-base 500.0 in a model",
        ),
        ("--attn-logit-softcapping -1", "--attn-logit-softcapping -1"),
    ],
)
def test_impossible_norms_and_frequencies_are_refused(words, what):
    with pytest.raises(ConfigError) as error:
        resolve(*RUN, *words.split())
    assert what in error.value.what and error.value.allowed and error.value.do


def test_the_plan_shows_what_differs_from_llama():
    def line(words):
        return architecture(resolve(*RUN, *words.split()))

    gemma2 = line("--model-family gemma2 --attn-logit-softcapping 40")
    for part in (
        "before and after attention",
        "GeGLU of width",
        "scaled embeddings",
        "scores capped at 40",
        "logits capped at 30",
        "tied head",
    ):
        assert part in gemma2, part
    assert "capped" not in line("--model-family gemma2 --attn-logit-softcapping 0 --final-logit-softcapping 0")
    assert "SwiGLU" in line("--model-family gemma3 --swiglu") and "GELU of" in line("--model-family gemma3 --no-swiglu")
    assert "scores divided by the root of 12" in line("--query-pre-attn-scalar 12") and "root of" not in line("")
    olmo3 = line("--model-family olmo3 --window-size 3,0 --windowed-rotary-base 500")
    assert "after attention and feed-forward layer, also of queries and keys over all heads" in olmo3
    assert "base 500 in blocks with a window" in olmo3


def test_the_plan_shows_windows_and_blocks_without_rotation():
    run = resolve(*RUN, "--num-layers", "4", "--window-size", "7,0", "--window-attn-skip-freq", "4", "--no-rope-freq", "2")
    line = architecture(run)
    assert "windows of 8 positions in 3 of 4 blocks" in line and "rotary positions (base 10000), none in 2 of 4 blocks" in line
    assert "window" not in architecture(resolve(*RUN)) and "none in" not in architecture(resolve(*RUN))
