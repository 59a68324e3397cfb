"""The fast encoder stands aside where it would err: added tokens of two kinds that meet, former white space, patterns that are not known."""

from __future__ import annotations

import itertools
import json
import random
import tracemalloc

import numpy as np
import pytest

from megatron_patch.errors import DataError
from megatron_patch.preprocess.added_tokens import ambiguous_tokens
from megatron_patch.preprocess.fast_encoder import FastokensEncoder, make_fast_encoder
from megatron_patch.tokenizers.base import load_tokenizer
from megatron_patch.tokenizers.fuzz_strings import (
    adversarial_strings,
    every_sequence,
    long_strings,
    odd_code_points,
    start_strings,
    token_strings,
)
from megatron_patch.tokenizers.round_trip import check_round_trip
from tests.preprocess.random_tokenizers import CORPUS, OTHER_PATTERNS, TOKENS

pytest.importorskip("fastokens")


@pytest.fixture(scope="module")
def trained():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False))
    return json.loads(backend.to_str())


def load(content, path, tokens=(), **changes):
    """Returns the tokenizer with these added tokens, each a text and its flags."""
    from tokenizers import AddedToken, Tokenizer

    backend = Tokenizer.from_str(json.dumps({**content, **changes}))
    for text, flags in tokens:
        backend.add_tokens([AddedToken(text, **{"normalized": False, **flags})])
    backend.save(str(path / "tokenizer.json"))
    return load_tokenizer("HuggingFaceTokenizer", str(path / "tokenizer.json"))


def split_by(pattern):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, level]}


def assert_equal(first, second):
    for one, other in zip(first, second, strict=True):
        assert one.tolist() == other.tolist()


MIXED = [("</s>", {}), ("<|user|>", {}), ("<<", {"normalized": True}), (">", {"normalized": True}), ("->", {"normalized": True})]


def test_texts_with_added_tokens_of_two_kinds_that_overlap_go_to_the_reference(trained, tmp_path):
    tokenizer = load(trained, tmp_path, MIXED)
    texts = ["int a = b <</s> rest", "plain text", "<<|user|>->", "a -> b", "x < y"]
    encoder, note = make_fast_encoder(tokenizer)
    assert isinstance(encoder, FastokensEncoder) and "the reference, which encodes the texts that contain" in note and "'<<'" in note
    assert_equal(encoder.encode_flat(texts), tokenizer.encode_flat(texts))
    # What fastokens itself would return: the longest token at the first place, whatever its kind.
    wrong = np.frombuffer(encoder._native.encode_batch_flat([texts[0]], add_special_tokens=False)[0], np.uint32)
    assert wrong.tolist() != tokenizer.encode_flat(texts[:1])[0].tolist()


def test_under_a_normalizer_such_tokens_leave_everything_to_the_reference(trained, tmp_path):
    encoder, note = make_fast_encoder(load(trained, tmp_path, MIXED, normalizer={"type": "NFC"}))
    assert encoder is None and "fastokens is not used: it finds added tokens, such as '</s>', '<<', " in note


class Token:
    def __init__(self, content, normalized=False, lstrip=False, rstrip=False, single_word=False):
        self.content, self.normalized, self.lstrip, self.rstrip, self.single_word = content, normalized, lstrip, rstrip, single_word


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        (["<a>", "<b>"], ["foo", "<c>"], []),
        (["</s>"], ["<<", "x"], ["</s>", "<<"]),
        (["<<"], ["</s>", "x"], ["</s>", "<<"]),
        (["abc"], ["b"], ["abc", "b"]),
        (["b"], ["abc"], ["abc", "b"]),
        (["ab", "x"], ["bc", "y"], ["ab", "bc"]),
        (["a"], [], []),
        (["a"], ["a"], ["a"]),
        (["x" * 5000], ["y"], ["x" * 5000]),
        (["x" * 5000, "<a>"], ["ab" * 40, "a>b"], ["<a>", "a>b", "ab" * 40, "x" * 5000]),
    ],
)
def test_tokens_of_two_kinds_are_ambiguous_if_they_share_characters(first, second, found):
    assert ambiguous_tokens([*map(Token, first), *(Token(text, normalized=True) for text in second)]) == found


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_tokens_that_look_beside_themselves_are_ambiguous_with_any_of_the_other_kind(flag):
    assert ambiguous_tokens([Token("<a>", **{flag: True}), Token("foo", normalized=True)]) == ["<a>", "foo"]
    assert ambiguous_tokens([Token("<a>", **{flag: True}), Token("foo")]) == []


@pytest.mark.parametrize("flag", ["lstrip", "rstrip"])
def test_tokens_that_take_white_space_are_ambiguous_with_tokens_of_white_space(flag):
    assert ambiguous_tokens([Token("<a>", **{flag: True}), Token(" x"), Token("foo")]) == [" x", "<a>"]
    assert (
        ambiguous_tokens([Token("\n\n", **{flag: True}), Token("foo")]) == ["\n\n"] and ambiguous_tokens([Token("  "), Token("foo")]) == []
    )


def test_a_token_of_white_space_that_takes_more_of_it_goes_to_the_reference(trained, tmp_path):
    tokenizer = load(trained, tmp_path, [("\n\n", {"lstrip": True, "rstrip": True})])
    encoder, note = make_fast_encoder(tokenizer)
    texts = ["a\n\n\n\nb", "\n\n\n \n\n", "a\nb"]
    assert encoder is not None and "fastokens may find these" in note
    assert_equal(encoder.encode_flat(texts), tokenizer.encode_flat(texts))


@pytest.mark.parametrize("seed", range(25))
def test_random_sets_of_added_tokens_are_encoded_right(trained, tmp_path, seed):
    draw = random.Random(seed)
    side = draw.choice(("lstrip", "rstrip"))
    tokens = [
        (text, {"normalized": draw.random() < 0.5, side: draw.random() < 0.15, "single_word": draw.random() < 0.15})
        for text in draw.sample(TOKENS, draw.randint(2, 8))
    ]
    tokenizer = load(trained, tmp_path, tokens)
    encoder, note = make_fast_encoder(tokenizer)
    texts = token_strings([text for text, _ in tokens], seed=seed + 100, count=400)
    assert encoder is not None or "the reference" in note
    if encoder is not None:
        assert_equal(encoder.encode_flat(texts), tokenizer.encode_flat(texts))


@pytest.mark.parametrize("pattern", [pattern for pattern in OTHER_PATTERNS if "$" not in pattern])
def test_former_white_space_goes_to_the_reference(trained, tmp_path, pattern):
    tokenizer = load(trained, tmp_path, pre_tokenizer=split_by(pattern))
    encoder, note = make_fast_encoder(tokenizer)
    texts = ["a  \u180ex", " \u180e \u180e\u180e", "plain"]
    assert encoder is not None, note
    assert_equal(encoder.encode_flat(texts), tokenizer.encode_flat(texts))


def test_a_pattern_that_the_libraries_read_differently_leaves_everything_to_the_reference(trained, tmp_path):
    """In the expressions of `tokenizers` a dollar sign also stands before the end of a line."""
    tokenizer = load(trained, tmp_path, pre_tokenizer=split_by(r"\p{L}+|\s+$|\s*[\r\n]|\s+(?!\S)|\s|\S"))
    encoder, note = make_fast_encoder(tokenizer)
    assert encoder is None and "fastokens gives other ids for" in note


def test_strings_to_compare_hold_what_tells_tokenizers_apart(trained, tmp_path):
    tokenizer = load(trained, tmp_path, MIXED)
    texts = start_strings(tokenizer)
    everything = "\0".join(texts)
    assert all(letter in everything for letter in odd_code_points()) and {"\u180e", "\u200b", "\ue000", "\ud7ff"} <= set(odd_code_points())
    for text, _ in MIXED:
        assert {text, text * 2, f" {text} ", f"a{text}b"} <= set(texts) and f"{text[:-1]}x{text}" in everything
    assert "<</s>" in texts and len(everything) < 200_000 and set(adversarial_strings()) <= set(texts)
    assert all("".join(four) in everything for four in itertools.product(" \n\ta1'", repeat=4))
    first, second, _ = long_strings()
    assert first != second and first[:-2] == second[:-2] and len(first[:-2].encode()) > 4096
    assert not any(0xD800 <= ord(letter) < 0xE000 for letter in everything)


def test_long_and_many_added_tokens_cost_little():
    """They are not cut at every place, and not compared one by one."""
    texts = token_strings(["<a>", "x" * 100_000], count=5)
    assert f"a{'x' * 100_000}b" in texts and sum(map(len, texts)) < 110_000 and token_strings(["y" * 300]) == [f"a{'y' * 300}b"]
    assert sum(map(len, token_strings(["ab" * size for size in range(2, 50)]))) < 2_000_000
    tracemalloc.start()
    ambiguous_tokens([Token(f"{number:>1000}", normalized=bool(number % 2)) for number in range(200)])
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
    many = [Token(f"<{number}|", normalized=bool(number % 2)) for number in range(10_000)]
    assert ambiguous_tokens(many) == []


def test_every_sequence_occurs_once():
    text = every_sequence("abc", 3)
    assert sorted(text[start : start + 3] for start in range(len(text) - 2)) == sorted(
        {a + b + c for a in "abc" for b in "abc" for c in "abc"}
    )


def test_where_the_reference_fails_for_its_own_added_tokens_nothing_stands_in_for_it(trained, tmp_path):
    """The library panics where two tokens take the same white space."""
    tokenizer = load(trained, tmp_path, [("x ", {"rstrip": True}), (" ", {"lstrip": True})])
    with pytest.raises(DataError, match="cannot encode 'x   '"):
        tokenizer.encode_flat(["x   "])
    encoder, note = make_fast_encoder(tokenizer)
    assert encoder is None and "which fails for strings that a fast encoder must agree on" in note
    assert "it fails for some strings of special tokens" in check_round_trip(tokenizer)
