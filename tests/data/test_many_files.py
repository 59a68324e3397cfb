"""A corpus of more files than the process may open: few are open at a time, and no closed one may be replaced unnoticed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from megatron_patch.data import local_files
from megatron_patch.data.corpus import TokenCorpus
from megatron_patch.data.indexed_dataset import IndexedDataset
from megatron_patch.data.local_files import FileReplacedError
from megatron_patch.errors import DataError
from tests.data.streams import corpus_of, write_numbers
from tests.distributed.runs import DATA, MODEL, ROOT

SHARDS, TOKENS = 30, 100


@pytest.fixture
def few(monkeypatch):
    """At most three files of datasets are open."""
    monkeypatch.setattr(local_files._OPEN_FILES, "_most", 3)


@pytest.fixture
def corpus(tmp_path, few):
    """Shards whose n-th token, counted over all, is n."""
    corpus = corpus_of(tmp_path, *[TOKENS] * SHARDS)
    corpus.fingerprint()
    return corpus


def open_datasets(folder: Path) -> int:
    """Number of descriptors of this process for files in a folder."""
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith(str(folder)) for link in links if os.path.lexists(link))


def test_the_files_that_were_read_last_are_open(corpus, tmp_path):
    numbers = np.arange(SHARDS * TOKENS)
    assert np.array_equal(corpus.read(0, len(numbers)), numbers)
    for start in np.random.default_rng(0).integers(0, len(numbers) - 250, 100).tolist():
        assert np.array_equal(corpus.read(start, 250), numbers[start : start + 250])
        assert 0 < open_datasets(tmp_path) <= 3
    del corpus.shards[:]
    assert open_datasets(tmp_path) == 0


def test_threads_read_their_own_files(corpus, tmp_path):
    """A descriptor that is closed while another thread reads with it would give that thread the bytes of another file."""
    wrong = []

    def read(seed):
        for start in np.random.default_rng(seed).integers(0, SHARDS * TOKENS - 150, 400).tolist():
            if not np.array_equal(corpus.read(start, 150), np.arange(start, start + 150)):
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and open_datasets(tmp_path) <= 3


def reads_in_a_thread(corpus: TokenCorpus) -> bool:
    """Whether a new thread reads the corpus, within 20 seconds."""
    found: list[bool] = []
    reader = threading.Thread(
        target=lambda: found.append(np.array_equal(corpus.read(0, SHARDS * TOKENS), np.arange(SHARDS * TOKENS))), daemon=True
    )
    reader.start()
    reader.join(20)
    return found == [True]


def test_a_child_process_reads_on_and_does_not_wait_for_threads_of_its_parent(corpus):
    stop = threading.Event()

    def read():
        while not stop.is_set():
            corpus.read(0, SHARDS * TOKENS)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for _ in range(5):
            child = os.fork()
            if child == 0:
                os._exit(0 if reads_in_a_thread(corpus) and not local_files._OPEN_FILES._readers else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        thread.join()


def overwrite(path: Path) -> None:
    before = path.stat()
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def put_another_there(path: Path) -> None:
    """Another file of the same size and time."""
    before = path.stat()
    path.rename(path.with_suffix(".old"))
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def overwrite_with_the_old_time(path: Path) -> None:
    before = path.stat()
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("harm", "of_dataset", "of_corpus"),
    [
        (overwrite_with_the_old_time, "is another file than the one that was opened, or has changed since", "has changed since the run"),
        (overwrite, "is another file than the one that was opened, or has changed since", "has changed since the run opened it"),
        (put_another_there, "is another file than the one that was opened", "has changed since the run opened it"),
        (Path.unlink, "x.bin does not exist any more", "shard0-0.bin does not exist"),
        (lambda path: os.truncate(path, 40), "is another file than the one", "its index ends at byte"),
    ],
)
def test_a_file_that_was_replaced_while_it_was_closed_is_told(corpus, tmp_path, harm, of_dataset, of_corpus):
    dataset = IndexedDataset(write_numbers(tmp_path / "x", TOKENS))
    corpus.read(SHARDS * TOKENS - 500, 500)
    for name in ("x", "shard0-0"):
        harm(tmp_path / f"{name}.bin")
    assert harm is overwrite_with_the_old_time or not dataset.is_current()
    with pytest.raises(FileReplacedError, match=of_dataset):
        dataset.tokens(0, 5)
    with pytest.raises(DataError, match=of_corpus):
        corpus.read(0, 5)


def test_equal_data_in_place_of_a_closed_file_is_read_on(corpus, tmp_path):
    corpus.read(SHARDS * TOKENS - 500, 500)
    for suffix in (".bin", ".idx"):
        shutil.copy(tmp_path / f"shard0-0{suffix}", tmp_path / "copy")
        os.replace(tmp_path / "copy", tmp_path / f"shard0-0{suffix}")
    assert corpus.read(0, 150).tolist() == list(range(150))


def test_another_mode_or_link_of_a_closed_file_does_not_end_the_run(corpus, tmp_path):
    corpus.read(SHARDS * TOKENS - 500, 500)
    (tmp_path / "shard0-0.bin").chmod(0o640)
    os.link(tmp_path / "shard1-100.bin", tmp_path / "link")
    assert corpus.read(0, 250).tolist() == list(range(250))


def test_a_process_without_a_free_descriptor_is_told_how_to_raise_the_limit(corpus, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = corpus.shards[0]
    held.tokens(0, 1)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        with pytest.raises(
            DataError, match=r"cannot open .*shard5-500\.bin: Too many open files; this process may have 0\n.*\n.*ulimit -n 4096"
        ):
            corpus.shards[5].tokens(0, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert corpus.read(0, 250).tolist() == list(range(250))


def test_descriptors_that_others_need_are_given_up(corpus, tmp_path, monkeypatch):
    """Files of datasets are closed if the rest of the process has used up the limit."""
    monkeypatch.setattr(local_files._OPEN_FILES, "_most", 1000)
    corpus.read(0, SHARDS * TOKENS)
    before, (soft, hard) = open_datasets(tmp_path), resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    others = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
        try:
            while True:
                others.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        dataset = IndexedDataset(corpus.prefixes[0])
        assert dataset.tokens(0, 5).tolist() == list(range(5))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in others:
            os.close(descriptor)
    assert open_datasets(tmp_path) < before


def test_the_programs_read_more_shards_than_they_may_open_files(tmp_path):
    """With a hard limit of 100 open files: a plan, a merge and a check of 150 shards of two files each."""
    shards = corpus_of(tmp_path, *[40] * 150).prefixes

    def program(*words: str) -> str:
        limited = ["bash", "-c", 'ulimit -n 100; exec "$@"', "bash", sys.executable]
        done = subprocess.run([*limited, *words], capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    plan = ["--seq-length", "16", "--global-batch-size", "2", "--patch-size", "2", "--train-tokens", "2000", "--lr", "1e-3"]
    words = [*MODEL, *DATA, *plan, "--vocab-size", "6000", "--data-path", f"{tmp_path}/shard*", "--dry-run"]
    assert "epochs so far" in program("pretrain_gpt_patch.py", *words)
    merged = json.loads(
        program("tools/merge_datasets.py", "--input", f"{tmp_path}/shard*", "--output-prefix", f"{tmp_path}/all").splitlines()[-1]
    )
    assert (merged["shards"], merged["tokens"]) == (150, 6000)
    assert json.loads(program("tools/inspect_dataset.py", f"{tmp_path}/all", "--check").splitlines()[-1])["problems"] == []
    assert sorted(TokenCorpus([f"{tmp_path}/all"]).read(0, 6000).tolist()) == list(range(6000)) and len(shards) == 150


def test_a_shuffle_that_may_open_too_few_files_says_so(tmp_path):
    prefix = write_numbers(tmp_path / "x", 400)
    code = "import resource, sys; from pathlib import Path; from megatron_patch.preprocess import dedup_shuffle as d; d._PART_BYTES = 16\n"
    code += "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
    code += "try: d.dedup_and_shuffle(sys.argv[1], sys.argv[1] + 'o', False, 1, Path(sys.argv[1] + 's'))\nexcept d.DataError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code, prefix], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "Too many open files" in done.stdout and "ulimit -n 4096" in done.stdout, done.stderr
