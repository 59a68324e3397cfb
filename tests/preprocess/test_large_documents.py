"""Documents too long for memory: cut where the ids of the parts are the ids of the whole, and written as any other."""

from __future__ import annotations

import base64
import gzip
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.errors import DataError
from megatron_patch.preprocess.encode import EncodeSettings
from megatron_patch.preprocess.fast_tokenizer import fuzz_strings
from megatron_patch.preprocess.pipeline import preprocess
from megatron_patch.preprocess.segments import cutter_of, segments
from megatron_patch.preprocess.train_tokenizer import train_tokenizer
from megatron_patch.raw_text import large_documents as large_documents
from megatron_patch.raw_text import parse_documents as documents
from megatron_patch.raw_text import readers
from megatron_patch.raw_text.inputs import Span
from megatron_patch.raw_text.large_documents import documents_in_file, long_strings, whole
from megatron_patch.tokenizers.base import encode, load_tokenizer
from megatron_patch.tokenizers.byte_level import byte_letters
from megatron_patch.tokenizers.tiktoken import PATTERNS
from tests.preprocess.test_resume import everything

WORDS = [
    *fuzz_strings(count=0),
    "the",
    "a1",
    "don't",
    "it's ",
    "x\n",
    "x \n y",
    "y\u2028 z",
    "日 本",
    "l'",
    " 12",
    "1 234",
    "...\n\n  b",
    "_ a",
]
TEXTS = st.lists(st.sampled_from(WORDS) | st.text(max_size=3), min_size=2, max_size=30).map("".join)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Of each kind that may be cut, with few pieces, so that merges are long and many."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizers")
    texts = ["the patches of don't  and\n12 x y it's 日本 a1 " * 3 + word for word in WORDS]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer([str(folder / "a.jsonl")], str(folder / "bpe"), 400)
    (folder / "plain.txt").write_text("\n".join(text.replace("\x00", "") for text in texts))
    for name, rule in (("nmt", "nmt_nfkc"), ("identity", "identity")):
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "plain.txt"),
            model_prefix=str(folder / name),
            vocab_size=450,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name=rule,
            remove_extra_whitespaces=rule != "identity",
            hard_vocab_limit=False,
            minloglevel=2,
        )
    model = json.loads((folder / "bpe" / "tokenizer.json").read_text())["model"]
    letters = {letter: byte for byte, letter in enumerate(byte_letters())}
    ranks = [
        bytes(letters[letter] for letter in piece) for piece in sorted(model["vocab"], key=model["vocab"].get) if piece != "<|endoftext|>"
    ]
    (folder / "ranks").write_text("".join(f"{base64.b64encode(piece).decode()} {rank}\n" for rank, piece in enumerate(ranks)))
    found = {"bpe": load_tokenizer("HuggingFaceTokenizer", str(folder / "bpe"))}
    found |= {name: load_tokenizer("SentencePieceTokenizer", str(folder / f"{name}.model")) for name in ("nmt", "identity")}
    return found | {name: load_tokenizer("TikTokenizer", str(folder / "ranks"), tiktoken_pattern=name) for name in PATTERNS}


@pytest.mark.parametrize("name", ["bpe", "nmt", "identity", *PATTERNS])
@given(text=TEXTS)
def test_parts_give_the_ids_of_the_whole(tokenizers, name, text):
    tokenizer = tokenizers[name]
    cut = cutter_of(tokenizer)
    assert cut is not None
    rest = text
    while (place := cut(rest)) is not None:
        assert encode(tokenizer, rest[: place[0]]) + encode(tokenizer, rest[place[1] :]) == encode(tokenizer, rest)
        rest = rest[: place[0]]
    assert [token for part in segments(iter(text), cut) for token in encode(tokenizer, part)] == encode(tokenizer, text)


def test_tokenizers_that_may_not_be_cut_are_not(tokenizers, tmp_path):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    def made(model, before, normalizer=None):
        backend = Tokenizer(model)
        backend.pre_tokenizer = before
        backend.normalizer = normalizer
        backend.save(str(tmp_path / "tokenizer.json"))
        return load_tokenizer("HuggingFaceTokenizer", str(tmp_path / "tokenizer.json"))

    bpe, level = models.BPE({"a": 0, "b": 1}, []), pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert cutter_of(made(bpe, level)) is not None
    assert cutter_of(made(bpe, pre_tokenizers.ByteLevel(add_prefix_space=True))) is None
    assert cutter_of(made(bpe, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))) is None
    assert cutter_of(made(bpe, level, normalizers.Lowercase())) is None
    assert cutter_of(made(models.WordLevel({"a": 0}, unk_token="a"), level)) is None


@given(
    st.lists(st.binary(max_size=40), max_size=12), st.sampled_from([b"\n", b"\n\n", b"<>", None]), st.integers(1, 30), st.integers(1, 50)
)
def test_documents_in_a_file_are_those_of_its_bytes(tmp_path_factory, parts, separator, piece, long):
    path = tmp_path_factory.mktemp("parts") / "x"
    path.write_bytes(b"before" + b"\n".join(parts))
    data = b"\n".join(parts)
    with pytest.MonkeyPatch.context() as patch, path.open("rb") as file:
        patch.setattr(large_documents, "_PIECE_BYTES", piece)
        patch.setattr(large_documents, "LARGE_BYTES", long)
        found = list(documents_in_file(file, 6, 6 + len(data), separator))
        read = [(place, path.read_bytes()[slice(*part)] if isinstance(part, tuple) else bytes(part)) for place, part in found]
    assert [(place - 6, part) for place, part in read] == [(place, bytes(part)) for place, part in documents._pieces(data, separator)]


@given(
    st.recursive(st.text(max_size=40) | st.none() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)),
    st.booleans(),
)
def test_long_strings_come_out_of_json_as_they_went_in(tmp_path_factory, value, ascii_only):
    path = tmp_path_factory.mktemp("line") / "x"
    path.write_bytes(json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch, path.open("rb") as file:
        patch.setattr(large_documents, "_PIECE_BYTES", 7)
        patch.setattr(large_documents, "LARGE_BYTES", 40)
        line, strings = long_strings(file, 0, path.stat().st_size)
        marks = {mark: whole(text) for mark, text in strings.items()}
    assert all(len(json.dumps(text)) > 11 for text in marks.values())

    def restored(found):
        if isinstance(found, list):
            return [restored(entry) for entry in found]
        if isinstance(found, dict):
            return {marks.get(key, key): restored(entry) for key, entry in found.items()}
        return marks.get(found, found) if isinstance(found, str) else found

    assert restored(json.loads(line)) == value


@pytest.fixture
def small(monkeypatch):
    """Long from 5,000 bytes on."""
    for module in (large_documents, readers):
        monkeypatch.setattr(module, "LARGE_BYTES", 5000)
    monkeypatch.setattr(readers, "BATCH_BYTES", 2000)
    monkeypatch.setattr(large_documents, "_PIECE_BYTES", 600)


@pytest.fixture
def corpus(tmp_path):
    """Documents among which some are long: words, one word, escapes, another key that is long, and bad ones."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(["patch", "to\nken", 'say "no"', "日本 é", "\\"], k=k)) for k in (3, 900, 5, 2, 1500, 4)] + [
        "word" * 3000
    ]
    lines = [json.dumps({"text": text, "meta": {"title": "t"}}, ensure_ascii=number % 2 == 0) for number, text in enumerate(texts)]
    lines += [
        json.dumps({"text": "short", "meta": {"title": "t " * 9000}}),
        '{"text": "' + "no end " * 2000,
        json.dumps({"other": "x " * 6000}),
    ]
    lines += ['{"text": "' + "\\q " * 5000 + '", "meta": {"title": "t"}}', json.dumps({"text": "last", "meta": {"title": "t"}})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:5]).encode()))
    (tmp_path / "c.txt").write_text("\n".join(texts))
    return [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.txt")]


@pytest.mark.parametrize("more", [{}, {"patch_align": 4, "append_eod": True}, {"min_tokens": 4000}, {"max_chars": 9000}])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_long_documents_are_written_as_others(tokenizers, corpus, tmp_path, request, more, backend):
    settings = EncodeSettings("HuggingFaceTokenizer", tokenizers["bpe"].name, keys=("text", "meta.title"), backend=backend, **more)
    whole = preprocess(corpus, str(tmp_path / "whole"), settings)
    request.getfixturevalue("small")
    summary = preprocess(corpus, str(tmp_path / "x"), settings)
    assert whole.documents > 5 and whole.bad_lines == summary.bad_lines == 3
    found, expected = everything(tmp_path / "x"), everything(tmp_path / "whole")
    assert found.keys() == expected.keys()
    for name in found:
        # What is wrong with a bad line is said of its part.
        assert found[name] == expected[name] or "bad" in name, name
    places = [
        [(e["file"], e["line"], e.get("byte")) for e in map(json.loads, files["_bad_lines.jsonl"].splitlines())]
        for files in (found, expected)
    ]
    assert places[0] == places[1]


def test_a_long_document_that_shrinks_while_it_is_read_is_told(corpus, small, tmp_path):
    (batch,) = readers.batches([Span(corpus[2])], scratch=tmp_path / "scratch")
    assert batch.is_long
    with open(corpus[2], "rb+") as file:
        file.truncate(100)
    with pytest.raises(DataError, match="has become shorter"):
        list(documents.documents(batch, ("text",), []))
