"""Preprocessing at the limits of a machine: a real disk that is full, and documents larger than the memory it may take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.preprocess_memory import CORPORA, measure, ordinary, write_corpus
from megatron_patch.preprocess.progress_log import last_record, progress_log_path
from megatron_patch.preprocess.train_tokenizer import train_tokenizer

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_corpus(folder / "train.jsonl", ordinary(0.1))
    train_tokenizer([str(folder / "train.jsonl")], str(folder / "bpe"), 1000, max_bytes=300_000)
    return folder / "bpe"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=False, capture_output=True).returncode
    ):
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def tool(tokenizer, corpus, output, *more):
    words = ["--input", str(corpus), "--output-prefix", str(output), "--tokenizer-type", "HuggingFaceTokenizer", "--append-eod"]
    words += ["--tokenizer-model", str(tokenizer), "--workers", "2", *more]
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_on_a_full_disk_what_is_finished_is_kept_and_gone_on_from(tokenizer, small_disk, tmp_path):
    write_corpus(tmp_path / "a.jsonl", ordinary(4))
    filler = small_disk / "filler"
    filler.write_bytes(bytes(3_000_000))
    full = tool(tokenizer, tmp_path / "a.jsonl", small_disk / "x", "--save-interval", "0")
    assert full.returncode == 3 and "No space left" in full.stderr and "free space" in full.stderr, full.stderr
    assert "are saved" in full.stderr and "--resume" in full.stderr
    kept = last_record(progress_log_path(str(small_disk / "x")))
    assert kept is not None and kept.read > 0 and not list(small_disk.glob("*.idx"))
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    resumed = tool(tokenizer, tmp_path / "a.jsonl", small_disk / "x", "--resume")
    assert resumed.returncode == 0 and json.loads(resumed.stdout)["resumed_at"] == kept.read, resumed.stderr
    whole = tool(tokenizer, tmp_path / "a.jsonl", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    for suffix in (".bin", ".idx"):
        assert (small_disk / f"x_text_document{suffix}").read_bytes() == (tmp_path / f"whole_text_document{suffix}").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", CORPORA)
def test_two_workers_stay_below_a_gigabyte_and_a_half(tokenizer, tmp_path, name):
    assert measure(name, tokenizer, tmp_path, workers=2)["peak_megabytes"] < 1500
