"""A run that ends anywhere, by whatever, is resumed to the bytes of an unbroken run; over other input or settings it is refused."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard

from megatron_patch.data.indexed_dataset import IndexedDataset
from megatron_patch.errors import DataError
from megatron_patch.preprocess import pipeline
from megatron_patch.preprocess.encode import EncodeSettings
from megatron_patch.preprocess.in_process import InProcessEncoder
from megatron_patch.preprocess.pipeline import preprocess
from megatron_patch.preprocess.progress_log import Record, last_record, progress_log_path
from megatron_patch.preprocess.workers import Workers
from megatron_patch.raw_text import readers

ROOT = Path(__file__).parent.parent.parent
TEXTS = [" ".join(str((i * 7 + j) % 900) for j in range(i % 23 + 1)) if i % 31 else "bad" for i in range(300)]


def settings(**more):
    return EncodeSettings("NullTokenizer", None, **{"vocab_size": 1000, "append_eod": True, "keys": ("text", "n"), **more})


def lines(texts):
    """Every 31st line lacks a key."""
    return b"".join(json.dumps({"text": text, "n": "1 2"} if text != "bad" else {"n": "1"}).encode() + b"\n" for text in texts)


@pytest.fixture
def inputs(tmp_path):
    """A plain file, archives of two kinds, and one more plain file."""
    folder = tmp_path / "in"
    folder.mkdir()
    quarters = [lines(TEXTS[start : start + 75]) for start in range(0, 300, 75)]
    (folder / "0.jsonl").write_bytes(quarters[0])
    (folder / "1.jsonl.gz").write_bytes(gzip.compress(quarters[1]))
    (folder / "2.jsonl.zst").write_bytes(zstandard.compress(quarters[2]))
    (folder / "3.jsonl").write_bytes(quarters[3])
    return [str(folder / "*")]


def everything(prefix):
    """All that a run leaves, by name; the metadata files without the time it took."""
    found = {path.name.removeprefix(Path(prefix).name): path.read_bytes() for path in Path(prefix).parent.glob(f"{Path(prefix).name}_*")}
    assert not [name for name in found if "partial" in name or "progress" in name or "scratch" in name], sorted(found)
    return found


CRASH_POINTS = """
import os, sys, json
from pathlib import Path
sys.path.insert(0, {root!r})
from megatron_patch.raw_text import readers
from tests.preprocess.test_resume import preprocess, settings
readers.BATCH_BYTES = 2500
inputs, folder = sys.argv[1:2], sys.argv[2]

def crashing(at):
    calls = [0]
    def wrap(call):
        def counted(*args, **kwargs):
            calls[0] += 1
            if calls[0] == at:
                os._exit(9)
            return call(*args, **kwargs)
        return counted
    os.fsync, os.replace, Path.unlink = wrap(os.fsync), wrap(os.replace), wrap(Path.unlink)

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def run(out, resume, at=0):
    if at:
        crashing(at)
    preprocess(inputs, out, settings(), resume=resume, save_seconds=0.0)

points = 0
while True:
    points += 1
    out = f"{{folder}}/x{{points}}"
    code = child(lambda: run(out, False, points))
    if code == 0:
        break
    assert code == 9, code
    # A second crash while resuming, at another point, then to the end.
    assert child(lambda: run(out, True, points % 7 + 1)) in (0, 9)
    assert child(lambda: run(out, True)) == 0, points
print(points)
"""


def test_a_crash_at_any_point_loses_nothing(tmp_path, inputs):
    """Processes that vanish, without any cleaning up, before each call that makes something last: syncing, renaming, removing."""
    (tmp_path / "out").mkdir()
    preprocess(inputs, str(tmp_path / "whole"), settings())
    expected = everything(tmp_path / "whole")
    assert len(expected) == 7
    script = CRASH_POINTS.format(root=str(ROOT))
    result = subprocess.run([sys.executable, "-c", script, *inputs, str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    points = int(result.stdout)
    assert points > 20
    for number in range(1, points + 1):
        assert everything(tmp_path / "out" / f"x{number}") == expected, number


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_tool_is_resumed_to_the_same_bytes(tmp_path, inputs, workers):
    """kill -9 of the tool itself, twice, at moments of its own."""
    folder = tmp_path / "in"
    for path in folder.glob("*.jsonl"):
        path.write_bytes(path.read_bytes() * 500)
    preprocess(inputs, str(tmp_path / "whole"), settings())
    words = ["--input", *inputs, "--output-prefix", str(tmp_path / "x"), "--tokenizer-type", "NullTokenizer", "--vocab-size", "1000"]
    words += ["--append-eod", "--json-keys", "text", "n", "--workers", str(workers), "--resume", "--save-interval", "0"]
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    seen = 0
    for _ in range(2):
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        ) as process:
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                record = last_record(progress_log_path(str(tmp_path / "x")))
                if record is not None and record.read > seen:
                    seen = record.read
                    break
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGKILL)
    assert seen
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["resumed_at"] >= seen and "resuming after" in result.stderr
    assert everything(tmp_path / "x") == everything(tmp_path / "whole")
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "already finished" in again.stderr and json.loads(again.stdout)["tokens"] == summary["tokens"]


def test_what_is_recorded_has_been_written_by_then(tmp_path, inputs, monkeypatch):
    """Workers write by themselves: a record waits for them."""
    monkeypatch.setattr(readers, "BATCH_BYTES", 900)
    whole = preprocess(inputs, str(tmp_path / "whole"), settings())
    expected = [Path(f"{prefix}.bin").read_bytes() for prefix in whole.outputs]
    made, seen = [], []

    class Watched(Workers):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    saved = pipeline.Counters.save

    def save(self, progress_log, writers, complete=False):
        assert not any(worker.writing for worker in made[0]._workers)
        saved(self, progress_log, writers, complete)
        for writer, data in zip(writers, expected, strict=True):
            size = writer.num_tokens * writer.dtype.itemsize
            assert writer.tokens_path.read_bytes()[:size] == data[:size]
        seen.append(complete)

    monkeypatch.setattr(pipeline, "Workers", Watched)
    monkeypatch.setattr(pipeline.Counters, "save", save)
    preprocess(inputs, str(tmp_path / "x"), settings(), workers=2, save_seconds=0.0)
    assert len(seen) > 10 and seen[-1]


def broken_off(inputs, out, monkeypatch, after=3):
    """A run that fails after some batches, each of them saved."""
    monkeypatch.setattr(readers, "BATCH_BYTES", 900)
    saved = pipeline.Counters.save
    calls = []

    def save(self, *args, **kwargs):
        saved(self, *args, **kwargs)
        calls.append(0)
        if len(calls) == after:
            raise DataError("a full disk")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Counters, "save", save)
        with pytest.raises(DataError, match="a full disk"):
            preprocess(inputs, str(out), settings(), save_seconds=0.0)


def test_summaries_and_bad_lines_are_those_of_an_unbroken_run(tmp_path, inputs, monkeypatch):
    whole = preprocess(inputs, str(tmp_path / "whole"), settings())
    for after in (1, 4, 12):
        broken_off(inputs, tmp_path / f"x{after}", monkeypatch, after)
        resumed = preprocess(inputs, str(tmp_path / f"x{after}"), settings(), resume=True)
        for name in ("documents", "tokens", "bytes", "bad_lines", "empty", "filtered", "tokens_per_document", "largest_id"):
            assert getattr(resumed, name) == getattr(whole, name), name
        assert resumed.resumed_at > 0 == whole.resumed_at and whole.bad_lines == 10
        assert everything(tmp_path / f"x{after}") == everything(tmp_path / "whole")


def test_lines_are_numbered_by_file(tmp_path, inputs):
    path = tmp_path / "in" / "0.jsonl"
    summary = preprocess([str(path), str(path)], str(tmp_path / "x"), settings())
    listed = [json.loads(line) for line in Path(summary.bad_lines_file).read_text().splitlines()]
    assert [entry["line"] for entry in listed] == [1, 32, 63] * 2
    raw = path.read_bytes()
    assert all(raw[entry["byte"] :].startswith(b'{"n": "1"}') for entry in listed)


@pytest.mark.parametrize(
    ("change", "more", "words"),
    [
        (lambda folder: (folder / "0.jsonl").write_bytes(b"{}\n"), {}, r"0\.jsonl has changed"),
        (lambda folder: (folder / "+.jsonl").write_bytes(b"{}\n"), {}, r"the input was .*0\.jsonl, now .*\+\.jsonl"),
        (lambda folder: (folder / "0.jsonl").rename(folder / "9.jsonl"), {}, r"the input was .*0\.jsonl, now .*1\.jsonl\.gz"),
        (lambda folder: None, {"append_eod": False}, "append_eod was True, now False"),
        (lambda folder: None, {"patch_align": 4, "min_tokens": 2}, "patch_align was 1, now 4; min_tokens was None, now 2"),
    ],
)
def test_other_input_or_settings_are_refused(tmp_path, inputs, monkeypatch, change, more, words):
    broken_off(inputs, tmp_path / "x", monkeypatch)
    change(tmp_path / "in")
    with pytest.raises(DataError, match=f"cannot be resumed: .*{words}"):
        preprocess(inputs, str(tmp_path / "x"), settings(**more), resume=True)


@pytest.mark.parametrize("remedy", ["repair", "leave out", "add"])
def test_behind_a_broken_archive_a_run_goes_on(tmp_path, inputs, monkeypatch, remedy):
    """What was read before it is kept; what was read of it is read again. Files behind it may change, too."""
    monkeypatch.setattr(readers, "BATCH_BYTES", 900)
    archive = tmp_path / "in" / "2.jsonl.zst"
    text = zstandard.ZstdDecompressor().decompress(archive.read_bytes())
    half = text.index(b"\n", len(text) // 2) + 1
    complete = zstandard.compress(text[:half]) + zstandard.compress(text[half:])
    archive.write_bytes(complete[:-200])
    told = []
    with pytest.raises(DataError, match=r"2\.jsonl\.zst cannot be read"):
        preprocess(inputs, str(tmp_path / "x"), settings(), save_seconds=0.0, notice=told.append)
    kept = last_record(progress_log_path(str(tmp_path / "x")))
    assert kept is not None and kept.file == 2 and "are saved" in told[-1] and "--resume" in told[-1]
    if remedy == "leave out":
        archive.unlink()
    else:
        archive.write_bytes(complete)
    if remedy == "add":
        (tmp_path / "in" / "4.jsonl").write_bytes(lines(TEXTS[:50]))
    resumed = preprocess(inputs, str(tmp_path / "x"), settings(), resume=True)
    whole = preprocess(inputs, str(tmp_path / "whole"), settings())
    assert everything(tmp_path / "x") == everything(tmp_path / "whole")
    assert 0 < resumed.resumed_at < kept.read and resumed.bytes == whole.bytes


def test_an_encoder_that_erred_is_not_trusted_again_after_a_kill(tmp_path, inputs, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_starting_record", lambda *args: Record(distrusted=True))
        broken_off(inputs, tmp_path / "x", monkeypatch)
    used = []

    def encoder(work, settings, *rest, **more):
        used.append(settings.backend)
        return InProcessEncoder(work, settings, *rest, **more)

    monkeypatch.setattr(pipeline, "InProcessEncoder", encoder)
    preprocess(inputs, str(tmp_path / "x"), settings(), resume=True)
    preprocess(inputs, str(tmp_path / "whole"), settings())
    assert used == ["reference", "auto"]
    assert everything(tmp_path / "x") == everything(tmp_path / "whole")


def test_an_unfinished_run_is_not_lost_by_forgetting_to_resume(tmp_path, inputs, monkeypatch):
    broken_off(inputs, tmp_path / "x", monkeypatch)
    with pytest.raises(DataError, match="an unfinished run"):
        preprocess(inputs, str(tmp_path / "x"), settings())
    preprocess(inputs, str(tmp_path / "x"), settings(), overwrite=True)
    preprocess(inputs, str(tmp_path / "whole"), settings())
    assert everything(tmp_path / "x") == everything(tmp_path / "whole")


def test_a_tokenizer_that_has_changed_is_refused(tmp_path, inputs, monkeypatch):
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"1": 0, "2": 1, "?": 2, "</s>": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    mine = EncodeSettings("HuggingFaceTokenizer", str(tmp_path / "tokenizer.json"), append_eod=True)
    monkeypatch.setattr(sys.modules[__name__], "settings", lambda: mine)
    broken_off(inputs, tmp_path / "x", monkeypatch)
    backend.add_tokens(["7"])
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="tokenizer's files have changed"):
        preprocess(inputs, str(tmp_path / "x"), mine, resume=True)


def test_another_end_of_documents_is_refused(tmp_path, inputs, monkeypatch):
    """A file next to the tokenizer.json names another end-of-document token after the run was interrupted."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"1": 0, "2": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>", "<end>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    mine = EncodeSettings("HuggingFaceTokenizer", str(tmp_path / "tokenizer.json"), append_eod=True)
    monkeypatch.setattr(sys.modules[__name__], "settings", lambda: mine)
    broken_off(inputs, tmp_path / "x", monkeypatch)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(DataError, match=r"end and begin documents were \[3, None\], now \[4, None\]"):
        preprocess(inputs, str(tmp_path / "x"), mine, resume=True)


def test_what_was_recorded_must_be_there(tmp_path, inputs, monkeypatch):
    broken_off(inputs, tmp_path / "x", monkeypatch)
    partial = tmp_path / "x_text_document.bin.partial"
    partial.write_bytes(partial.read_bytes()[:10])
    with pytest.raises(DataError, match="less than the"):
        preprocess(inputs, str(tmp_path / "x"), settings(), resume=True)
    partial.unlink()
    with pytest.raises(DataError, match="does not exist"):
        preprocess(inputs, str(tmp_path / "x"), settings(), resume=True)


def test_a_finished_run_is_finished_only_for_the_same_run(tmp_path, inputs):
    preprocess(inputs, str(tmp_path / "x"), settings())
    assert preprocess(inputs, str(tmp_path / "x"), settings(), resume=True).bytes == 0
    with pytest.raises(DataError, match="exists"):
        preprocess(inputs, str(tmp_path / "x"), settings(append_eod=False), resume=True)
    with pytest.raises(DataError, match="standard input"):
        preprocess(["-"], str(tmp_path / "y"), settings(), resume=True)


def test_rearranged_runs_are_resumed_from_any_end(tmp_path, inputs, monkeypatch):
    """Failing before, between and after the steps of rearranging two outputs."""
    inputs = inputs * 2
    options = {"dedup": True, "shuffle_seed": 3, "save_seconds": 0.0}
    whole = preprocess(inputs, str(tmp_path / "whole"), settings(), **options)
    # One output has 290 texts, each twice, the other one text 580 times.
    assert [len(IndexedDataset(prefix)) for prefix in whole.outputs] == [290, 1] and whole.duplicates == 290 + 579
    for name in ("dedup_and_shuffle", "remove_dataset", "write_metadata"):
        for call in (1, 2):
            for before in (True, False):
                out = str(tmp_path / f"{name}{call}{before}")
                with monkeypatch.context() as patch:
                    patch.setattr(pipeline, name, failing(getattr(pipeline, name), call, before))
                    with pytest.raises(DataError, match="now"):
                        preprocess(inputs, out, settings(), **options)
                resumed = preprocess(inputs, out, settings(), resume=True, **options)
                assert everything(out) == everything(tmp_path / "whole")
                assert (resumed.documents, resumed.duplicates) == (whole.documents, whole.duplicates)
    assert not [path for path in tmp_path.iterdir() if "unordered" in path.name]


def failing(call, at, before):
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(0)
        if before and len(calls) == at:
            raise DataError("now")
        result = call(*args, **kwargs)
        if len(calls) == at:
            raise DataError("now")
        return result

    return wrapped


@pytest.mark.parametrize(
    "content", [b"{}\n[]\n", b'{}\n"upto"\n', b"{}\n5\n", b'{}\n{"outputs": 5}\n', b"{}\n{}\n", b"{}\n" + b"[" * 99_999 + b"\n", None]
)
def test_a_progress_log_that_is_none_is_told(tmp_path, inputs, content):
    path = tmp_path / "x_progress.jsonl"
    if content is None:
        with path.open("wb") as file:
            file.truncate(200 << 30)  # takes no space on disk
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"x_progress\.jsonl is not a progress log: .*\n.*Allowed.*\n.*--overwrite"):
        preprocess(inputs, str(tmp_path / "x"), settings(), resume=True)


@pytest.mark.parametrize("content", [None, b"", b"[]\n" * 99, b"{}\n" * 99, b"\xff" * 999])
def test_a_list_of_bad_lines_that_is_gone_or_damaged_is_told(tmp_path, inputs, monkeypatch, content):
    monkeypatch.setattr(readers, "BATCH_BYTES", 900)
    plain = pipeline.read_batches

    def cut(*args):
        yield from itertools.islice(plain(*args), 5)
        raise DataError("interrupted")

    monkeypatch.setattr(pipeline, "read_batches", cut)
    with pytest.raises(DataError, match="interrupted"):
        preprocess(inputs, str(tmp_path / "x"), settings(), save_seconds=0.0)
    monkeypatch.setattr(pipeline, "read_batches", plain)
    path = tmp_path / "x_bad_lines.jsonl"
    assert path.stat().st_size
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"x_bad_lines\.jsonl is not the list of bad lines of the unfinished run.*\n.*\n.*--overwrite"):
        preprocess(inputs, str(tmp_path / "x"), settings(), resume=True)
    preprocess(inputs, str(tmp_path / "x"), settings(), overwrite=True)
