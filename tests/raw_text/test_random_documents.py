"""Random files of every kind, divided at random, against the reading of the standard library and of pyarrow.

A case is a number: `check(number)` makes a few files out of it, reads them in shards and from a point to resume from, and compares the
documents and the places of bad lines with what `json`, `str.split` and `to_pylist` make of the same data.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import random
import sys
from pathlib import Path

import pytest
import zstandard

from megatron_patch.raw_text import readers
from megatron_patch.raw_text.inputs import FileRange, expand, shard_inputs
from megatron_patch.raw_text.large_documents import load_text
from megatron_patch.raw_text.parse_documents import iterate_documents

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

MARK = codecs.BOM_UTF8
PIECES = [
    "a",
    "Zz ",
    " ",
    "é",
    "日本",
    "😀",
    "\ufeff",
    "\u2028",
    "\x85",
    "\x0b",
    "\r",
    "\n",
    "\r\n",
    "\t",
    "\0",
    '"',
    "\\",
    "/",
    "\\u0041",
    "e\u0301",
    "\x7f",
]
KEYS = [("text",), ("a.b",), ("text", "a.b"), ("a.b.c",), ("é",)]
SEPARATORS = [None, b"\n\n", b"\n", b"---", b"aa", b"aba", b"\r\n", "日".encode()]


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.choice([0, 1, 3, 10, rng.randrange(200)])))


def random_value(rng: random.Random, depth: int = 0):
    kind = rng.randrange(12 if depth < 4 else 8)
    if kind < 3:
        return random_text(rng)
    if kind < 8:
        return [None, True, rng.randrange(-(10**30), 10**30), rng.uniform(-1, 1) * 10.0 ** rng.randrange(-300, 300), float("nan")][kind - 3]
    if kind < 10:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {
        rng.choice(["a", "b", "c", "a.b", "b.c", "text", "é", random_text(rng)]): random_value(rng, depth + 1)
        for _ in range(rng.randrange(5))
    }


def random_line(rng: random.Random) -> bytes:
    document = {key: random_value(rng) for key in rng.sample(["text", "a", "a.b", "é", "x", "a.b.c"], rng.randrange(5))}
    for key in ("text", "é"):
        if rng.random() < 0.7:
            document[key] = random_text(rng)
    if rng.random() < 0.6:
        document["a"] = {"b": random_text(rng) if rng.random() < 0.7 else {"c": random_text(rng)}, "c": random_value(rng)}
    text = json.dumps(document, ensure_ascii=rng.random() < 0.5, separators=rng.choice([(",", ":"), (", ", ": "), (" ,\t", " :  ")]))
    if rng.random() < 0.2:  # what only a part of all parsers accepts, or none
        odd = rng.choice(
            [r'"\ud800"', r'"\udc01\ud83d"', "1e999", "-Infinity", "9" * 400, "[" * 50 + "]" * 50, "01", ".5", "'a'", "1.", "+1"]
        )
        key = rng.choice(["x", "text", "a", r"\ud83d"])
        text = text.replace("{", f'{{"{key}": {odd}{"," if document else ""}', 1)
    line = text.encode()
    if rng.random() < 0.06:
        place = rng.randrange(len(line) + 1)
        line = line[:place] + rng.choice([b"", b"\xff", b"\xed\xa0\x80", b"\\", b'"', b"}"]) + line[place + rng.randrange(2) :]
    if rng.random() < 0.06:
        line = rng.choice([b"", b" ", b"\t \r", b"[]", b"5", b"null", b'"text"', b"{}", line + line, b"[" + line + b"]", MARK + line, MARK])
    return line


def random_lines(rng: random.Random) -> bytes:
    lines = [random_line(rng) + rng.choice([b"", b"\r", b" "]) for _ in range(rng.choice([0, 1, 2, 10, 40]))]
    if next((line for line in lines if line.replace(MARK, b"").strip()), b"").replace(MARK, b"").startswith(b"["):
        lines.insert(0, b"{}")  # a file that begins with an array is refused
    return MARK * (rng.random() < 0.3) + b"\n".join(lines) + b"\n" * rng.randrange(3)


def random_plain(rng: random.Random) -> bytes:
    pieces = [*PIECES, "\n\n", "---", "aa", "aba", "日"]
    data = "".join(rng.choice(pieces) for _ in range(rng.choice([0, 1, 5, 100]))).encode()
    data = data[:16].replace(b"\0", b" ") + data[16:]  # a beginning of characters and zeros in turn looks like UTF-16
    if rng.random() < 0.1:
        place = rng.randrange(len(data) + 1)
        data = data[:place] + b"\xff" + data[place:]
    return MARK * (rng.random() < 0.3) + data


def pieces_of(rng: random.Random, data: bytes) -> list[bytes]:
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice([0, 0, 1, 3])))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def pack(rng: random.Random, suffix: str, data: bytes) -> bytes:
    """Compresses data as several members, streams or frames, each with other parameters."""
    packed = b""
    for piece in pieces_of(rng, data):
        if suffix == ".gz":
            target = io.BytesIO()
            with gzip.GzipFile(rng.choice(["", "name.jsonl"]), "wb", rng.randrange(10), target, mtime=rng.randrange(2)) as file:
                file.write(piece)
            packed += target.getvalue() + bytes(rng.choice([0, 0, 1, 7]))
        elif suffix == ".bz2":
            packed += bz2.compress(piece, rng.randrange(1, 10)) + bytes(rng.choice([0, 0, 1, 7]))
        elif suffix == ".xz":
            check = rng.choice([lzma.CHECK_NONE, lzma.CHECK_CRC32, lzma.CHECK_CRC64, lzma.CHECK_SHA256])
            packed += lzma.compress(piece, check=check, preset=rng.choice([0, 6])) + bytes(rng.choice([0, 0, 4, 12]))
        else:
            parameters = zstandard.ZstdCompressionParameters.from_level(
                rng.choice([-5, 1, 3]), window_log=rng.choice([10, 18, 27, 31]), write_checksum=rng.random() < 0.5
            )
            skipped = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc" * (rng.random() < 0.2)
            if rng.random() < 0.5:
                compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
                packed += skipped + compressor.compress(piece) + compressor.flush() + skipped
            else:
                packed += skipped + zstandard.compress(piece) + skipped
    return packed


def lookup(value, key):
    """The value of a key of up to three names: every way to join them, the longest first name first."""
    names = key.split(".")
    for count in range(len(names), 0, -1):
        first, rest = ".".join(names[:count]), ".".join(names[count:])
        if isinstance(value, dict) and first in value:
            if not rest:
                return value[first]
            if (found := lookup(value[first], rest)) is not KeyError:
                return found
    return KeyError


def is_text(value) -> bool:
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def expected_lines(raw: bytes, keys):
    """(line, texts) of each line, None for a bad one."""
    for number, line in enumerate(raw.split(b"\n"), start=1):
        text = line.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
        if text.encode("utf-8", "surrogateescape").strip():
            try:
                document = json.loads(text)
            except ValueError:
                yield number, None
                continue
            texts = tuple(lookup(document, key) for key in keys)
            yield number, texts if all(map(is_text, texts)) else None


def expected_plain(raw: bytes, keys, separator):
    pieces = [raw.removeprefix(MARK)] if separator is None else raw.removeprefix(MARK).split(separator)
    for number, piece in enumerate(pieces, start=1):
        piece = piece if separator is None else piece.strip(b"\r\n")
        if piece:
            try:
                yield number, (piece.decode(),) * len(keys)
            except UnicodeDecodeError:
                yield number, None


TYPES = [
    arrow.string(),
    arrow.large_string(),
    arrow.string_view(),
    arrow.binary(),
    arrow.large_binary(),
    arrow.binary_view(),
    arrow.dictionary(arrow.int32(), arrow.string()),
    arrow.dictionary(arrow.int16(), arrow.binary()),
]


def random_column(rng: random.Random, rows: int):
    kind = rng.choice(TYPES)
    texts = [random_text(rng) for _ in range(rng.randrange(1, 20))]
    values = [rng.choice(texts) if rng.random() < 0.9 else None for _ in range(rows)]
    if "binary" in str(kind):
        bad = [b"\xff", b"\xed\xa0\x80"]
        values = [rng.choice(bad) if rng.random() < 0.05 else text.encode() if text is not None else None for text in values]
    return arrow.array(values, kind)


def random_table(rng: random.Random) -> bytes:
    rows = rng.choice([0, 1, 2, 30, 100])
    columns = {"x": arrow.array(range(rows))}
    for key in ("text", "é", *(["a.b"] if rng.random() < 0.3 else [])):
        columns[key] = random_column(rng, rows)
    mask = arrow.array([rng.random() < 0.1 for _ in range(rows)], arrow.bool_())
    inside = arrow.StructArray.from_arrays([random_column(rng, rows), random_column(rng, rows)], ["b", "b.c"], mask=mask)
    columns["a"] = inside
    names = list(columns)
    rng.shuffle(names)
    table = arrow.table({name: columns[name] for name in names})
    view = any("view" in str(field.type) for field in table.schema)  # pyarrow does not divide views
    target = io.BytesIO()
    parquet.write_table(
        table,
        target,
        row_group_size=max(1, rows) if view else rng.choice([1, 7, 1000]),
        compression=rng.choice(["none", "snappy", "zstd"]),
        use_dictionary=rng.random() < 0.5,
        store_schema=rng.random() < 0.5,
        data_page_size=rng.choice([64, 1 << 20]),
        data_page_version=rng.choice(["1.0", "2.0"]),
    )
    return target.getvalue()


def expected_rows(data: bytes, keys):
    table = parquet.read_table(io.BytesIO(data))
    for number, row in enumerate(table.to_pylist(), start=1):
        texts = []
        for key in keys:
            value = lookup(row, key)
            try:
                texts.append(value.decode() if isinstance(value, bytes) else value)
            except UnicodeDecodeError:
                texts.append(None)
        yield number, tuple(texts) if all(map(is_text, texts)) else None


def read(parts, keys, separator, resume=(0, None)):
    """[(file, unit after the batch, line in the file or part, texts or None)] of each document and bad line, in order."""
    found, lines, file = [], 0, None
    for batch in readers.read_batches(parts, keys, separator, resume):
        lines, file = (lines if batch.file == file else 0), batch.file
        count = []
        for document in iterate_documents(batch, keys, count):
            texts = tuple(map(load_text, document.texts)) if document.texts is not None else None
            found.append((batch.file, batch.next_unit, lines + document.number, texts))
        lines += count[0]
    return found


def check(number: int, folder: Path) -> None:
    rng = random.Random(number)
    keys, separator = rng.choice(KEYS), rng.choice(SEPARATORS)
    if "a.b.c" in keys and rng.random() < 0.5:
        keys = ("text",)
    paths, expected = [], []
    for index in range(rng.randrange(1, 4)):
        kind = rng.choice([".jsonl", ".jsonl", ".json", ".txt", ".parquet"])
        suffix = rng.choice(["", "", ".gz", ".bz2", ".xz", ".zst"]) if kind != ".parquet" else ""
        raw = {".txt": random_plain, ".parquet": random_table}.get(kind, random_lines)(rng)
        if kind == ".parquet" and "a.b.c" in keys:
            continue
        path = folder / f"{number}-{index}[1]{kind}{suffix}"
        path.write_bytes(pack(rng, suffix, raw) if suffix else raw)
        rows = {".txt": lambda raw: expected_plain(raw, keys, separator), ".parquet": lambda raw: expected_rows(raw, keys)}.get(
            kind, lambda raw: expected_lines(raw, keys)
        )
        paths.append(str(path))
        expected.append(list(rows(raw)))
    if not paths:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BATCH_BYTES", rng.choice([1, 16, 200, 5000, 1 << 20]))
        patch.setattr(readers, "LARGE_BYTES", rng.choice([0, 1 << 25]))
        assert expand(paths) == paths
        whole = read([FileRange(path) for path in paths], keys, separator)
        for index in range(len(paths)):
            assert [(line, texts) for file, _, line, texts in whole if file == index] == expected[index], paths[index]
        if whole:
            file, unit, _, _ = rng.choice(whole)
            rest = read([FileRange(path) for path in paths], keys, separator, (file, unit))
            later = [row for row in whole if row[:2] > (file, unit)]
            assert [(row[0], row[3]) for row in rest] == [(row[0], row[3]) for row in later], (paths, file, unit)
        count = rng.randrange(1, 9)
        sharded = [row for shard in range(count) for row in read(shard_inputs(paths, shard, count), keys, separator)]
        assert [row[3] for row in sharded] == [row[3] for row in whole], (paths, count)
        if paths[0].endswith("jsonl"):
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(paths[0]).read_bytes())))
            assert [(line, texts) for _, _, line, texts in read([FileRange("-")], keys, separator)] == expected[0]
    for path in paths:
        Path(path).unlink()


@pytest.mark.parametrize("group", range(4))
def test_random_files_are_read_as_the_standard_library_reads_them(tmp_path, group):
    for number in range(group * 100, group * 100 + 100):
        check(number, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("group", range(10))
def test_many_random_files_are_read_as_the_standard_library_reads_them(tmp_path, group):
    for number in range(1000 + group * 1000, 2000 + group * 1000):
        check(number, tmp_path)
