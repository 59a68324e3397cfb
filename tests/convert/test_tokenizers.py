"""Tokenizers: from the training data to a checkpoint, to an export that transformers loads, and back."""

from __future__ import annotations

import base64
import dataclasses
import json
import shutil

import pytest

from megatron_patch.convert.checkpoint_io import open_checkpoint
from megatron_patch.convert.from_hugging_face import from_hugging_face
from megatron_patch.convert.tiktoken_json import tokenizer_json
from megatron_patch.convert.to_hugging_face import to_hugging_face
from megatron_patch.convert.tokenizer_files import tokenizer_of
from megatron_patch.convert.verify import differing_texts
from megatron_patch.data.dataset_metadata import read_metadata
from megatron_patch.data.indexed_dataset import IndexedDataset
from megatron_patch.errors import CheckpointError, ConfigError
from megatron_patch.tokenizers.base import encode, load_from_metadata, load_tokenizer
from megatron_patch.tokenizers.fuzz_strings import adversarial_strings
from megatron_patch.tokenizers.tiktoken import PATTERNS
from tests.convert.models import make_checkpoint, make_tokenizer
from tests.model.shapes import LLAMA
from tests.tools.test_tools import tool

transformers = pytest.importorskip("transformers")
TEXT = "the cat sat on the mat, and the dog's log — naïve, 1984!\n  two  spaces"
SHAPE = dataclasses.replace(LLAMA, vocab_size=400, padded_vocab_size=512)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """vocab.json and merges.txt under Megatron's names, ranks of tiktoken, a SentencePiece model, texts."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("files")
    model = json.loads((make_tokenizer(folder / "json", 300) / "tokenizer.json").read_text())["model"]
    (folder / "gpt2-vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "gpt2-merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n")
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" th", b" the", b"at", b" cat", b"zzz", b"on", b"  "]
    (folder / "ranks").write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    (folder / "t.txt").write_text("the cat sat on the mat\nthe dog sat on the log\n" * 30)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "t.txt"), model_prefix=str(folder / "sp"), vocab_size=285, model_type="bpe", byte_fallback=True, minloglevel=2
    )
    (folder / "t.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    return folder


KINDS = {
    "gpt2": ["GPT2BPETokenizer", "--vocab-file", "gpt2-vocab.json", "--merge-file", "gpt2-merges.txt"],
    "tiktoken": ["TikTokenizer", "--tokenizer-model", "ranks", "--tiktoken-pattern", "gpt2", "--special-tokens", "<|end|>=380",
                 "<|begin_of_text|>=350", "--eod-token", "<|end|>"],
    "sentencepiece": ["SentencePieceTokenizer", "--tokenizer-model", "sp.model"],
    "json": ["HuggingFaceTokenizer", "--tokenizer-model", "json"],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_texts_have_the_same_ids_in_the_data_behind_the_checkpoint_and_in_its_export(kind, files, tmp_path):
    words = [files / word if (files / word).exists() else word for word in KINDS[kind]]
    tool("preprocess_data", "--input", files / "t.jsonl", "--output-prefix", tmp_path / "d", "--append-eod", "--tokenizer-type", *words)
    info = read_metadata(str(tmp_path / "d_text_document"))
    *ids, end = IndexedDataset(str(tmp_path / "d_text_document"))[0].tolist()
    assert end == info.eod_id
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "ckpt", SHAPE, data_metadata=dataclasses.asdict(info))))
    tokenizer = tokenizer_of(checkpoint.data_metadata)
    assert encode(tokenizer, TEXT) == ids and tokenizer.eod_id == end
    to_hugging_face(checkpoint, tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "hf"))
    assert theirs.eos_token_id == end and json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == end
    if kind != "sentencepiece":
        assert theirs(TEXT, add_special_tokens=False)["input_ids"] == ids
        assert differing_texts(tmp_path / "hf", tokenizer) == []
    back = open_checkpoint(str(from_hugging_face(tmp_path / "hf", tmp_path / "back").folder))
    again = tokenizer_of(back.data_metadata)
    assert encode(again, TEXT) == ids and again.eod_id == end


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_tokenizer_of_tiktoken_becomes_the_same_tokenizer_json(pattern, files):
    tokenizer = load_tokenizer("TikTokenizer", str(files / "ranks"), tiktoken_pattern=pattern, special_tokens=("<|end|>=380",))
    theirs = tokenizer_json(tokenizer)
    for text in [*adversarial_strings(seed=5, count=500), "a  \nb  \n\n c  ", "x \n", " \n \n", "the cat \r\n the"]:
        assert theirs.encode(text, add_special_tokens=False).ids == encode(tokenizer, text), repr(text)
        assert theirs.decode(encode(tokenizer, text)) == text
    assert theirs.encode("the<|end|>", add_special_tokens=False).ids[-1] == 380


def test_files_that_have_moved_are_found_by_what_the_data_tells(files, tmp_path):
    for name in ("gpt2-vocab.json", "gpt2-merges.txt"):
        shutil.copyfile(files / name, tmp_path / name)
    told = {"tokenizer_type": "GPT2BPETokenizer", "tokenizer_model": "gone/vocab.json", "merge_file": "gone/merges.txt", "eod_id": 0}
    assert encode(load_from_metadata(told, None, str(tmp_path / "gpt2-vocab.json")), TEXT) == encode(
        load_tokenizer("HuggingFaceTokenizer", str(files / "json")), TEXT
    )
    told = {"tokenizer_type": "TikTokenizer", "tokenizer_model": str(files / "ranks"), "eod_id": 265}
    with pytest.raises(ConfigError, match="pattern of the TikTokenizer is unknown"):
        load_from_metadata(told)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused_both_ways(files, tmp_path):
    info = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(files / "json")}
    small = open_checkpoint(str(make_checkpoint(tmp_path / "small", LLAMA, data_metadata=info)))
    with pytest.raises(ConfigError, match=r"has \d+ ids, but the model has 53"):
        to_hugging_face(small, tmp_path / "hf")
    to_hugging_face(dataclasses.replace(small, tokenizer={"tokenizer_model": "none"}), tmp_path / "hf")
    shutil.copyfile(files / "json" / "tokenizer.json", tmp_path / "hf" / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer.json has \d+ ids, but vocab_size in config.json is 53"):
        from_hugging_face(tmp_path / "hf", tmp_path / "back")
    assert not (tmp_path / "back").exists() and not (tmp_path / "hf.partial").exists()
