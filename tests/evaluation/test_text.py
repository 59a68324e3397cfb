"""Perplexity on raw text against transformers and against loops; each token is scored once; bytes and words of the given text."""

from __future__ import annotations

import bz2
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.convert.checkpoint_io import open_checkpoint
from megatron_patch.convert.to_hugging_face import to_hugging_face
from megatron_patch.engine.inference import load_model
from megatron_patch.errors import DataError
from megatron_patch.evaluation.text import TextScore, document_windows, read_documents, score_text
from megatron_patch.ops import IGNORE_INDEX
from megatron_patch.tokenizers.base import encode, load_tokenizer
from tests.convert.models import make_checkpoint, make_tokenizer
from tests.model.shapes import LLAMA
from tests.tools.test_tools import tool

DOCUMENTS = [" = A Title = \n\n the cat sat on the “mat” and the dog , it 's said , sat on the log . \n", "the dog", "naïve cats\tsat " * 9]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Makes (checkpoint, tokenizer, folder of the exported checkpoint)."""
    import dataclasses

    folder = tmp_path_factory.mktemp("text")
    tokenizer = make_tokenizer(folder / "tokenizer", 280)
    shape = dataclasses.replace(LLAMA, vocab_size=280, padded_vocab_size=384)
    info = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tokenizer)}
    path = make_checkpoint(folder / "ckpt", shape, data_metadata=info)
    to_hugging_face(open_checkpoint(str(path)), folder / "hf")
    return path, load_tokenizer("HuggingFaceTokenizer", str(tokenizer)), folder / "hf"


def test_token_byte_and_word_perplexity_are_those_of_transformers(checkpoint):
    """The exported model scores windows of 16 positions without overlap one by one."""
    transformers = pytest.importorskip("transformers")
    path, tokenizer, export = checkpoint
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(export)).eval()
    nats = tokens = 0
    for text in DOCUMENTS:
        ids = [tokenizer.eod_id, *encode(tokenizer, text)]
        for start in range(0, len(ids) - 1, 16):
            piece = torch.tensor(ids[start : start + 17])
            with torch.no_grad():
                logits = theirs(piece[None, :-1]).logits[0]
            nats += float(F.cross_entropy(logits, piece[1:], reduction="sum"))
            tokens += len(piece) - 1
    score = score_text(load_model(str(path)).model, tokenizer, DOCUMENTS, 16, batch=3)
    assert score.tokens == tokens == sum(len(encode(tokenizer, text)) for text in DOCUMENTS)
    assert score.loss_sum == pytest.approx(nats, rel=1e-5)
    assert score.bytes == sum(len(text.encode()) for text in DOCUMENTS) and score.documents == 3
    assert score.words == 23 + 2 + 27
    assert score.perplexity(score.words) == pytest.approx(math.exp(nats / 52), rel=1e-4)
    assert score.bits_per_byte() == pytest.approx(nats / score.bytes / math.log(2), rel=1e-5)
    assert score.perplexity(score.bytes) == pytest.approx(2 ** score.bits_per_byte(), rel=1e-9)


@pytest.mark.parametrize(("k", "overlap"), [(1, 0), (1, 5), (3, 0), (3, 2)])
def test_every_k_and_overlap_by_loops(k, overlap, checkpoint):
    """Computes the log-probabilities of each patch in the context of its window, one window after another."""
    path, tokenizer, _ = checkpoint
    model = load_model(str(path)).model.double()
    nats = tokens = 0
    for text in DOCUMENTS:
        ids = [tokenizer.eod_id] * k + encode(tokenizer, text)
        patches = [ids[start : start + k] for start in range(0, len(ids), k)]
        scored, start = 1, 0
        while scored < len(patches):
            end = min(start + 8, len(patches) - 1)
            with torch.no_grad():
                p = model.logits(torch.tensor(patches[start:end])[None])[0].log_softmax(-1)
            for patch in range(scored, end + 1):
                nats -= sum(float(p[patch - 1 - start, token]) for token in patches[patch])
                tokens += len(patches[patch])
            scored, start = end + 1, end - overlap
    score = score_text(model, tokenizer, DOCUMENTS, 8, k, overlap, batch=2)
    assert score.tokens == tokens == sum(len(encode(tokenizer, text)) for text in DOCUMENTS)
    assert score.loss_sum == pytest.approx(nats, rel=1e-9)


@given(st.integers(0, 70), st.integers(1, 9), st.integers(1, 5), st.booleans(), st.data())
def test_every_token_is_scored_once_with_its_context(length, positions, k, prefix, data):
    overlap = data.draw(st.integers(0, positions - 1))
    ids = list(range(1000, 1000 + length))
    stream = ([7] * k if prefix else []) + ids
    scored = []
    for inputs, labels in document_windows(ids, 7 if prefix else None, positions, k, overlap):
        assert inputs.shape == labels.shape and 1 <= len(inputs) <= positions and inputs.shape[1] == k
        flat = inputs.flatten().tolist()
        at = stream.index(flat[k]) - k if prefix and flat[0] == 7 and len(flat) > k else stream.index(flat[0])
        assert flat == stream[at : at + len(flat)]
        following = np.full(len(flat), IGNORE_INDEX)
        tail = stream[at + k : at + k + len(flat)]
        following[: len(tail)] = tail
        kept = labels.flatten() != IGNORE_INDEX
        assert (labels.flatten()[kept] == following[kept]).all()
        scored += labels.flatten()[kept].tolist()
    assert scored == (ids if prefix else ids[k:])


def test_documents_are_read_from_text_json_and_compressed_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"body": "drei\\u2028 vier"}\n\n{"body": "5"}\n', encoding="utf-8")
    (tmp_path / "c.jsonl.bz2").write_bytes(bz2.compress(b'{"body": "six"}\n'))
    found = list(read_documents([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"), str(tmp_path / "*.bz2")], key="body"))
    assert found == ["one\n\ntwo\n", "drei\u2028 vier", "5", "six"]
    for name, data, words in (
        ("x.jsonl", b'{"text": "a"}\n{"body": 1}\n', "line 2"),
        ("y.jsonl", b"[]\n", "is not JSON lines"),
        ("w.jsonl", b"5\n", "line 1"),
        ("z.txt", b"\xff\xfe", "z.txt"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=words):
            list(read_documents([str(tmp_path / name)]))


def test_scores_without_anything_to_score_or_too_large_for_a_float(checkpoint):
    path, tokenizer, _ = checkpoint
    with pytest.raises(DataError, match="0 documents"):
        score_text(load_model(str(path)).model, tokenizer, [], 8)
    assert TextScore(1e6, 10, 10, 1, 1).perplexity(1) == math.inf


WIKI = (
    ' = Robert <unk> = \n \n In 2000 , he starred in 1 @,@ 500 half @-@ hour shows ( the " first " : a play ) ; it \'s 3 @.@ 5 ° warm [ sic ] ! \n'
    " = = Career = = \n = = = Early = = = \n The actors ' roles . Why ? \n"
)


def test_wikitext_is_detokenized_as_the_harness_does_and_counted_as_it_is_given(checkpoint, tmp_path):
    from megatron_patch.evaluation.wikitext import detokenize

    plain = detokenize(WIKI)
    assert 'In 2000, he starred in 1,500 half-hour shows (the "first": a play); it\'s 3.5°warm [sic]!\n' in plain
    assert "== Career ==\n=== Early ===\nThe actors' roles. Why?\n" in plain
    try:
        from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer
    except ImportError:
        pass
    else:
        assert plain == wikitext_detokenizer({"page": WIKI})
    path, tokenizer, _ = checkpoint
    (tmp_path / "w.txt").write_text(WIKI, encoding="utf-8")
    result = json.loads(tool("evaluate", "--load", path, "--text", tmp_path / "w.txt", "--seq-length", "8", "--detokenize", "wikitext"))
    score = score_text(load_model(str(path)).model, tokenizer, [plain], 8)
    assert (result["words"], result["lines"], result["bytes"]) == (len(WIKI.split()), 6, len(WIKI.encode()))
    assert result["tokens"] == score.tokens and result["loss"] == pytest.approx(score.loss(), rel=1e-6)
    nats = score.loss_sum
    assert result["word_perplexity"] == pytest.approx(math.exp(nats / result["words"]), rel=1e-5)
    assert result["word_perplexity_with_line_ends"] == pytest.approx(math.exp(nats / (result["words"] + 6)), rel=1e-5)


def test_the_tool_prints_what_the_library_computes(checkpoint, tmp_path):
    path, tokenizer, _ = checkpoint
    with (tmp_path / "t.jsonl").open("w") as file:
        for text in DOCUMENTS:
            file.write(json.dumps({"text": text}) + "\n")
    words = ("--load", path, "--text", tmp_path / "t.jsonl", "--seq-length", "8", "--patch-size", "3", "--overlap", "2")
    result = json.loads(tool("evaluate", *words, "--words", "50"))
    score = score_text(load_model(str(path)).model, tokenizer, DOCUMENTS, 8, 3, 2)
    assert result["patch_loss"] == pytest.approx(score.loss(), rel=1e-6) and "token_loss" not in result
    assert result["word_perplexity"] == pytest.approx(math.exp(score.loss_sum / 50), rel=1e-5)
    assert (result["tokens"], result["bytes"], result["documents"]) == (score.tokens, score.bytes, 3)
    assert "--overlap 8" in tool("evaluate", *words[:-1], "8", code=2)
    assert "not allowed with" in tool("evaluate", *words, "--tasks", "x", code=2)
