"""Every tokenizer against the library that it uses, and tokenizers that are registered by others."""

from __future__ import annotations

import base64
import json
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.data.dataset_metadata import read_metadata
from megatron_patch.data.indexed_dataset import IndexedDataset
from megatron_patch.errors import DataError
from megatron_patch.preprocess.encode import EncodeSettings, make_tokenizer
from megatron_patch.preprocess.fast_encoder import make_fast_encoder, pieces_without_merges
from megatron_patch.preprocess.pipeline import preprocess
from megatron_patch.preprocess.train_tokenizer import train_tokenizer
from megatron_patch.tokenizers.base import TOKENIZERS, encode, load_from_metadata, load_tokenizer
from megatron_patch.tokenizers.byte_level import byte_letters
from megatron_patch.tokenizers.fuzz_strings import adversarial_strings
from megatron_patch.tokenizers.interface import flatten
from megatron_patch.tokenizers.tiktoken import PATTERNS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = [f"def f{i}(x):\n    return x + {i}  # größer — 日本\n" for i in range(200)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer([str(folder / "a.jsonl")], str(folder / "bpe"), 400)
    import sentencepiece

    (folder / "plain.txt").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "plain.txt"),
        model_prefix=str(folder / "sp"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    model = json.loads((folder / "bpe" / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return folder


def test_training_is_deterministic(folder, tmp_path):
    train_tokenizer([str(folder / "a.jsonl")], str(tmp_path / "again"), 400)
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (folder / "bpe" / "tokenizer.json").read_bytes()
    for size in (100, 5_000_000_000, 10**22):
        with pytest.raises(DataError, match="from 257, for the 256 bytes"):
            train_tokenizer([str(folder / "a.jsonl")], str(tmp_path / "x"), size)
    with pytest.raises(DataError, match="no text"):
        train_tokenizer([str(folder / "a.jsonl")], str(tmp_path / "x"), 400, key="body")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ('[\n{"text": "a"},\n{"text": "b"}\n]\n', r"begins with \[, as a JSON array does"),
        ('\n{"a b": "x", "content": "y"}\n' * 2, r"2 bad lines, 0 empty documents; .*, line 2: .*the keys with text are 'a b', content\n"),
        ('{"text": ""}\n', r"0 bad lines, 1 empty document\n"),
        ("", r"is empty\n"),
        (" \n\ufeff", r"has nothing but blank lines or a byte-order mark\n"),
    ],
)
def test_training_without_text_says_why(tmp_path, data, words):
    (tmp_path / "a.jsonl").write_text(data)
    with pytest.raises(DataError, match=words):
        train_tokenizer([str(tmp_path / "a.jsonl")], str(tmp_path / "x"), 300)


def test_training_on_mostly_bad_lines_says_so(tmp_path):
    said: list[str] = []
    (tmp_path / "a.jsonl").write_text('{"text": "ab ab"}\n' + "bad\n" * 2)
    train_tokenizer([str(tmp_path / "a.jsonl")], str(tmp_path / "x"), 257, notice=said.append)
    assert len(said) == 1 and re.match(r"warning: 2 of 3 lines are bad and left out; the first is .*, line 2: not valid JSON", said[0])


def test_a_vocabulary_smaller_than_asked_for_is_said(folder, tmp_path):
    said: list[str] = []
    (tmp_path / "a.jsonl").write_text('{"text": "ab ab ab"}\n')
    path = train_tokenizer([str(tmp_path / "a.jsonl")], str(tmp_path / "x"), 1000, notice=said.append)
    reached = len(json.loads(path.read_text())["model"]["vocab"])
    assert reached < 300 and len(said) == 1 and f"has {reached} ids, not 1,000" in said[0]
    train_tokenizer([str(folder / "a.jsonl")], str(tmp_path / "y"), 400, notice=said.append)
    assert len(said) == 1


@given(st.text(max_size=60))
def test_byte_level_tokenizers_lose_nothing(folder, text):
    for tokenizer in (
        load_tokenizer("HuggingFaceTokenizer", str(folder / "bpe")),
        load_tokenizer("GPT2BPETokenizer", vocab_file=str(folder / "vocab.json"), merge_file=str(folder / "merges.txt")),
    ):
        ids = encode(tokenizer, text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_gpt2_files_and_tokenizer_json_agree(folder):
    first = load_tokenizer("HuggingFaceTokenizer", str(folder / "bpe"))
    second = load_tokenizer("GPT2BPETokenizer", vocab_file=str(folder / "vocab.json"), merge_file=str(folder / "merges.txt"))
    assert (first.vocab_size, first.eod_id) == (second.vocab_size, second.eod_id)
    for text in adversarial_strings(seed=3, count=100):
        assert encode(first, text) == encode(second, text)


def test_sentencepiece_equals_its_library(folder):
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sp.model"))
    for kind in ("SentencePieceTokenizer", "Llama2Tokenizer"):
        tokenizer = load_tokenizer(kind, str(folder / "sp.model"))
        assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.bos_id) == (400, reference.eos_id(), reference.bos_id())
        texts = adversarial_strings(count=50)
        ids, lengths = tokenizer.encode_flat(texts)
        assert ids.tolist() == [token for text in texts for token in reference.encode(text)]
        assert lengths.tolist() == [len(reference.encode(text)) for text in texts]
        assert tokenizer.decode(reference.encode("return x")) == "return x"


class Words:
    """A tokenizer of somebody else: one id for each letter of the alphabet, in lower case."""

    name, vocab_size, eod_id, bos_id = "Words", 27, 26, None

    def encode_flat(self, texts):
        rows = [[ord(letter) - ord("a") for letter in text.lower() if letter.isascii() and letter.isalpha()] for text in texts]
        return flatten(rows)

    def decode(self, ids):
        return "".join(chr(ord("a") + token) for token in ids)


def test_a_registered_tokenizer_encodes_a_dataset(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(TOKENIZERS, "Words", lambda options: Words())
    settings = EncodeSettings("Words", str(tmp_path / "any"), append_eod=True)
    summary = preprocess([str(folder / "a.jsonl")], str(tmp_path / "d"), settings)
    dataset = IndexedDataset(summary.outputs[0])
    assert len(dataset) == 200 and Words().decode(dataset[3][:-1].tolist()) == "deffxreturnxgrer" and dataset[3][-1] == 26
    metadata = read_metadata(summary.outputs[0])
    assert metadata is not None and metadata.tokenizer_type == "Words"
    assert isinstance(load_from_metadata({"tokenizer_type": "Words", "tokenizer_model": "any", "eod_id": 26}), Words)


def test_null_tokenizer():
    tokenizer = load_tokenizer("NullTokenizer", vocab_size=10)
    assert encode(tokenizer, "3 1 8") == [3, 1, 8] and tokenizer.eod_id == 9 and tokenizer.decode([3, 1]) == "3 1"
    for text in ("10", "-1", "x"):
        with pytest.raises(DataError, match="NullTokenizer"):
            encode(tokenizer, text)


@pytest.mark.parametrize(
    ("kind", "model", "words"),
    [
        ("WordTokenizer", None, "HuggingFaceTokenizer"),
        ("HuggingFaceTokenizer", None, "without --tokenizer-model"),
        ("HuggingFaceTokenizer", "nowhere", "does not exist"),
        ("HuggingFaceTokenizer", "{folder}/merges.txt", "not a tokenizer"),
        ("SentencePieceTokenizer", "nowhere.model", "does not exist"),
        ("SentencePieceTokenizer", "{folder}/vocab.json", "not a SentencePiece model"),
        ("SentencePieceTokenizer", "{folder}/bpe", "is not a file"),
        ("TikTokenizer", "{folder}/bpe", "is not a file"),
        ("GPT2BPETokenizer", None, "--vocab-file"),
        ("NullTokenizer", None, "--vocab-size"),
    ],
)
def test_wrong_tokenizers_are_refused(folder, kind, model, words):
    with pytest.raises(DataError, match=words):
        load_tokenizer(kind, model.format(folder=folder) if model else None)


@pytest.fixture(scope="module")
def tiktoken_file(folder):
    """The ranks of a small byte-level BPE as a tiktoken file: the byte-level letters turned back into bytes."""
    pytest.importorskip("tiktoken")
    vocab = json.loads((folder / "bpe" / "tokenizer.json").read_text())["model"]["vocab"]
    bytes_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    tokens = [bytes(bytes_of[letter] for letter in piece) for piece in sorted(vocab, key=vocab.get) if piece != "<|endoftext|>"]
    path = folder / "small.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path, tokens


def test_patterns_are_known_by_name(tiktoken_file):
    """A name that is not known is refused: as an expression it would match itself alone, and lose the rest of the text."""
    for name in ("v3", "cl100k_bas", "w", "llama-4"):
        with pytest.raises(DataError, match=f"--tiktoken-pattern {name} is not a known name"):
            load_tokenizer("TikTokenizer", str(tiktoken_file[0]), tiktoken_pattern=name)
    assert {"v1", "v2", "cl100k_base", "o200k_base", "p50k_base", "r50k_base", "gpt2"} <= PATTERNS.keys()


def test_megatrons_patterns_split_as_megatrons():
    """The expressions as Megatron-LM writes them, found by `regex`, against ours by name."""
    import regex

    class_upper, class_lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    theirs = {
        "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        "v2": rf"[^\r\n\p{{L}}\p{{N}}]?{class_upper}*{class_lower}+|[^\r\n\p{{L}}\p{{N}}]?{class_upper}+{class_lower}*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
    for text in adversarial_strings(seed=9, count=400):
        for name, pattern in theirs.items():
            assert regex.findall(pattern, text) == regex.findall(PATTERNS[name], text), name


@pytest.mark.parametrize("pattern", [*PATTERNS, r"\s+|\S+"])
def test_tiktoken_equals_its_library_and_the_fast_encoder_agrees(tiktoken_file, pattern):
    import tiktoken

    path, tokens = tiktoken_file
    tokenizer = load_tokenizer(
        "TikTokenizer", str(path), tiktoken_pattern=pattern, special_tokens=("<|begin_of_text|>=500", "<|endoftext|>")
    )
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.bos_id) == (502, 501, 500)
    expression = PATTERNS.get(pattern, pattern)
    reference = tiktoken.Encoding("x", pat_str=expression, mergeable_ranks={t: i for i, t in enumerate(tokens)}, special_tokens={})
    texts = adversarial_strings(seed=5, count=200)
    ids, lengths = tokenizer.encode_flat(texts)
    expected = [reference.encode_ordinary(text) for text in texts]
    assert ids.tolist() == [token for row in expected for token in row] and lengths.tolist() == list(map(len, expected))
    assert tokenizer.decode(encode(tokenizer, "x — 日本")) == "x — 日本" and tokenizer.decode([501, 499]) == "<|endoftext|><499>"
    pytest.importorskip("fastokens")
    encoder, note = make_fast_encoder(tokenizer)
    assert encoder is not None, note


def test_patterns_split_as_the_published_ones(monkeypatch):
    """The library writes some of them in a faster form; what they find is the same."""
    published = pytest.importorskip("tiktoken_ext.openai_public")
    import regex

    monkeypatch.setattr(published, "load_tiktoken_bpe", lambda *args, **kwargs: {})
    theirs = {"gpt2": published.r50k_pat_str, "cl100k": published.cl100k_base()["pat_str"], "o200k": published.o200k_base()["pat_str"]}
    assert theirs.keys() <= PATTERNS.keys()
    for text in adversarial_strings(seed=8, count=400):
        for name, pattern in theirs.items():
            assert regex.findall(pattern, text) == regex.findall(PATTERNS[name], text), name


@pytest.mark.parametrize(
    ("content", "more", "words"),
    [
        (b"not base64 1\n", {}, "not a tiktoken file: line 1"),
        (b"YQ== 0\n", {}, "single bytes are missing"),
        (None, {"tiktoken_pattern": "("}, "--tiktoken-pattern"),
        (None, {"special_tokens": ("<a>=3",)}, "another token has this id"),
        (None, {"special_tokens": ("<a>=3000000000",)}, "the id is too large"),
        (None, {"special_tokens": (f"<a>={'9' * 5000}",)}, "the id is too large"),
        (None, {"special_tokens": ("<a>=2147483647",)}, "the id is too large"),
        (None, {"tiktoken_pattern": ""}, "--tiktoken-pattern  is not a known name"),
        (b"YQ== -1\n", {}, "line 1: the rank '-1' is not a whole number from 0"),
        (b"YQ== 3000000000\n", {}, "line 1: the rank '3000000000' is not"),
        (None, {"eod_token": "<b>"}, "not in the vocabulary"),
    ],
)
def test_broken_tiktoken_files_are_named(tiktoken_file, tmp_path, content, more, words):
    path = tiktoken_file[0]
    if content is not None:
        path = tmp_path / "broken.tiktoken"
        path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        load_tokenizer("TikTokenizer", str(path), **more)


def test_a_pattern_must_be_given(tiktoken_file):
    with pytest.raises(DataError, match="needs --tiktoken-pattern"):
        make_tokenizer(EncodeSettings("TikTokenizer", str(tiktoken_file[0])))


def test_without_tiktoken_its_files_are_refused_with_a_sentence(tiktoken_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(DataError, match="TikTokenizer needs tiktoken, which is not installed"):
        load_tokenizer("TikTokenizer", str(tiktoken_file[0]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"byte_fallback": False},
        {"split_digits": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
    ],
)
def test_sentencepiece_models_go_fast_where_they_can(folder, tmp_path, options):
    """A BPE model, with normalization or without, goes through the fast encoder; the results are SentencePiece's."""
    pytest.importorskip("fastokens")
    tokenizer = train_sentencepiece(folder, tmp_path, **options)
    encoder, note = make_fast_encoder(tokenizer)
    assert encoder is not None, note
    texts = [*adversarial_strings(seed=11, count=300), "the byte <0x41> by its name", "<s> and </s> and <unk> are text", "＜0x41＞ ①"]
    for mine, reference in zip(encoder.encode_flat(texts), tokenizer.encode_flat(texts), strict=True):
        assert mine.tolist() == reference.tolist()


def test_pieces_that_no_merges_make_are_known(folder):
    backend = load_tokenizer("HuggingFaceTokenizer", str(folder / "bpe")).backend
    whole = json.loads(backend.to_str())
    assert pieces_without_merges(json.dumps(whole)) == []
    byte_level = "".join(byte_letters()[byte] for byte in " größer".encode())
    whole["model"]["vocab"] |= {byte_level: 900, "zzz": 901}
    whole["model"]["merges"] = [merge for merge in whole["model"]["merges"] if "".join(merge) != byte_level]
    assert pieces_without_merges(json.dumps(whole)) == ["größer", "zzz"]


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"user_defined_symbols": ["return"]},
    ],
)
def test_sentencepiece_models_that_do_more_stay_with_their_library(folder, tmp_path, options):
    encoder, note = make_fast_encoder(train_sentencepiece(folder, tmp_path, **options))
    assert (encoder is None or encoder.name == "words") and "the reference" in note


def train_sentencepiece(folder, tmp_path, **options):
    import sentencepiece

    usual = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    prefix = str(tmp_path / "m")
    usual |= {"input": str(folder / "plain.txt"), "model_prefix": prefix, "vocab_size": 300, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(**{**usual, **options})
    return load_tokenizer("SentencePieceTokenizer", f"{prefix}.model")
