"""Which columns of a table hold text, and which texts are read. The reference is pyarrow's to_pylist."""

from __future__ import annotations

import pytest

from megatron_patch.errors import DataError
from megatron_patch.raw_text import parquet as module
from megatron_patch.raw_text.inputs import FileRange
from megatron_patch.raw_text.parse_documents import parse_batch
from megatron_patch.raw_text.readers import read_batches

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = ["one", None, "", "zwei é", "one", "\ufeff日本", None, "x" * 300]
TYPES = {
    "string": arrow.string(),
    "large_string": arrow.large_string(),
    "string_view": arrow.string_view(),
    "binary": arrow.binary(),
    "large_binary": arrow.large_binary(),
    "binary_view": arrow.binary_view(),
    "fixed-size binary": arrow.binary(4),
    "dictionary": arrow.dictionary(arrow.int8(), arrow.string()),
    "dictionary of bytes": arrow.dictionary(arrow.int32(), arrow.binary()),
    "dictionary of fixed-size bytes": arrow.dictionary(arrow.int32(), arrow.binary(4)),
}


def read(path, *keys):
    """The texts of each key and the bad rows, by their index in the file."""
    columns, bad, rows = [[] for _ in keys], {}, 0
    for batch in read_batches([FileRange(str(path))], keys):
        parsed = parse_batch(batch, keys)
        for column, texts in zip(columns, parsed.columns, strict=True):
            column += texts
        bad |= {rows + number - 1: reason for number, _, reason in parsed.bad}
        rows += parsed.lines
    return columns, bad


@pytest.mark.parametrize("store_schema", [True, False])
@pytest.mark.parametrize("kind", TYPES)
def test_text_of_every_type_is_read(tmp_path, kind, store_schema):
    known = ["wör", None, "abcd", "日a", "wör", "\ufeffa", None, "\0aé"] if "fixed" in kind else TEXTS
    values = [text.encode() if text is not None and "b" in kind.replace("large", "") else text for text in known]
    column = arrow.array(values, TYPES[kind])
    inside = arrow.StructArray.from_arrays([column, column], ["b", "c.d"], mask=arrow.array([False, True] + [False] * 6))
    table = arrow.table({"text": column, "a": inside, "x.y": column, "n": range(8)})
    rows = 8 if "view" in kind else 3  # pyarrow does not divide views
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=rows, store_schema=store_schema)
    for key in ("text", "a.b", "a.c.d", "x.y"):
        (texts,), bad = read(tmp_path / "a.parquet", key)
        assert texts == [text for text in known if text is not None]
        assert bad == {number: f"key {key!r} is null, not a string" for number, text in enumerate(known) if text is None}


def test_bytes_that_are_not_utf8_are_bad_rows(tmp_path):
    values = [b"fine", b"\xff", None, b"caf\xc3\xa9", b"\xed\xa0\x80"]
    for name, column in (("bytes", arrow.array(values)), ("strings", arrow.array(values).view(arrow.string()))):
        parquet.write_table(arrow.table({"text": column}), tmp_path / f"{name}.parquet")
        (texts,), bad = read(tmp_path / f"{name}.parquet", "text")
        assert texts == ["fine", "café"]
        assert list(bad) == [1, 2, 4] and bad[1] == bad[4] == "key 'text' is not UTF-8"


@pytest.mark.parametrize(
    ("table", "key", "expected"),
    [
        ({"a.b": ["literal"] * 3, "a": [{"b": "nested"}] * 3}, "a.b", "literal"),
        ({"a": [{"b": "nested"}] * 3, "a.b": ["literal"] * 3}, "a.b", "literal"),
        ({"a": [{"b": {"c": "x"}, "b.c": "y"}] * 3}, "a.b.c", "y"),
        ({"a.b": [{"d": "x"}] * 3, "a": [{"b": {"c": "y"}}] * 3}, "a.b.c", "y"),
    ],
)
def test_a_key_with_a_dot_is_literal_first_and_nested_second(tmp_path, table, key, expected):
    parquet.write_table(arrow.table({"first": ["f"] * 3, **table}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", key, "first") == ([[expected] * 3, ["f"] * 3], {})


@pytest.mark.parametrize(
    ("table", "key", "words"),
    [
        (
            {"a": [{"b": "x", "c": {"d": 1}}], "e.f": ["x"], "g": [["x"]]},
            "text",
            r"no column 'text'\n.*its columns: a\.b, a\.c\.d, e\.f, g\n",
        ),
        ({"a": [{"b": "x"}]}, "a", r"column 'a' holds struct<b: string>\n.*strings, or of bytes that are UTF-8\n"),
        ({"a": [{"b": "x"}]}, "a.c", "no column 'a.c'"),
        ({"a": [["x"]]}, "a", "holds list"),
        ({"a": [None]}, "a", "holds null"),
        ({"a": [1]}, "a.b", "no column 'a.b'"),
        ({f"c{number}": ["x"] for number in range(999)}, "text", r"c48, c49\n"),
    ],
)
def test_other_columns_are_refused(tmp_path, table, key, words):
    parquet.write_table(arrow.table(table), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=words):
        read(tmp_path / "a.parquet", key)


@pytest.mark.parametrize("key", ["text", "a.b"])
def test_two_columns_of_one_name_are_refused(tmp_path, key):
    inside = arrow.StructArray.from_arrays([arrow.array(["x"]), arrow.array(["y"])], ["b", "b"])
    columns = [arrow.array(["one"]), arrow.array(["two"]), inside, arrow.array(["three"])]
    parquet.write_table(arrow.table(columns, names=["text", "text", "a", "other"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"has several columns '{key[-1] if '.' in key else key}'.*\n.*different names\n.*rename"):
        read(tmp_path / "a.parquet", key)
    assert read(tmp_path / "a.parquet", "other") == ([["three"]], {})


def test_a_table_with_both_a_column_and_a_field_of_one_name_takes_little_memory(tmp_path, monkeypatch):
    """pyarrow keeps the dictionary of one of them: the other is read row by row, and a batch holds one long text, not all of them."""
    sizes = []
    plain = module._divided
    monkeypatch.setattr(module, "_divided", lambda arrow, batch, *more: sizes.append(batch.num_rows) or plain(arrow, batch, *more))
    table = {"a": [{"b": "nested"}] * 5, "a.b": ["x" * 1000] * 5}
    parquet.write_table(arrow.table(table), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", "a.b")[0] == [["x" * 1000] * 5] and sizes == [1] * 5
    for kind in (arrow.string_view(), arrow.binary_view(), arrow.large_binary()):
        parquet.write_table(arrow.table({**table, "a.b": arrow.array(["x", "y", None, "x", ""], kind)}), tmp_path / "b.parquet")
        assert read(tmp_path / "b.parquet", "a.b")[0] == [["x", "y", "x", ""]]
