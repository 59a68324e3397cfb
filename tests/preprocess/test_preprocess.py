"""Text to datasets: the same bytes for any workers and archives, the reference's ids, and nothing lost or left behind when it fails."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import itertools
import json
import lzma
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard

from megatron_patch.data.dataset_metadata import read_metadata
from megatron_patch.data.indexed_dataset import IndexedDataset
from megatron_patch.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_patch.data.inspect import integrity_problems
from megatron_patch.errors import DataError
from megatron_patch.preprocess import encode as encode_module
from megatron_patch.preprocess import summary as summary_module
from megatron_patch.preprocess import worker_process, workers
from megatron_patch.preprocess.encode import Encoder, EncodeSettings, load_checked_tokenizer
from megatron_patch.preprocess.fast_encoder import FastokensEncoder, make_fast_encoder
from megatron_patch.preprocess.pipeline import preprocess
from megatron_patch.preprocess.train_tokenizer import train_tokenizer
from megatron_patch.raw_text import readers
from megatron_patch.raw_text.inputs import FileRange
from megatron_patch.raw_text.parse_documents import parse_batch
from megatron_patch.raw_text.readers import read_batches
from megatron_patch.tokenizers.base import encode, load_tokenizer
from megatron_patch.tokenizers.fuzz_strings import adversarial_strings

ROOT = Path(__file__).parent.parent.parent
TEXTS = [f"document {i}: " + " ".join(f"word{j * i % 17}" for j in range(i % 40 + 1)) + "é\n日本" * (i % 3) for i in range(400)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text, "meta": {"title": f"t{i}"}}) + "\n" for i, text in enumerate(TEXTS)))
    train_tokenizer([str(folder / "a.jsonl")], str(folder / "tokenizer"), 400)
    return folder


def settings(folder, **more):
    return EncodeSettings("HuggingFaceTokenizer", str(folder / "tokenizer"), **{"append_eod": True, **more})


def run(folder, out, inputs=None, workers=1, **more):
    options = {key: more.pop(key) for key in ("on_bad_line", "overwrite", "resume", "shard", "separator", "save_seconds") if key in more}
    return preprocess(inputs or [str(folder / "a.jsonl")], str(out), settings(folder, **more), workers=workers, **options)


def contents(prefix):
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def test_documents_are_the_reference_s_ids_in_order(folder, tmp_path):
    summary = run(folder, tmp_path / "x")
    dataset = IndexedDataset(str(tmp_path / "x_text_document"))
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    eod = reference.token_to_id("<|endoftext|>")
    assert [dataset[i].tolist() for i in range(len(dataset))] == [[*reference.encode(text).ids, eod] for text in TEXTS]
    assert summary.documents == len(TEXTS) and summary.tokens == dataset.num_tokens
    info = read_metadata(str(tmp_path / "x_text_document"))
    assert info.vocab_size == reference.get_vocab_size() and info.eod_id == eod and info.tokens == dataset.num_tokens
    assert not integrity_problems(dataset)


def test_workers_and_archives_change_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BATCH_BYTES", 3000)
    run(folder, tmp_path / "x")
    expected = contents(tmp_path / "x_text_document")
    raw = (folder / "a.jsonl").read_bytes()
    half = raw.index(b"\n", len(raw) // 2) + 1
    packed = {
        "b.jsonl.gz": gzip.compress(raw),
        "b.jsonl.bz2": bz2.compress(raw),
        "b.jsonl.xz": lzma.compress(raw),
        # Two frames in one file, as many tools write them.
        "b.jsonl.zst": zstandard.compress(raw[:half]) + zstandard.compress(raw[half:]),
        "b.json": raw.rstrip(b"\n"),
    }
    for number, (name, data) in enumerate(packed.items()):
        (tmp_path / name).write_bytes(data)
        run(folder, tmp_path / f"y{number}", [str(tmp_path / name)])
        assert contents(tmp_path / f"y{number}_text_document") == expected, name
    for count in (2, 3):
        run(folder, tmp_path / f"w{count}", workers=count)
        assert contents(tmp_path / f"w{count}_text_document") == expected
    (tmp_path / "part1.jsonl").write_bytes(raw[:half])
    (tmp_path / "part2.jsonl").write_bytes(raw[half:])
    run(folder, tmp_path / "globbed", [str(tmp_path / "part*.jsonl")], workers=2)
    assert contents(tmp_path / "globbed_text_document") == expected


def test_text_files_and_nested_keys(folder, tmp_path):
    (tmp_path / "one.txt").write_text("one document\nof two lines")
    run(folder, tmp_path / "t", [str(tmp_path / "one.txt")])
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(folder / "tokenizer"))
    dataset = IndexedDataset(str(tmp_path / "t_text_document"))
    assert len(dataset) == 1 and tokenizer.decode(dataset[0][:-1].tolist()) == "one document\nof two lines"
    summary = run(folder, tmp_path / "k", keys=("text", "meta.title"))
    assert summary.outputs == (f"{tmp_path}/k_text_document", f"{tmp_path}/k_meta_title_document")
    titles = IndexedDataset(summary.outputs[1])
    assert tokenizer.decode(titles[7][:-1].tolist()) == "t7"


def test_beginnings_ends_and_alignment_only_where_asked_for(folder, tmp_path):
    run(folder, tmp_path / "bare", append_eod=False)
    run(folder, tmp_path / "both", prepend_bos=True)
    run(folder, tmp_path / "aligned", patch_align=4)
    bare, both, aligned = (IndexedDataset(str(tmp_path / f"{name}_text_document")) for name in ("bare", "both", "aligned"))
    eod = read_metadata(aligned.prefix).eod_id
    assert read_metadata(aligned.prefix).patch_align == 4
    for i in range(len(bare)):
        ids = bare[i].tolist()
        assert eod not in ids
        assert both[i].tolist() == [eod, *ids, eod]  # the byte-level tokenizer has one token for both
        padded = aligned[i].tolist()
        assert len(padded) % 4 == 0 and padded[: len(ids)] == ids and set(padded[len(ids) :]) == {eod} and 1 <= len(padded) - len(ids) <= 4


def test_fast_and_reference_encoders_agree(folder, tmp_path):
    pytest.importorskip("fastokens")
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(folder / "tokenizer"))
    encoder, note = make_fast_encoder(tokenizer)
    assert encoder is not None, note
    texts = adversarial_strings(seed=9, count=500)
    for mine, reference in zip(encoder.encode_flat(texts), tokenizer.encode_flat(texts), strict=True):
        assert np.array_equal(mine, reference)
    assert run(folder, tmp_path / "f").backend == "fastokens"
    assert run(folder, tmp_path / "r", backend="reference").backend == "reference"
    assert contents(tmp_path / "f_text_document") == contents(tmp_path / "r_text_document")


class PanicException(BaseException):
    """Named as what a library in Rust raises when it panics."""


@pytest.mark.parametrize("failure", [None, RuntimeError("bad"), PanicException("bad")], ids=["other ids", "an error", "a panic"])
def test_a_fast_encoder_that_errs_while_running_is_replaced(folder, tmp_path, monkeypatch, failure):
    """An encoder that moves ids is found by the running check, one that fails is noticed, and everything is encoded again."""
    pytest.importorskip("fastokens")
    from megatron_patch.preprocess import fast_encoder as encode

    right = encode.FastokensEncoder.encode_flat

    def wrong(self, texts):
        ids, lengths = right(self, texts)
        if not any("word3" in text for text in texts):
            return ids, lengths
        if failure is not None:
            raise failure
        return np.roll(ids, 1), lengths

    run(folder, tmp_path / "right")
    monkeypatch.setattr(encode.FastokensEncoder, "encode_flat", wrong)
    said: list[str] = []
    summary = preprocess([str(folder / "a.jsonl")], str(tmp_path / "x"), settings(folder), notice=said.append)
    words = "failed: bad" if failure else "returned other ids than the reference tokenizer for "
    assert summary.backend == "reference" and any(words in text and "starting again" in text for text in said)
    assert contents(tmp_path / "x_text_document") == contents(tmp_path / "right_text_document")


@pytest.mark.parametrize("where", ["in the last of the first documents", "late in a long document"])
def test_the_beginning_of_the_input_is_compared_at_many_places(folder, tmp_path, monkeypatch, where):
    """An encoder that errs at one place only, which is not in the middle of a batch."""
    pytest.importorskip("fastokens")
    right = FastokensEncoder.encode_flat

    def wrong(self, texts):
        ids, lengths = right(self, texts)
        ids = ids.copy()
        for start, text in zip(np.cumsum(lengths) - lengths, texts, strict=True):
            ids[start : start + 1] ^= "odd" in text
        return ids, lengths

    many = ["plain text"] * 30 + ["odd"] if "first" in where else ["plain text " * 1000 + " odd" + " odd" * 2000] * 8
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in many))
    monkeypatch.setattr(FastokensEncoder, "encode_flat", wrong)
    assert run(folder, tmp_path / "x", [str(tmp_path / "a.jsonl")]).backend == "reference"
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(folder / "tokenizer"))
    assert [dataset_ids[:-1].tolist() for dataset_ids in IndexedDataset(str(tmp_path / "x_text_document"))] == [
        encode(tokenizer, text) for text in many
    ]


def test_of_many_small_files_only_some_documents_are_compared(folder, tmp_path, monkeypatch):
    """The reference is slow: were one document of each file compared, it would encode everything."""
    pytest.importorskip("fastokens")
    (tmp_path / "in").mkdir()
    for number in range(60):
        (tmp_path / "in" / f"{number:02}.txt").write_text(f"document {number}")
    assert run(folder, tmp_path / "x", [str(tmp_path / "in" / "*.txt")]).checked == 32
    monkeypatch.setattr(encode_module, "_CHECKED_EVERY", 50)
    assert run(folder, tmp_path / "y", [str(tmp_path / "in" / "*.txt")]).checked == 32 + 28 // 5


def test_the_vocabulary_is_checked_and_reported(folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "5 17 3", "n": "1"}\n{"text": "2", "n": "18"}\n')
    numbers = EncodeSettings("NullTokenizer", None, vocab_size=20, append_eod=True, keys=("text", "n"))
    summary = preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "x"), numbers)
    assert (summary.largest_id, summary.to_json()["largest_id"], summary.vocab_size) == (18, 18, 20)
    tokenizer = load_checked_tokenizer(settings(folder))
    tokenizer.vocab_size = 300
    encoder = Encoder(settings(folder), tokenizer)
    with pytest.raises(DataError, match=r"returned the id [34]\d\d"):
        for batch in read_batches([FileRange(str(folder / "a.jsonl"))]):
            encoder.encode(parse_batch(batch, ("text",)))


def test_progress_is_the_share_of_all_inputs(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BATCH_BYTES", 3000)
    raw = (folder / "a.jsonl").read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(raw[: raw.index(b"\n", len(raw) // 3) + 1]))
    told: list[tuple[float, ...]] = []
    inputs = [str(folder / "a.jsonl"), str(tmp_path / "b.jsonl.gz"), str(folder / "a.jsonl")]
    summary = preprocess(inputs, str(tmp_path / "x"), settings(folder), progress=lambda *now: told.append(now))
    shares = [now[4] for now in told]
    assert len(told) > 20 and shares == sorted(shares) and 0 < shares[0] < 0.1 and shares[-1] == 1.0
    assert told[-1][:3] == (summary.documents, summary.tokens, summary.bytes)


BAD = [
    b'{"text": "fine"}',
    b'{"text": "cut',
    b'{"other": "x"}',
    b'{"text": 5}',
    b"[]",
    b'{"text": "\xff\xfe"}',
    b"",
    b'{"text": ""}',
    b'{"text": "last"}',
]


def test_bad_lines_are_left_out_counted_and_listed(folder, tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(BAD) + b"\n")
    summary = run(folder, tmp_path / "x", [str(tmp_path / "bad.jsonl")])
    assert (summary.documents, summary.bad_lines, summary.empty) == (2, 5, 1)
    listed = [json.loads(line) for line in Path(summary.bad_lines_file).read_text().splitlines()]
    assert [entry["line"] for entry in listed] == [2, 3, 4, 5, 6]
    assert summary.first_bad_line == f"{tmp_path}/bad.jsonl, line 2: {listed[0]['reason']}" and "Unterminated" in listed[0]["reason"]
    assert all(entry["file"].endswith("bad.jsonl") and entry["reason"] for entry in listed)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.json", "5\n" + json.dumps([{"text": "a"}] * 3), r"a\.json, line 1: a number, not an object"),
        ("a.jsonl", "\ufeff" + json.dumps({"meta": {"text": "a"}}), r"line 1: key 'text' is missing; the keys with text are meta\.text\n"),
        ("a.jsonl", "\n" * 9, r"the input has nothing but blank lines or a byte-order mark \(9 bytes\)\n"),
        ("a.jsonl", "\ufeff", r"the input has nothing but blank lines or a byte-order mark \(3 bytes\)\n"),
        ("a.jsonl", "", r"the input is empty\n"),
        ("a.txt", "", r"the input is empty\n"),
    ],
)
def test_without_documents_the_first_bad_line_says_why(folder, tmp_path, name, data, words):
    (tmp_path / name).write_text(data)
    for more in ({}, {"on_bad_line": "fail"}) if data.strip() else ({},):
        with pytest.raises(DataError, match=words if not more else ": ".join(words.split(": ")[1:]) or words):
            run(folder, tmp_path / "x", [str(tmp_path / name)], overwrite=True, **more)
    told = []
    preprocess([str(tmp_path / name)], str(tmp_path / "y"), settings(folder), shard=(0, 1), notice=told.append)
    assert any(re.search("this shard is empty: there are no documents", text) for text in told) and re.search(
        words.removesuffix(r"\n"), told[-1]
    )


def test_a_wrong_key_is_named_with_the_keys_that_there_are_before_all_is_read(folder, tmp_path):
    """After the first batch of a larger input; at the end, if no document has text, as an error."""
    rows = [{"body": f"text {number}", "meta": {"title": "x"}} for number in range(3)]
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in inputs:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = []
    with pytest.raises(DataError) as error:
        preprocess(list(map(str, inputs)), str(tmp_path / "x"), settings(folder, keys=("text",)), notice=told.append)
    keys = f"the first bad line is {inputs[0]}, line 1: key 'text' is missing; the keys with text are body, meta.title"
    assert f"warning: none of the first 3 lines has text; {keys}" in told
    assert keys in error.value.what and error.value.do == "give --json-keys keys that the documents have (given: text), or check --input"


def test_inputs_with_mostly_bad_lines_are_told_loudly(folder, tmp_path, monkeypatch):
    """Also if the run was interrupted in one of them. Half of the lines are no reason."""
    from megatron_patch.preprocess import pipeline

    monkeypatch.setattr(readers, "BATCH_BYTES", 40)
    good, bad = '{"text": "a"}\n', '{"body": "a"}\n'
    for name, lines in {"half": good + bad, "most": (good + bad * 2) * 9, "other": bad * 20, "last": good * 9}.items():
        (tmp_path / f"{name}.jsonl").write_text(lines)
    inputs = [str(tmp_path / f"{name}.jsonl") for name in ("half", "most", "other", "last")]
    words = f"18 of the 27 lines of {inputs[1]} are bad and left out; so are more than half of the lines of 1 other input"
    told = []
    assert preprocess(inputs, str(tmp_path / "x"), settings(folder), notice=told.append).mostly_bad == words
    assert told[-1].startswith(f"warning: {words}; the first bad line is {inputs[0]}, line 2: key 'text' is missing")
    assert preprocess([inputs[0], inputs[3]], str(tmp_path / "y"), settings(folder)).mostly_bad is None
    plain = readers.read_batches
    for stop in (3, 7, 20):
        monkeypatch.setattr(
            pipeline, "read_batches", lambda *args, stop=stop: itertools.chain(itertools.islice(plain(*args), stop), fail())
        )
        with pytest.raises(DataError, match="interrupted"):
            preprocess(inputs, str(tmp_path / f"z{stop}"), settings(folder), save_seconds=0.0)
        monkeypatch.setattr(pipeline, "read_batches", plain)
        assert preprocess(inputs, str(tmp_path / f"z{stop}"), settings(folder), resume=True).mostly_bad == words


def fail():
    raise DataError("interrupted")
    yield


def test_a_resumed_run_knows_the_first_bad_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BATCH_BYTES", 50)
    (tmp_path / "a.jsonl").write_bytes(b"5\n" + b'{"text": ""}\n' * 50)
    plain = readers.read_batches

    def cut(*args, **more):
        for number, batch in enumerate(plain(*args, **more)):
            if number == 2:
                raise DataError("interrupted")
            yield batch

    from megatron_patch.preprocess import pipeline

    monkeypatch.setattr(pipeline, "read_batches", cut)
    monkeypatch.setattr("megatron_patch.preprocess.in_process.prefetch_if", lambda wanted, items: contextlib.nullcontext(items))
    with pytest.raises(DataError, match="interrupted"):
        run(folder, tmp_path / "x", [str(tmp_path / "a.jsonl")], save_seconds=0.0)
    monkeypatch.setattr(pipeline, "read_batches", plain)
    with pytest.raises(DataError, match=r"1 bad line, 50 empty documents.*a\.jsonl, line 1: a number"):
        run(folder, tmp_path / "x", [str(tmp_path / "a.jsonl")], resume=True)


def test_bad_lines_can_be_fatal_with_their_place_over_batches(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BATCH_BYTES", 500)
    lines = (folder / "a.jsonl").read_bytes().splitlines()
    lines[321] = b"broken"
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=r"bad\.jsonl, line 322"):
        run(folder, tmp_path / "x", [str(tmp_path / "bad.jsonl")], workers=2, on_bad_line="fail")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl"]


def test_what_python_writes_beyond_json_is_read_as_it_reads_it(folder, tmp_path):
    """Not-a-number in another key is no reason to lose a document; half a character is."""
    documents = [{"text": "one", "score": float("nan")}, {"score": [float("-inf"), 1e300], "text": "two\u0000é"}, {"text": "three"}]
    lines = [json.dumps(document) for document in documents]
    lines[1:1] = ['{"text": "four", "score": 1e999}', '{"text": "\\ud800", "score": NaN}', '{"text": "five", "score": nan}', "[" * 99_999]
    (tmp_path / "odd.jsonl").write_text("\n".join(lines))
    summary = run(folder, tmp_path / "x", [str(tmp_path / "odd.jsonl")])
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(folder / "tokenizer"))
    dataset = IndexedDataset(str(tmp_path / "x_text_document"))
    assert [tokenizer.decode(ids[:-1].tolist()) for ids in dataset] == ["one", "four", "two\x00é", "three"]
    assert summary.bad_lines == 3


@pytest.mark.parametrize("size", [0.5, 0.0])
@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_broken_archive_is_named_and_leaves_nothing(folder, tmp_path, suffix, size):
    raw = (folder / "a.jsonl").read_bytes() * 20
    packed = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}[suffix](raw)
    path = tmp_path / f"b.jsonl{suffix}"
    path.write_bytes(packed[: round(size * len(packed))])
    try:
        with pytest.raises(DataError, match=r"b\.jsonl.* cannot be read"):
            run(folder, tmp_path / "x", [str(path)])
    finally:
        assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


@pytest.mark.parametrize(
    ("inputs", "more", "words"),
    [
        (["nowhere.jsonl"], {}, "matches no file"),
        (["*.nothing"], {}, "matches no file"),
        (["{folder}/tokenizer/tokenizer.json"], {}, "is not JSON lines"),
        (["{root}/LICENSE"], {}, "unsupported suffix"),
        (["{folder}/a.jsonl"], {"keys": ("title",)}, "no documents.*400 bad lines"),
        (["{folder}/a.jsonl"], {"eod_token": "<none>"}, "--eod-token <none>"),
        (["{folder}/a.jsonl"], {"patch_align": 0}, "--patch-align is 0"),
    ],
)
def test_wrong_input_is_told(folder, tmp_path, inputs, more, words):
    with pytest.raises(DataError, match=words):
        run(folder, tmp_path / "x", [text.format(folder=folder, root=ROOT) for text in inputs], **more)
    assert not list(tmp_path.glob("*.bin*")) and not list(tmp_path.glob("*.idx*"))


def test_existing_outputs_are_kept_unless_told_otherwise(folder, tmp_path):
    run(folder, tmp_path / "x")
    before = contents(tmp_path / "x_text_document")
    with pytest.raises(DataError, match="exists"):
        run(folder, tmp_path / "x", append_eod=False)
    assert contents(tmp_path / "x_text_document") == before
    run(folder, tmp_path / "x", append_eod=False, overwrite=True)
    assert contents(tmp_path / "x_text_document") != before


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def tool(folder, out, *more, **options):
    words = ["--input", str(folder / "a.jsonl"), "--output-prefix", str(out), "--tokenizer-type", "HuggingFaceTokenizer"]
    words += ["--tokenizer-model", str(folder / "tokenizer"), "--append-eod", *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_list_of_bad_lines_that_cannot_be_written_is_told(folder, tmp_path, monkeypatch):
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(BAD))
    monkeypatch.setattr(summary_module, "open_new", lambda path, mode: open("/dev/full", mode))
    for seconds in (0.0, 99.0):
        with pytest.raises(DataError, match=r"cannot write .*x_bad_lines\.jsonl: No space left"):
            run(folder, tmp_path / "x", [str(tmp_path / "bad.jsonl")], save_seconds=seconds, overwrite=True)


def test_a_full_disk_ends_the_tool_with_a_sentence(folder, tmp_path):
    """Files are limited to 20 kB: writing fails as on a full disk."""
    with tool(folder, tmp_path / "x", preexec_fn=limited) as process:
        _, errors = process.communicate(timeout=100)
    assert process.returncode == 3 and "DataError: cannot write" in errors and "free space" in errors, errors
    assert list(tmp_path.iterdir()) == []


def working(process, partial, count=2):
    """The worker processes of a run of the tool that has begun to write: forked from it."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if partial.exists() and len(pids := descendants(process.pid)) == count:
            return pids
        time.sleep(0.02)
    raise AssertionError("no workers")


@pytest.mark.parametrize("moment", [0.0, 0.31, 0.77])
def test_a_killed_worker_ends_the_tool_promptly(folder, tmp_path, moment):
    big = tmp_path / "in"
    big.mkdir()
    (big / "a.jsonl").write_bytes((folder / "a.jsonl").read_bytes() * 600)
    (big / "tokenizer").symlink_to(folder / "tokenizer")
    with tool(big, tmp_path / "x", "--workers", "2", "--backend", "reference", start_new_session=True) as process:
        try:
            pids = working(process, tmp_path / "x_text_document.bin.partial")
            time.sleep(moment)
            os.kill(pids[-1], signal.SIGKILL)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 3 and "a worker process died" in errors, errors
    assert not list(tmp_path.glob("x_*"))
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_killed_tool_leaves_no_workers(folder, tmp_path):
    big = tmp_path / "in"
    big.mkdir()
    (big / "a.jsonl").write_bytes((folder / "a.jsonl").read_bytes() * 600)
    (big / "tokenizer").symlink_to(folder / "tokenizer")
    with tool(big, tmp_path / "x", "--workers", "3", "--backend", "reference", start_new_session=True) as process:
        pids = working(process, tmp_path / "x_text_document.bin.partial", count=3)
        process.kill()
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid):
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def unfinished(work, results, *_):
    """A worker that is killed in the middle of its answer, while another one is running."""
    work.recv()
    os.write(results.fileno(), (1 << 20).to_bytes(4, "big") + b"the beginning")
    os.kill(os.getpid(), signal.SIGKILL)


def unwritten(parts, files, starts):
    """A worker that is killed when it is to write."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("method", "name", "deed"),
    [("fork", "run_worker", unfinished), ("forkserver", "run_worker", unfinished), ("fork", "_write", unwritten)],
)
def test_a_worker_killed_in_the_middle_of_its_work_is_noticed(folder, tmp_path, monkeypatch, method, name, deed):
    monkeypatch.setattr(worker_process if name == "_write" else workers, name, deed)
    monkeypatch.setattr(workers, "_context", lambda: multiprocessing.get_context(method))
    work = read_batches([FileRange(str(folder / "a.jsonl"))])
    with IndexedDatasetWriter(str(tmp_path / "x"), np.dtype("uint16")) as writer:
        how = settings(folder, dtype="uint16", backend="reference")
        encoding = workers.Workers(work, 2, how, load_checked_tokenizer(how), [writer])
        with encoding, pytest.raises(DataError, match="a worker process died"):
            list(encoding)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_however_they_are_started_write_the_same_bytes(folder, tmp_path, monkeypatch, method, prefetch):
    monkeypatch.setattr(workers, "_context", lambda: multiprocessing.get_context(method))
    monkeypatch.setattr(workers, "spare_cores", lambda count: prefetch)
    monkeypatch.setattr(readers, "BATCH_BYTES", 2000)
    run(folder, tmp_path / "one", backend="reference")
    run(folder, tmp_path / "two", workers=3, backend="reference")
    assert contents(tmp_path / "two_text_document") == contents(tmp_path / "one_text_document")


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("place", ["encode", "parse_batch"])
def test_what_a_worker_raises_ends_all(folder, tmp_path, monkeypatch, place, prefetch):
    """Whether it reads ahead or not, and wherever the error comes from: while encoding, and while reading, of a later batch."""

    def fail(*args):
        batch = args[0] if place == "parse_batch" else args[1].batch
        if batch.start > 6000:
            raise DataError("no more")
        return plain(*args)

    owner = worker_process if place == "parse_batch" else Encoder
    plain = getattr(owner, place)
    monkeypatch.setattr(owner, place, fail)
    monkeypatch.setattr(workers, "_context", lambda: multiprocessing.get_context("fork"))
    monkeypatch.setattr(workers, "spare_cores", lambda count: prefetch)
    monkeypatch.setattr(readers, "BATCH_BYTES", 2000)
    with pytest.raises(DataError, match="no more"):
        run(folder, tmp_path / "x", workers=2, backend="reference")
    assert not multiprocessing.active_children()


def descendants(pid):
    """Direct children of a process."""
    try:
        return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def test_the_tool_reads_a_pipe_and_ends_with_json(folder, tmp_path):
    with tool(folder, tmp_path / "x", "--input", "-", stdin=subprocess.PIPE) as process:
        out, errors = process.communicate((folder / "a.jsonl").read_text(), timeout=100)
    assert process.returncode == 0, errors
    summary = json.loads(out.splitlines()[-1])
    assert summary["documents"] == 400 and summary["dtype"] == "uint16" and summary["tokens_per_document"][-1] > 0
    run(folder, tmp_path / "y")
    assert contents(tmp_path / "x_text_document") == contents(tmp_path / "y_text_document")


def test_the_tool_suggests_flags(folder, tmp_path):
    with tool(folder, tmp_path / "x", "--append-eos") as process:
        _, errors = process.communicate(timeout=100)
    assert process.returncode == 2 and "did you mean --append-eod" in errors


def test_a_tokenizer_without_an_end_is_told(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE({"a": 0, "b": 1}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="no end-of-document token"):
        Encoder(EncodeSettings("HuggingFaceTokenizer", str(tmp_path), append_eod=True))
    with pytest.raises(DataError, match="no beginning-of-sequence"):
        Encoder(EncodeSettings("HuggingFaceTokenizer", str(tmp_path), prepend_bos=True))
    encoder = Encoder(EncodeSettings("HuggingFaceTokenizer", str(tmp_path), append_eod=True, eod_token="b"))
    assert encoder.tokenizer.eod_id == 1
