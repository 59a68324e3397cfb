"""The word cache gives the ids of SentencePiece, whatever the text and however small the cache, and encodes each word once."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_patch.preprocess import word_cache
from megatron_patch.preprocess.encode import EncodeSettings
from megatron_patch.preprocess.fast_encoder import make_fast_encoder
from megatron_patch.preprocess.pipeline import preprocess
from megatron_patch.preprocess.train_tokenizer import train_tokenizer
from megatron_patch.preprocess.word_cache import WordCache, is_built, supports
from megatron_patch.tokenizers.base import load_tokenizer
from megatron_patch.tokenizers.fuzz_strings import adversarial_strings
from tests.tokenizers.test_tokenizers import train_sentencepiece

pytestmark = pytest.mark.skipif(not is_built(), reason="there is no C++ compiler here")

SUPPORTED = {
    "plain": {},
    "digits apart": {"split_digits": True},
    "symbols": {"user_defined_symbols": ["return", "<sep>", "▁▁", "▁self"]},
    "control characters": {"user_defined_symbols": [chr(1), chr(31)]},
    "runs of spaces": {"allow_whitespace_only_pieces": True},
}
UNSUPPORTED = [
    {"byte_fallback": False},
    {"normalization_rule_name": "nmt_nfkc"},
    {"remove_extra_whitespaces": True},
    {"model_type": "unigram"},
    {"add_dummy_prefix": False},
    {"user_defined_symbols": ["new▁self"]},
    {"user_defined_symbols": ["\ue000"]},
]
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
    return functools.cache(lambda kind: train_sentencepiece(folder, tmp_path_factory.mktemp("model"), **SUPPORTED[kind]))


def equal(mine, reference):
    return all(np.array_equal(one, other) for one, other in zip(mine, reference, strict=True))


@pytest.mark.parametrize("kind", SUPPORTED)
def test_ids_are_the_reference_s(tokenizer_of, kind):
    tokenizer = tokenizer_of(kind)
    assert supports(tokenizer)
    cache = WordCache(tokenizer)
    text = st.lists(st.sampled_from([*PARTS, "\ue000"]) | st.text(max_size=3), max_size=12).map("".join)

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(text, max_size=4))
    @example(adversarial_strings(seed=3))
    @example([" ", "", "a ", " a", "a  ", "  a b", "a▁ b", "a ▁b", "word" * 100 + " b " + "word" * 100])
    def check(texts):
        for _ in range(2):
            assert equal(cache.encode_flat(texts), tokenizer.encode_flat(texts))

    check()


@pytest.mark.parametrize("options", UNSUPPORTED)
def test_other_models_are_not_supported(folder, tmp_path, options):
    assert not supports(train_sentencepiece(folder, tmp_path, **options))


def count_encoded(tokenizer, monkeypatch):
    encoded, encode = [], type(tokenizer).encode_flat

    def counting(self, texts):
        encoded.extend(texts)
        return encode(self, texts)

    monkeypatch.setattr(type(tokenizer), "encode_flat", counting)
    return encoded


def test_each_part_is_encoded_once(tokenizer_of, monkeypatch):
    tokenizer = tokenizer_of("plain")
    cache = WordCache(tokenizer)
    encoded = count_encoded(tokenizer, monkeypatch)
    cache.encode_flat(["zebra zebra zebra"])
    assert len(encoded) == len(set(encoded)) > 0
    cache.encode_flat(["zebra zebra"])
    assert len(encoded) == len(set(encoded))


def test_a_small_cache_is_cleared_and_a_large_one_grows(tokenizer_of):
    tokenizer = tokenizer_of("plain")
    words = [f"word{number:06}" + "x" * (number % 40) for number in range(20_000)]
    texts = [" ".join(words[start : start + 1000]) for start in range(0, len(words), 1000)]
    assert equal(WordCache(tokenizer).encode_flat(texts), tokenizer.encode_flat(texts))
    small = WordCache(tokenizer, max_bytes=1 << 16)
    for text in [*texts[:3], *texts[:3]]:
        assert equal(small.encode_flat([text]), tokenizer.encode_flat([text]))


def test_an_error_leaves_no_words_without_ids(tokenizer_of, monkeypatch):
    tokenizer = tokenizer_of("plain")
    cache = WordCache(tokenizer)
    cache.encode_flat(["a b"])
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "encode_flat", lambda self, texts: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache.encode_flat(["a new word"])
    assert equal(cache.encode_flat(["a new word b"]), tokenizer.encode_flat(["a new word b"]))


def test_where_it_is_used(folder, tokenizer_of, monkeypatch):
    model = tokenizer_of("plain")
    assert make_fast_encoder(model)[0].name == "words" and make_fast_encoder(model, "reference")[0] is None
    pytest.importorskip("fastokens")
    assert make_fast_encoder(load_tokenizer("HuggingFaceTokenizer", str(folder / "tokenizer")))[0].name == "fastokens"
    monkeypatch.setattr(word_cache, "_library", lambda: None)
    assert make_fast_encoder(model)[0].name == "fastokens"


def test_datasets_are_the_same(folder, tokenizer_of, tmp_path):
    for backend, name in (("auto", "words"), ("reference", "reference")):
        how = EncodeSettings("SentencePieceTokenizer", tokenizer_of("plain").name, append_eod=True, backend=backend)
        assert preprocess([str(folder / "a.jsonl")], str(tmp_path / backend), how).backend == name
    for ending in (".bin", ".idx"):
        first, second = (tmp_path / f"{backend}_text_document{ending}" for backend in ("auto", "reference"))
        assert first.read_bytes() == second.read_bytes()
