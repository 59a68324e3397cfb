"""Every tokenizer behind one face, against its own library."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.data.preprocess.encode import fuzz_strings
from megatron_patch.data.preprocess.train_tokenizer import train_tokenizer
from megatron_patch.errors import DataError
from megatron_patch.tokenizer import encode, load_tokenizer


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
    with pytest.raises(DataError, match="257"):
        train_tokenizer([str(folder / "a.jsonl")], str(tmp_path / "x"), 100)
    with pytest.raises(DataError, match="no text"):
        train_tokenizer([str(folder / "a.jsonl")], str(tmp_path / "x"), 400, key="body")


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
    for text in fuzz_strings(seed=3, count=100):
        assert encode(first, text) == encode(second, text)


def test_sentencepiece_equals_its_library(folder):
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sp.model"))
    for kind in ("SentencePieceTokenizer", "Llama2Tokenizer"):
        tokenizer = load_tokenizer(kind, str(folder / "sp.model"))
        assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.bos_id) == (400, reference.eos_id(), reference.bos_id())
        texts = fuzz_strings(count=50)
        ids, lengths = tokenizer.encode_flat(texts)
        assert ids.tolist() == [token for text in texts for token in reference.encode(text)]
        assert lengths.tolist() == [len(reference.encode(text)) for text in texts]
        assert tokenizer.decode(reference.encode("return x")) == "return x"


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
        ("HuggingFaceTokenizer", "{folder}/merges.txt", "no tokenizer"),
        ("SentencePieceTokenizer", "nowhere.model", "does not exist"),
        ("SentencePieceTokenizer", "{folder}/vocab.json", "no SentencePiece model"),
        ("GPT2BPETokenizer", None, "--vocab-file"),
        ("NullTokenizer", None, "--vocab-size"),
    ],
)
def test_wrong_tokenizers_are_told(folder, kind, model, words):
    with pytest.raises(DataError, match=words):
        load_tokenizer(kind, model.format(folder=folder) if model else None)
