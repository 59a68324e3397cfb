"""Large documents: split where the ids of the segments are the ids of the text, and written as any other document."""

from __future__ import annotations

import base64
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.errors import DataError
from megatron_patch.preprocess.encode import EncodeSettings
from megatron_patch.preprocess.pipeline import preprocess
from megatron_patch.preprocess.segments import segments, split_point_of
from megatron_patch.preprocess.train_tokenizer import train_tokenizer
from megatron_patch.raw_text import large_documents, parse_documents, readers
from megatron_patch.raw_text.inputs import FileRange
from megatron_patch.raw_text.large_documents import LargeText, load_text
from megatron_patch.tokenizers.base import encode, load_tokenizer
from megatron_patch.tokenizers.byte_level import byte_letters
from megatron_patch.tokenizers.fuzz_strings import adversarial_strings
from megatron_patch.tokenizers.tiktoken import PATTERNS
from tests.preprocess.test_resume import everything

WORDS = [
    *adversarial_strings(count=0),
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
    content = json.loads((folder / "bpe" / "tokenizer.json").read_text())
    (folder / "nfc.json").write_text(json.dumps(content | {"normalizer": {"type": "NFC"}}))
    found["nfc"] = load_tokenizer("HuggingFaceTokenizer", str(folder / "nfc.json"))
    found |= {name: load_tokenizer("SentencePieceTokenizer", str(folder / f"{name}.model")) for name in ("nmt", "identity")}
    return found | {name: load_tokenizer("TikTokenizer", str(folder / "ranks"), tiktoken_pattern=name) for name in PATTERNS}


@pytest.mark.parametrize("name", ["bpe", "nfc", "nmt", "identity", *PATTERNS])
@given(text=TEXTS)
def test_parts_give_the_ids_of_the_whole(tokenizers, name, text):
    tokenizer = tokenizers[name]
    split_point = split_point_of(tokenizer)
    assert split_point is not None
    rest = text
    while (place := split_point(rest)) is not None:
        assert encode(tokenizer, rest[: place[0]]) + encode(tokenizer, rest[place[1] :]) == encode(tokenizer, rest)
        rest = rest[: place[0]]
    assert [token for part in segments(iter(text), split_point) for token in encode(tokenizer, part)] == encode(tokenizer, text)


def test_tokenizers_that_may_not_be_cut_are_not(tokenizers, tmp_path):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    def made(model, before, normalizer=None):
        backend = Tokenizer(model)
        backend.pre_tokenizer = before
        backend.normalizer = normalizer
        backend.save(str(tmp_path / "tokenizer.json"))
        return load_tokenizer("HuggingFaceTokenizer", str(tmp_path / "tokenizer.json"))

    bpe, level = models.BPE({"a": 0, "b": 1}, []), pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert split_point_of(made(bpe, level)) is not None
    assert split_point_of(made(bpe, pre_tokenizers.ByteLevel(add_prefix_space=True))) is None
    assert split_point_of(made(bpe, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))) is None
    assert split_point_of(made(bpe, level, normalizers.NFC())) is not None
    assert split_point_of(made(bpe, level, normalizers.NFKC())) is None
    assert split_point_of(made(bpe, level, normalizers.Lowercase())) is None
    assert split_point_of(made(models.WordLevel({"a": 0}, unk_token="a"), level)) is None


@given(st.text(max_size=60), st.integers(1, 9))
def test_pieces_of_a_file_are_its_text(tmp_path_factory, text, piece):
    path = tmp_path_factory.mktemp("text") / "x"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch, path.open("rb") as file:
        patch.setattr(large_documents, "_PIECE_BYTES", piece)
        assert load_text(LargeText(file, path.stat().st_size)) == text


@pytest.mark.parametrize("data", [b"caf\xe9 au lait", "日本".encode()[:-1]])
def test_a_large_text_that_is_not_utf8_is_a_bad_line(tmp_path, small, data):
    (tmp_path / "a.txt").write_bytes(b"word " * 2000 + data)
    (batch,) = readers.read_batches([FileRange(str(tmp_path / "a.txt"))])
    (document,) = parse_documents.iterate_documents(batch, ("text",), [])
    assert batch.is_large_text and document.texts is None and "not UTF-8" in document.reason


@pytest.fixture
def small(monkeypatch):
    """Documents are large from 5,000 bytes on."""
    for module in (large_documents, readers):
        monkeypatch.setattr(module, "LARGE_BYTES", 5000)
    monkeypatch.setattr(readers, "BATCH_BYTES", 2000)
    monkeypatch.setattr(large_documents, "_PIECE_BYTES", 600)


@pytest.fixture
def corpus(tmp_path):
    """Text files, some of them large: words, one word, and one that is not UTF-8."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(["patch", "to\nken", 'say "no"', "日本 é", "\\"], k=k)) for k in (3, 900, 5, 1500)] + ["word" * 3000]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    (tmp_path / "5.txt").write_bytes(texts[1].encode() + b"\xff")
    return [str(tmp_path / f"{number}.txt") for number in range(6)]


@pytest.mark.parametrize(
    "more", [{}, {"patch_align": 4, "append_eod": True, "prepend_bos": True}, {"min_tokens": 4000}, {"max_chars": 9000}]
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_large_documents_are_written_as_others(tokenizers, corpus, tmp_path, request, more, backend):
    settings = EncodeSettings("HuggingFaceTokenizer", tokenizers["bpe"].name, keys=("text", "meta.title"), backend=backend, **more)
    at_once = preprocess(corpus, str(tmp_path / "at_once"), settings)
    request.getfixturevalue("small")
    summary = preprocess(corpus, str(tmp_path / "x"), settings)
    assert at_once.documents > 1 and at_once.bad_lines == summary.bad_lines == 1
    found, expected = everything(tmp_path / "x"), everything(tmp_path / "at_once")
    assert found.keys() == expected.keys()
    for name in found:
        # The position of the bad byte is counted from the piece that holds it.
        assert found[name] == expected[name] or "bad" in name, name
    counts = ("documents", "tokens", "empty", "filtered", "largest_id", "tokens_per_document")
    assert [getattr(summary, name) for name in counts] == [getattr(at_once, name) for name in counts]


def test_a_large_document_that_shrinks_while_it_is_read_is_told(corpus, small, tmp_path):
    (batch,) = readers.read_batches([FileRange(corpus[1])])
    assert batch.is_large_text
    with open(corpus[1], "rb+") as file:
        file.truncate(100)
    with pytest.raises(DataError, match="became shorter"):
        list(parse_documents.iterate_documents(batch, ("text",), []))
