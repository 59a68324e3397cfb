"""Documents without a token: left out and counted, or with keep_empty the bytes that Megatron's tool writes."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_patch.data.dataset_paths import expand_prefixes, shard_prefix
from megatron_patch.data.indexed_dataset import IndexedDataset
from megatron_patch.data.inspect import integrity_problems
from megatron_patch.errors import DataError
from megatron_patch.preprocess.encode import Encoder, EncodeSettings
from megatron_patch.preprocess.merge import merge_datasets
from megatron_patch.preprocess.pipeline import preprocess
from megatron_patch.preprocess.summary import LengthSample
from megatron_patch.preprocess.train_tokenizer import train_tokenizer
from megatron_patch.raw_text import readers
from megatron_patch.raw_text.parse_documents import parse_batch
from megatron_patch.raw_text.readers import Batch

EOD, BOS = 999, 0
TEXTS = ["" if i % 5 in (0, 1) else " ".join(str(i * j % 900 + 1) for j in range(i % 7 + 1)) for i in range(200)]


def settings(**more):
    return EncodeSettings("NullTokenizer", None, **{"vocab_size": 1000, "append_eod": True, "keep_empty": True, **more})


def megatron(texts, dtype="<u2", eod=EOD):
    """The files of Megatron's builder, from the description of the format, for documents that its tool encodes: it appends the end of a
    document only to ids, and counts no sequence without ids.
    """
    data = [[*map(int, text.split()), *([eod] if text else [])] for text in texts]
    lengths = [len(ids) for ids in data if ids]
    offsets = np.cumsum([0, *lengths])[:-1] * 2 if lengths else []
    bounds = [0, *np.cumsum([bool(ids) for ids in data])]
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(lengths), len(bounds))
    index += np.array(lengths, "<i4").tobytes() + np.array(offsets, "<i8").tobytes() + np.array(bounds, "<i8").tobytes()
    return np.array([id_ for ids in data for id_ in ids], dtype).tobytes(), index


def files(prefix):
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BATCH_BYTES", 300)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text, "n": "5 6"}) + "\n" for text in TEXTS))
    return str(path)


@pytest.mark.parametrize("workers", [1, 2])
def test_they_are_kept_as_megatron_keeps_them(tmp_path, corpus, workers):
    summary = preprocess([corpus], str(tmp_path / "x"), settings(keys=("text", "n")), workers=workers)
    assert files(summary.outputs[0]) == megatron(TEXTS) and files(summary.outputs[1]) == megatron(["5 6"] * 200)
    assert (summary.documents, summary.empty, summary.kept_empty) == (400, 0, 80)
    dataset = IndexedDataset(summary.outputs[0])
    assert not integrity_problems(dataset)
    assert summary.tokens_per_document[:2] == (0, pytest.approx(np.median([len(text.split()) + 1 if text else 0 for text in TEXTS]), abs=1))
    assert LengthSample.of(dataset).quantiles() == summary.tokens_per_document


def test_they_are_left_out_and_counted_otherwise(tmp_path, corpus):
    summary = preprocess([corpus], str(tmp_path / "x"), settings(keep_empty=False))
    assert files(summary.outputs[0]) == megatron([text for text in TEXTS if text])
    assert (summary.documents, summary.empty, summary.kept_empty) == (120, 80, 0)


def test_shards_resumed_runs_shuffled_and_unique_documents(tmp_path, corpus, monkeypatch):
    for number in range(5):
        out = shard_prefix(str(tmp_path / "s"), number, 5)
        preprocess([corpus], out, settings(), shard=(number, 5))
    merge_datasets(expand_prefixes(str(tmp_path / "s_shard-*_text_document")), str(tmp_path / "merged"))
    assert files(tmp_path / "merged") == megatron(TEXTS)

    from megatron_patch.preprocess import pipeline

    plain = readers.read_batches
    for stop in (1, 5, 9):
        monkeypatch.setattr(pipeline, "read_batches", lambda *args, stop=stop: interrupted(plain(*args), stop))
        with pytest.raises(DataError, match="interrupted"):
            preprocess([corpus], str(tmp_path / f"r{stop}"), settings(), save_seconds=0.0)
        monkeypatch.setattr(pipeline, "read_batches", plain)
        if stop == 5:
            with pytest.raises(DataError, match="keep_empty was True, now None"):
                preprocess([corpus], str(tmp_path / f"r{stop}"), settings(keep_empty=False), resume=True)
        preprocess([corpus], str(tmp_path / f"r{stop}"), settings(), resume=True)
        assert files(tmp_path / f"r{stop}_text_document") == megatron(TEXTS)

    unique = preprocess([corpus], str(tmp_path / "unique"), settings(), dedup=True)
    assert files(unique.outputs[0]) == megatron(list(dict.fromkeys(TEXTS)))
    assert unique.duplicates == len(TEXTS) - len(set(TEXTS)) and unique.kept_empty == 1
    shuffled = preprocess([corpus], str(tmp_path / "shuffled"), settings(), shuffle_seed=3)
    dataset = IndexedDataset(shuffled.outputs[0])
    assert (dataset.num_documents, dataset.num_sequences) == (200, 120) and not integrity_problems(dataset)
    again = merge_datasets([str(tmp_path / "merged")], str(tmp_path / "again"), shuffle_seed=3)
    assert files(again.output) == files(shuffled.outputs[0])


@pytest.mark.parametrize("more", [{}, {"patch_align": 4}, {"append_eod": False, "patch_align": 3}, {"append_eod": False}])
@pytest.mark.parametrize("prepend_bos", [False, True])
def test_of_equal_documents_one_empty_one_is_kept_and_counted(tmp_path, prepend_bos, more):
    """The numbers are counted in the outputs: documents of the length of an empty one and without a token of their own."""
    texts = {"text": ["5", "", "5", "", ""], "t2": ["", "7 8", "", "1", ""], "t3": ["1", "2", "3", "4", "5"]}
    rows = zip(*texts.values(), strict=True)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(dict(zip(texts, row, strict=True))) + "\n" for row in rows))
    train_tokenizer([str(tmp_path / "a.jsonl")], str(tmp_path / "t"), 257)
    options = {"keys": tuple(texts), "append_eod": True, "keep_empty": True, "prepend_bos": prepend_bos, **more}
    how = EncodeSettings("HuggingFaceTokenizer", str(tmp_path / "t"), backend="reference", **options)
    assert preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "x"), how).kept_empty == 6
    summary = preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "x"), how, dedup=True, overwrite=True)
    assert summary.kept_empty == 2 and summary.documents == 2 + 3 + 5
    datasets = [IndexedDataset(prefix) for prefix in summary.outputs]
    assert sum(dataset.num_documents - dataset.num_sequences for dataset in datasets) == (0 if prepend_bos else 2)


def interrupted(batches, stop):
    for number, batch in enumerate(batches):
        if number == stop:
            raise DataError("interrupted")
        yield batch


def test_a_run_of_an_earlier_version_is_recognized(tmp_path):
    """It recorded no keep_empty."""
    from megatron_patch.preprocess.progress_log import identity

    assert "keep_empty" not in identity((), settings(keep_empty=False), (None, None))["settings"]
    assert identity((), settings(), (None, None))["settings"]["keep_empty"] is True


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, [[], [5, EOD]]),
        ({"append_eod": False}, [[], [5]]),
        ({"patch_align": 4}, [[], [5, EOD, EOD, EOD]]),
        ({"min_tokens": 1}, [[5, EOD]]),
        ({"min_chars": 1}, [[5, EOD]]),
        ({"max_tokens": 0}, [[]]),
        ({"max_chars": 0}, [[]]),
    ],
)
def test_with_other_settings(more, expected):
    encoder = Encoder(settings(**more))
    encoded = encoder.encode(parse_batch(Batch("x", data=b'{"text": ""}\n{"text": "5"}\n'), ("text",)))
    column = encoded.columns[0]
    ends = np.cumsum(column.lengths).tolist()
    assert [column.tokens[end - length : end].tolist() for end, length in zip(ends, column.lengths.tolist(), strict=True)] == expected
    assert (encoded.empty, encoded.filtered) == (expected.count([]), 2 - len(expected))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("prepend_bos", [False, True])
def test_with_a_real_tokenizer(tmp_path, backend, prepend_bos):
    """A tokenizer of Megatron's that adds a beginning makes ids out of an empty text, to which the end is appended."""
    (tmp_path / "a.txt").write_text("some text to learn from, some more text")
    train_tokenizer([str(tmp_path / "a.txt")], str(tmp_path / "t"), 300)
    how = EncodeSettings(
        "HuggingFaceTokenizer", str(tmp_path / "t"), append_eod=True, prepend_bos=prepend_bos, keep_empty=True, backend=backend
    )
    encoder = Encoder(how)
    texts = ["", "some text", "", ""]
    random.Random(1).shuffle(texts)
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    column = encoder.encode(parse_batch(Batch("x", data=data), ("text",))).columns[0]
    count = len(encoder.tokenizer.encode_flat(["some text"])[0])
    assert column.lengths.tolist() == [count + 1 + prepend_bos if text else 2 * prepend_bos for text in texts]
    assert column.tokens.size == column.lengths.sum()
