"""A byte-order mark of UTF-8 is no part of any document, wherever a file is read from; other encodings are named."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import sys

import pytest
import zstandard

from megatron_patch.errors import DataError
from megatron_patch.raw_text import readers
from megatron_patch.raw_text.encodings import byte_order_mark
from megatron_patch.raw_text.inputs import FileRange, shard_inputs
from megatron_patch.raw_text.large_documents import load_text
from megatron_patch.raw_text.parse_documents import parse_batch
from megatron_patch.raw_text.readers import read_batches

MARK = codecs.BOM_UTF8
PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
TEXTS = ["first", "\ufeffsecond", "é\ufeff", "last"]
LINES = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()


def documents(parts, separator=None, resume=(0, None)):
    batches = [parse_batch(batch, ("text",)) for batch in read_batches(parts, separator=separator, resume=resume)]
    assert not any(batch.bad for batch in batches)
    return [(load_text(text), batch.batch.next_unit) for batch in batches for text in batch.columns[0]]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("kind", ["lines", "separated", "whole", "large"])
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_byte_order_mark_is_skipped(tmp_path, monkeypatch, suffix, kind, size):
    monkeypatch.setattr(readers, "BATCH_BYTES", size)
    monkeypatch.setattr(readers, "LARGE_BYTES", 0 if kind == "large" else 1 << 25)
    raw = LINES if kind == "lines" else "%%".join(TEXTS).encode()
    path = tmp_path / f"a{'.jsonl' if kind == 'lines' else '.txt'}{suffix}"
    path.write_bytes(PACK[suffix](MARK + raw))
    separator = b"%%" if kind == "separated" else None
    found = documents([FileRange(str(path))], separator)
    expected = ["%%".join(TEXTS)] if kind in ("whole", "large") else TEXTS
    assert [text for text, _ in found] == expected and found[-1][1] == len(MARK + raw)
    for _, unit in found:
        rest = documents([FileRange(str(path))], separator, (0, unit))
        assert rest == [(text, end) for text, end in found if end > unit]
    if kind == "lines" and not suffix:
        for count in (2, 3, 60):
            parts = [part for number in range(count) for part in shard_inputs([str(path)], number, count)]
            assert [text for text, _ in documents(parts)] == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.txt.gz", "a.jsonl.zst"])
def test_a_file_of_nothing_but_a_mark_has_no_document(tmp_path, name):
    (tmp_path / name).write_bytes(PACK[name[name.rindex(".") :] if name.count(".") > 1 else ""](MARK))
    for separator in (None, b"\n\n"):
        assert documents([FileRange(str(tmp_path / name))], separator) == []


def test_a_byte_order_mark_of_standard_input_and_the_place_of_a_bad_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(MARK + LINES)))
    assert [text for text, _ in documents([FileRange("-")])] == TEXTS
    (tmp_path / "a.jsonl").write_bytes(MARK + b"{}\n" + LINES + b"{}\n")
    (batch,) = read_batches([FileRange(str(tmp_path / "a.jsonl"))])
    assert [(line, batch.start + offset) for line, offset, _ in parse_batch(batch, ("text",)).bad] == [(1, 0), (6, 6 + len(LINES))]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json.gz", "a.txt.xz", "-"])
def test_other_encodings_are_named(tmp_path, monkeypatch, encoding, name):
    data = LINES.decode().encode(encoding)
    path = tmp_path / name
    path.write_bytes(PACK[path.suffix if name.count(".") > 1 else ""](data))
    words = f"looks like UTF-{encoding[4:6]} {'big' if encoding.endswith('be') else 'little'} endian\n.*UTF-8.*\n.*iconv -f {encoding[:6]}"
    for separator in (None, b"%"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        with pytest.raises(DataError, match=f"(?i){words}"):
            documents([FileRange(name if name == "-" else str(path))], separator)


def test_a_shard_that_does_not_begin_at_the_mark_names_the_encoding(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(99)), "utf-16")
    (part,) = shard_inputs([str(tmp_path / "a.jsonl")], 2, 3)
    with pytest.raises(DataError, match="UTF-16"):
        documents([part])


@pytest.mark.parametrize(
    "head", [b"", b"\xef", b"\xef\xbb", b"a\0b", b"{}", b"\0" * 16, b"ab\0\0ab\0\0", b"a\0", b"\0a\0b\0ab", bytes(range(16))]
)
def test_short_and_odd_beginnings_are_no_mark(head):
    assert byte_order_mark(head, "x") == 0


@pytest.mark.parametrize("text", ["中文文本没有一个字母全是汉字", '\n{"文":"中"}\n', "ab", "中 a国\r\n１"])
def test_short_and_chinese_text_in_utf_16_is_recognized(text):
    assert byte_order_mark(text.encode()[:16], "x") == 0
    with pytest.raises(DataError, match="UTF-16 little endian"):
        byte_order_mark(text.encode("utf-16-le")[:16], "x")


@pytest.mark.parametrize("encoding", ["gbk", "gb18030", "big5", "shift_jis", "euc_jp", "euc_kr", "cp1251", "latin-1"])
def test_other_bytes_are_not_taken_for_utf_16(encoding):
    for text in (
        "中文文本一中文文本一",
        "日本語のテキスト、です。",
        "カタカナ語",
        "한국어 문장입니다",
        "русский текст здесь",
        "déjà vu à côté",
        "中a文b本c",
    ):
        data = text.encode(encoding, "ignore")
        if len(data) >= 8:
            assert byte_order_mark(data[:16], "x") == 0


def test_the_marks_that_others_keep_in_tables_are_kept(tmp_path):
    """pyarrow and datasets return a text of a table as it was stored."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    assert parquet.read_table(tmp_path / "a.parquet").column("text").to_pylist() == TEXTS
    assert [text for text, _ in documents([FileRange(str(tmp_path / "a.parquet"))])] == TEXTS
