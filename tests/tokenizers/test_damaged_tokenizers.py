"""Tokenizer files that are damaged, some so that their libraries panic: each is a sentence with exit code 3, never a traceback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from megatron_patch.errors import DataError
from megatron_patch.tokenizers.base import encode, load_tokenizer
from tests.tokenizers.tokenizer_json import added, byte_level_json, write


def split(expression):
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def model(**parts):
    return {**byte_level_json()["model"], **parts}


WORD_PIECE = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9}
TABLE_WITHOUT_STRINGS = "EAAAAAAAAAAAAAAAAAAAAAAAAAA="
DAMAGED = {
    "the table of a normalizer is no table": (
        byte_level_json(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "is not a",
    ),
    "the table of a normalizer is cut": (
        byte_level_json(normalizer={"type": "Precompiled", "precompiled_charsmap": TABLE_WITHOUT_STRINGS}),
        "cannot encode",
    ),
    "a pattern that takes forever": (byte_level_json(pre_tokenizer=split("(a+)+$")), "cannot encode 'a{40}!'.*retry-limit"),
    "a pattern that is none": (byte_level_json(pre_tokenizer=split("(a")), "is not a tokenizer.*parenthesis"),
    "two tokens with one id": (byte_level_json(model=model(vocab={"a": 0, "b": 0})), "'a' and 'b' have the same id, 0"),
    "two added tokens with one id": (
        byte_level_json(added(256, "<s>"), added(256, "</s>")),
        "'</s>' the id 256, but the library gives it 257",
    ),
    "an added token with an id of the vocabulary": (byte_level_json(added(5, "<s>")), "'<s>' the id 5, but the library gives it 256"),
    "an empty vocabulary": (byte_level_json(model=model(vocab={})), "empty vocabulary"),
    "an id beyond all types": (byte_level_json(model=model(vocab={"a": 0, "b": 4_000_000_000})), "has the id 4000000000"),
    "a negative id": (byte_level_json(model=model(vocab={"a": -1})), "is not a tokenizer"),
    "WordPiece without its unknown token": (
        byte_level_json(model={**WORD_PIECE, "vocab": {"a": 0}}, pre_tokenizer={"type": "Whitespace"}),
        r"Missing \[UNK\]",
    ),
    "words without their unknown token": (
        byte_level_json(model={"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"a": 0}}),
        r"Missing \[UNK\]",
    ),
    "unigram without its unknown token": (
        byte_level_json(model={"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]], "byte_fallback": False}),
        "`unk_id` is missing",
    ),
    "BPE without its unknown token": (byte_level_json(model=model(unk_token="<unk>", vocab={"a": 0})), "`<unk>` not found"),
    "ids that change each time": (byte_level_json(model=model(dropout=0.5)), "has a dropout of 0.5"),
    "no model": ({"version": "1.0"}, "is not a tokenizer"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_tokenizer_json_is_a_sentence(tmp_path, name):
    content, words = DAMAGED[name]
    folder = write(tmp_path / "t", content)
    with pytest.raises(DataError) as error:
        tokenizer = load_tokenizer("HuggingFaceTokenizer", str(folder))
        for text in ("hello b", "a" * 40 + "!"):
            encode(tokenizer, text)
    assert re.search(words, error.value.what) and str(folder) in error.value.what


@pytest.mark.parametrize("workers", [1, 2])
def test_the_tool_ends_with_its_exit_code(tmp_path, workers):
    """A panic that comes with a text of the middle of the input, in a worker process too."""
    folder = write(tmp_path / "t", DAMAGED["a pattern that takes forever"][0])
    texts = ["fine"] * 50 + ["a" * 40 + "!"] + ["fine"] * 50
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = ["tools/preprocess_data.py", "--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "d")]
    command += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder), "--workers", str(workers)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 3 and "cannot encode" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "d_text_document.idx").exists()


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer", "GPT2BPETokenizer", "TikTokenizer"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"\xff\xfe{}", b"[]", b"null", b'{"model": 3}'])
def test_any_other_file_is_a_sentence(tmp_path, kind, content):
    path = tmp_path / "vocab.json"
    path.write_bytes(content)
    (tmp_path / "merges.txt").write_bytes(content)
    with pytest.raises(DataError):
        load_tokenizer(kind, str(path))


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer", "GPT2BPETokenizer", "TikTokenizer"])
def test_a_file_that_claims_200_gigabytes_is_never_read(tmp_path, kind):
    path = tmp_path / "vocab.json"
    path.touch()
    os.truncate(path, 200 << 30)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(DataError, match="214,748,364,800 bytes"):
        load_tokenizer(kind, str(path))


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "added_tokens"])
def test_the_files_beside_it_are_bounded_too(tmp_path, name):
    folder = write(tmp_path / "t", byte_level_json())
    (folder / f"{name}.json").touch()
    os.truncate(folder / f"{name}.json", 200 << 30)
    with pytest.raises(DataError, match=f"{name}.json cannot be read: .*bytes"):
        load_tokenizer("HuggingFaceTokenizer", str(folder))
