"""Where documents come from: shards whose union is everything, tables, separated text, filters; the same bytes as plain lines give."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.data.dataset_metadata import read_metadata
from megatron_patch.data.dataset_paths import expand_prefixes, shard_prefix
from megatron_patch.data.indexed_dataset import IndexedDataset
from megatron_patch.errors import DataError
from megatron_patch.preprocess.encode import EncodeSettings
from megatron_patch.preprocess.merge import merge_datasets
from megatron_patch.preprocess.pipeline import preprocess
from megatron_patch.raw_text import readers
from megatron_patch.raw_text.inputs import FileRange, expand, parse_shard, shard_inputs
from megatron_patch.raw_text.readers import read_batches

ROOT = Path(__file__).parent.parent.parent
# Text that is ids already: what is tested here is not the tokenizer.
SETTINGS = EncodeSettings("NullTokenizer", None, vocab_size=1000, append_eod=True)
TEXTS = [" ".join(str((i * 7 + j) % 900) for j in range(i % 23 + 1)) for i in range(200)]


def lines(texts):
    return "".join(json.dumps({"text": text, "meta": {"n": "1 2"}}) + "\n" for text in texts).encode()


def run(out, inputs, **more):
    settings = EncodeSettings(**{**SETTINGS.__dict__, **more.pop("settings", {})})
    return preprocess([str(path) for path in inputs], str(out), settings, **more)


def files(prefix):
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def documents(prefix):
    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


def test_an_existing_file_is_that_file(tmp_path, monkeypatch):
    for name in ("a[1].jsonl", "a1.jsonl", "a2.jsonl", "*.jsonl"):
        (tmp_path / name).write_bytes(b"{}")
    monkeypatch.chdir(tmp_path)
    assert expand(["a[1].jsonl"]) == ["a[1].jsonl"] and expand(["*.jsonl"]) == ["*.jsonl"]
    assert expand(["a[12].jsonl", "-", "a[1].jsonl"]) == ["a1.jsonl", "a2.jsonl", "-", "a[1].jsonl"]
    (tmp_path / "a[1].jsonl").unlink()
    assert expand(["a[1].jsonl"]) == ["a1.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("b[1].jsonl", "matches no file\n"),
        ("text/aa.jsonl", r"matches no file\n.*\n.*did you mean text/a\.jsonl"),
        (
            "text",
            r"only the folder text: it has 3 files: a\.jsonl, b\.json, c\.jsonl\.gz\n.*\n"
            r".*name the files: --input 'text/\*\.json' 'text/\*\.jsonl' 'text/\*\.jsonl\.gz'$",
        ),
        (".", r"it has 3 files: text/a\.jsonl, .*\n.*\n.*: --input '\./\*\*/\*\.json' '\./\*\*/\*\.jsonl' '\./\*\*/\*\.jsonl\.gz'$"),
        ("other", r"the folder other: it has no such files, but 1 file: readme\.md\n.*\n.*another folder's files"),
        ("empty/", r"the folder empty/: it is empty"),
    ],
)
def test_inputs_that_are_no_file_are_answered_with_what_is_there(tmp_path, monkeypatch, pattern, words):
    monkeypatch.chdir(tmp_path)
    for name in ("text/a.jsonl", "text/b.json", "text/c.jsonl.gz", "other/readme.md"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    Path("empty").mkdir()
    with pytest.raises(DataError, match=words):
        expand([pattern])


@given(st.lists(st.lists(st.integers(0, 60), max_size=8), min_size=1, max_size=5), st.integers(1, 9), st.data())
def test_shards_are_all_lines_once_and_in_order(tmp_path_factory, shapes, count, data):
    """Files of lines of any lengths, with and without a newline at the end, some of them archives."""
    folder, paths, everything = tmp_path_factory.mktemp("shards"), [], []
    for number, lengths in enumerate(shapes):
        rows = [b"%d:%d" % (number, row) + b"x" * length for row, length in enumerate(lengths)]
        raw = b"\n".join(rows) + data.draw(st.sampled_from([b"", b"\n"])) if rows else b""
        packed = data.draw(st.booleans())
        paths.append(str(folder / (f"{number}.jsonl" + (".gz" if packed else ""))))
        Path(paths[-1]).write_bytes(gzip.compress(raw) if packed else raw)
        everything += rows
    found = []
    for number in range(count):
        for batch in read_batches(shard_inputs(paths, number, count)):
            found += [line for line in bytes(batch.read()).split(b"\n") if line]
    assert found == everything


@pytest.mark.parametrize("packed", [False, True])
def test_merged_shards_are_one_run(tmp_path, packed, monkeypatch):
    monkeypatch.setattr(readers, "BATCH_BYTES", 500)
    for number in range(5):
        raw = lines(TEXTS[number * 40 : number * 40 + 40])
        if packed:
            (tmp_path / f"{number}.jsonl.gz").write_bytes(gzip.compress(raw))
        else:
            (tmp_path / f"{number}.jsonl").write_bytes(raw)
    inputs = [tmp_path / "*.jsonl*"]
    run(tmp_path / "whole", inputs)
    for count in (1, 3, 7):
        sizes = []
        for number in range(count):
            out = shard_prefix(str(tmp_path / f"n{count}"), number, count)
            sizes.append(run(out, inputs, shard=(number, count)).documents)
        shards = expand_prefixes(str(tmp_path / f"n{count}_shard-*_text_document"))
        assert len(shards) == count and sum(sizes) == 200
        assert packed or max(sizes) < 2 * 200 / count + 5
        merge_datasets(shards, str(tmp_path / f"merged{count}"))
        assert files(tmp_path / f"merged{count}") == files(tmp_path / "whole_text_document")


def test_a_shard_may_be_empty_and_standard_input_has_none(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(["1 2 3"]))
    sizes = [run(tmp_path / f"s{n}", [tmp_path / "a.jsonl"], shard=(n, 4)).documents for n in range(4)]
    assert sorted(sizes) == [0, 0, 0, 1]
    assert read_metadata(str(tmp_path / "s1_text_document")) is not None
    with pytest.raises(DataError, match="standard input"):
        shard_inputs(["-"], 0, 2)


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("2/8", {}, (2, 8)),
        ("slurm", {"ID": 3, "COUNT": 4, "MIN": 0, "MAX": 3}, (3, 4)),
        ("slurm/64", {"ID": 7, "COUNT": 2, "MIN": 3, "MAX": 7}, (7, 64)),
        ("slurm", {"ID": 7, "COUNT": 2, "MIN": 3, "MAX": 7}, "an array of 2 tasks from 3 to 7"),
        ("slurm", {}, "needs the variable SLURM_ARRAY_TASK_ID"),
        ("8/8", {}, "i from 0 to n - 1"),
        ("slurm/4", {"ID": 4}, "i from 0 to n - 1"),
        ("half", {}, "i/n, slurm/n or slurm"),
    ],
)
def test_shards_by_name(text, environment, expected):
    variables = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in environment.items()}
    if isinstance(expected, tuple):
        assert parse_shard(text, variables) == expected
    else:
        with pytest.raises(DataError, match=expected):
            parse_shard(text, variables)


def test_the_slurm_template_runs_the_tool(tmp_path):
    """The script as Slurm starts it, its paths replaced, two tasks of two, then once more for one that had finished."""
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    text = (ROOT / "examples" / "slurm" / "preprocess_array.sbatch").read_text()
    replacements = {"SHARDS=64 ": "SHARDS=2 ", "/data/raw/*.jsonl.zst": f"{tmp_path}/*.jsonl", "/data/tokens/web ": f"{tmp_path}/web "}
    replacements |= {
        'HuggingFaceTokenizer --tokenizer-model "$TOKENIZER"': "NullTokenizer --vocab-size 1000",
        "python -m": f"{sys.executable} -m",
    }
    for old, new in replacements.items():
        assert old in text, old
        text = text.replace(old, new)
    (tmp_path / "job.sh").write_text(text)
    for task in (0, 1, 1):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLURM_ARRAY_TASK_ID": str(task), "SLURM_CPUS_PER_TASK": "1"}
        result = subprocess.run(["bash", str(tmp_path / "job.sh")], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    assert "already finished" in result.stderr
    merge_datasets(expand_prefixes(f"{tmp_path}/web_shard-*_text_document"), str(tmp_path / "all"))
    run(tmp_path / "whole", [tmp_path / "a.jsonl"])
    assert files(tmp_path / "all") == files(tmp_path / "whole_text_document")


@pytest.fixture
def table():
    return pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")


@pytest.mark.parametrize("workers", [1, 2])
def test_tables_give_what_lines_give(tmp_path, table, monkeypatch, workers):
    arrow, parquet = table
    monkeypatch.setattr(readers, "BATCH_BYTES", 700)
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    rows = {"other": list(range(200)), "text": TEXTS, "meta": [{"n": "1 2", "m": 3}] * 200}
    parquet.write_table(arrow.table(rows), tmp_path / "a.parquet", row_group_size=37)
    keys = {"settings": {"keys": ("text", "meta.n")}}
    one = run(tmp_path / "lines", [tmp_path / "a.jsonl"], **keys)
    two = run(tmp_path / "rows", [tmp_path / "a.parquet"], workers=workers, **keys)
    for ours, theirs in zip(two.outputs, one.outputs, strict=True):
        assert files(ours) == files(theirs)
    cut = [batch.next_unit for batch in read_batches([FileRange(str(tmp_path / "a.parquet"))])]
    assert len(cut) > 5 and cut[-1] == 200


def test_what_is_wrong_with_tables_is_told(tmp_path, table):
    arrow, parquet = table
    parquet.write_table(arrow.table({"text": ["1 2", None, "3"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    summary = run(tmp_path / "x", [tmp_path / "a.parquet"])
    assert (summary.documents, summary.bad_lines) == (2, 1)
    assert json.loads(Path(summary.bad_lines_file).read_text())["line"] == 2
    for key, words in (("content", "no column 'content'.*\n.*text, n"), ("n", "column 'n' holds int64")):
        with pytest.raises(DataError, match=words):
            run(tmp_path / "y", [tmp_path / "a.parquet"], settings={"keys": (key,)})
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"b\.parquet cannot be read"):
        run(tmp_path / "z", [tmp_path / "b.parquet"])


def test_without_pyarrow_tables_are_refused_with_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"(?s)needs pyarrow.*pip install .*megatron_patch\[parquet\]"):
        run(tmp_path / "x", [tmp_path / "a.parquet"])


@pytest.mark.parametrize("separator", [b"\n\n", b"<|doc|>", b"%"])
@pytest.mark.parametrize("packed", [False, True])
def test_separated_text_is_cut_where_pythons_split_cuts(tmp_path, separator, packed, monkeypatch):
    for size in (5, 64, 1 << 20):
        monkeypatch.setattr(readers, "BATCH_BYTES", size)
        raw = separator.join([b"1 2", b"3\n4", b"", b"\n5", b"6", b"\n7\n"]) + separator + b"8\n"
        path = tmp_path / f"{size}{'.txt.gz' if packed else '.txt'}"
        path.write_bytes(gzip.compress(raw) if packed else raw)
        run(tmp_path / f"x{size}", [path], separator=separator)
        expected = [[int(word) for word in piece.split()] for piece in raw.split(separator) if piece.strip(b"\n")]
        assert documents(tmp_path / f"x{size}_text_document") == [[*ids, 999] for ids in expected]


def test_filters_leave_out_and_count(tmp_path):
    texts = ["1", "1 2", "1 2 3", "10 20 30 40", "100 200", ""]
    (tmp_path / "a.jsonl").write_bytes(lines(texts))

    def kept(**limits):
        summary = run(tmp_path / "x", [tmp_path / "a.jsonl"], settings=limits, overwrite=True)
        assert summary.documents + summary.filtered + summary.empty == 6 and summary.empty == 1
        return [" ".join(map(str, ids[:-1])) for ids in documents(tmp_path / "x_text_document")]

    full = texts[:-1]
    assert kept(min_tokens=2) == [text for text in full if len(text.split()) >= 2]
    assert kept(max_tokens=2) == [text for text in full if len(text.split()) <= 2]
    assert kept(min_chars=3) == [text for text in full if len(text) >= 3]
    assert kept(max_chars=5, min_tokens=2) == ["1 2", "1 2 3"]
