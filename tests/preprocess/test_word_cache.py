"""The memory for words gives the encoder's own ids, whatever the text, however small the memory, and asks for each word once."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_patch.preprocess import word_cache as word_cache
from megatron_patch.preprocess.fast_tokenizer import FastBackend, fast_backend, fuzz_strings
from megatron_patch.preprocess.train_tokenizer import train_tokenizer
from megatron_patch.preprocess.word_cache import Cuts, Warming, WordCache, cuts_of, is_built
from megatron_patch.tokenizers.base import load_tokenizer
from tests.preprocess.test_preprocess import run
from tests.test_tokenizer import train_sentencepiece

pytestmark = pytest.mark.skipif(not is_built(), reason="there is no C++ compiler here")

KINDS = {
    "sentencepiece": (Cuts.BETWEEN_STRANGERS, {}),
    "digits apart": (Cuts.BETWEEN_STRANGERS, {"split_digits": True}),
    "symbols": (Cuts.BETWEEN_STRANGERS, {"user_defined_symbols": ["return", "<sep>", "▁▁", "▁self"]}),
    "runs of spaces": (Cuts.BETWEEN_STRANGERS, {"allow_whitespace_only_pieces": True}),
    "unknown letters": (Cuts.BETWEEN_ASCII, {"byte_fallback": False}),
    "nfkc": (Cuts.BETWEEN_ASCII, {"normalization_rule_name": "nmt_nfkc"}),
    "spaces removed": (Cuts.BETWEEN_ASCII, {"remove_extra_whitespaces": True}),
    "byte-level": (Cuts.BEHIND_ASCII, None),
}
PARTS = ["a", "b", "return", "self", "<sep>", " ", "  ", "▁", "\n", ".", "é", "e\u0301", "ﬁ", "日本", "7", "\u00a0", "\x00", "word" * 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    texts = [f"def f{number}(x):\n    return x + {number}  # größer, a new self — 日本\n" for number in range(200)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "plain.txt").write_text("\n".join(texts))
    train_tokenizer([str(folder / "a.jsonl")], str(folder / "tokenizer"), 400)
    return folder


@pytest.fixture(scope="module")
def tokenizer_of(folder, tmp_path_factory):
    @functools.cache
    def make(kind):
        options = KINDS[kind][1]
        if options is None:
            return load_tokenizer("HuggingFaceTokenizer", str(folder / "tokenizer"))
        return train_sentencepiece(folder, tmp_path_factory.mktemp("model"), **options)

    return make


def equal(mine, reference):
    return all(np.array_equal(one, other) for one, other in zip(mine, reference, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_reference_s(tokenizer_of, kind):
    tokenizer = tokenizer_of(kind)
    assert cuts_of(tokenizer) == KINDS[kind][0]
    memory = WordCache(tokenizer, tokenizer, cuts_of(tokenizer))
    text = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=12).map("".join)

    @settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(text, max_size=4))
    @example(fuzz_strings(seed=3))
    @example([" ", "", "a ", " a", "a  ", "  a b", "a▁ b", "a ▁b", "word" * 100 + " b " + "word" * 100])
    def check(texts):
        for _ in range(2):
            assert equal(memory.encode_flat(texts), tokenizer.encode_flat(texts))

    check()


@pytest.mark.parametrize(("kind", "wrong"), [("sentencepiece", Cuts.BEHIND_ASCII), ("byte-level", Cuts.BETWEEN_ASCII)])
def test_cuts_at_other_places_would_be_noticed(tokenizer_of, kind, wrong):
    tokenizer, texts = tokenizer_of(kind), fuzz_strings()
    assert not equal(WordCache(tokenizer, tokenizer, wrong).encode_flat(texts), tokenizer.encode_flat(texts))


class Counting:
    """An encoder that knows what it was asked for."""

    def __init__(self, tokenizer):
        self.tokenizer, self.asked = tokenizer, []

    def encode_flat(self, texts):
        self.asked += texts
        return self.tokenizer.encode_flat(texts)


def test_each_word_is_encoded_once(tokenizer_of):
    tokenizer = tokenizer_of("unknown letters")
    encoder = Counting(tokenizer)
    memory = WordCache(tokenizer, encoder, Cuts.BETWEEN_ASCII)
    memory.encode_flat(["to be or not to be", "be not"])
    memory.encode_flat(["to  be", "not or"])
    assert encoder.asked == ["to", "be", "or", "not", "to  be"]


def test_a_small_memory_begins_anew_and_a_large_one_grows(tokenizer_of):
    encoder = Counting(tokenizer_of("byte-level"))
    words = [f"word{number:06}" + "x" * (number % 40) for number in range(50_000)]
    texts = [" ".join(words[start : start + 1000]) for start in range(0, len(words), 1000)]
    right = encoder.tokenizer.encode_flat(texts)
    assert equal(WordCache(encoder.tokenizer, encoder, Cuts.BEHIND_ASCII).encode_flat(texts), right)
    assert len(encoder.asked) == len(words) + len(texts) - 50, "a text's first word has no space in front"
    encoder.asked.clear()
    small = WordCache(encoder.tokenizer, encoder, Cuts.BEHIND_ASCII, most_bytes=1 << 16)
    for _ in range(2):
        for text in texts[:3]:
            assert equal(small.encode_flat([text]), encoder.tokenizer.encode_flat([text]))
    assert len(encoder.asked) == 6000


def test_an_encoder_s_error_leaves_no_words_without_ids(tokenizer_of):
    tokenizer = tokenizer_of("sentencepiece")

    class Failing:
        fails = False

        def encode_flat(self, texts):
            if self.fails:
                raise ValueError("no")
            return tokenizer.encode_flat(texts)

    encoder = Failing()
    memory = WordCache(tokenizer, encoder, Cuts.BETWEEN_STRANGERS)
    memory.encode_flat(["a b"])
    encoder.fails = True
    with pytest.raises(ValueError, match="no"):
        memory.encode_flat(["a new word"])
    encoder.fails = False
    assert equal(memory.encode_flat(["a new word b"]), tokenizer.encode_flat(["a new word b"]))


def test_tokenizers_that_cannot_be_cut_have_none(folder, tmp_path):
    assert cuts_of(train_sentencepiece(folder, tmp_path, model_type="unigram")) is None
    assert cuts_of(train_sentencepiece(folder, tmp_path, add_dummy_prefix=False)) is None
    assert cuts_of(train_sentencepiece(folder, tmp_path, user_defined_symbols=["new▁self"])) is None


def test_where_it_serves(tokenizer_of, monkeypatch):
    model, byte_level = tokenizer_of("sentencepiece"), tokenizer_of("byte-level")
    pytest.importorskip("fastokens")
    assert fast_backend(model)[0].name == fast_backend(model, "words")[0].name == fast_backend(byte_level, "words")[0].name == "words"
    assert isinstance(fast_backend(byte_level)[0], FastBackend), "which has a memory of its own"
    assert fast_backend(model, "reference")[0] is None
    monkeypatch.setattr(word_cache, "_library", lambda: None)
    assert fast_backend(model)[0].name == "fastokens" and fast_backend(model, "words")[0] is None


def test_many_new_words_bring_something_faster(tokenizer_of):
    tokenizer = tokenizer_of("nfkc")
    first, then = Counting(tokenizer), Counting(tokenizer)
    memory = WordCache(tokenizer, Warming(first, lambda: then, 15_000), cuts_of(tokenizer))
    texts = [" ".join(f"word{part}of{number}" for number in range(1000)) for part in range(4)]
    for text in texts:
        assert equal(memory.encode_flat([text]), tokenizer.encode_flat([text]))
    # The second thousand passes the limit, and is encoded by the other.
    assert (len(first.asked), len(then.asked)) == (1000, 3000)
    nothing = Warming(first, lambda: None, 1)
    assert equal(nothing.encode_flat(texts), tokenizer.encode_flat(texts))


def test_datasets_are_the_same(folder, tmp_path):
    for backend in ("words", "reference"):
        assert run(folder, tmp_path / backend, backend=backend).backend == backend
    for ending in (".bin", ".idx"):
        first, second = (tmp_path / f"{backend}_text_document{ending}" for backend in ("words", "reference"))
        assert first.read_bytes() == second.read_bytes()
