"""Data that changes, shrinks or vanishes while it is read, and data at addresses: fetched once, checked, and the same tokens."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest

from megatron_patch.data import remote_files
from megatron_patch.data.collate import DocumentMasking
from megatron_patch.data.corpus import TokenCorpus, check_vocabulary, open_corpus
from megatron_patch.data.indexed_dataset import IndexedDataset
from megatron_patch.data.inspect import integrity_problems
from megatron_patch.data.loader import PatchLoader
from megatron_patch.data.token_stream import TrainStream
from megatron_patch.errors import DataError
from megatron_patch.preprocess.merge import merge_datasets
from tests.data.streams import corpus_of, plan_of, write_numbers

TOKENS = 20_000


@pytest.fixture
def prefix(tmp_path):
    return write_numbers(tmp_path / "x", TOKENS)


def shrink(path):
    os.truncate(path, 4 * 100)


def overwrite(path):
    """Other content of the same size, at another time."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))


def vanish(path):
    path.unlink()


@pytest.mark.parametrize(
    ("harm", "words"),
    [(shrink, "shorter|its index ends"), (overwrite, "has changed since the run opened it"), (vanish, "does not exist")],
)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_harm_during_a_run_ends_it_with_a_sentence(prefix, harm, words, prefetch):
    """Mapped files would end the process with a signal where the file has become shorter."""
    corpus = TokenCorpus([prefix])
    corpus.fingerprint()
    stream = TrainStream(plan_of([(1, 500, "both")]), {"x": corpus}, (("x", 1.0),), "1,0,0", 1)
    loader = PatchLoader(stream, 0, 0, 1, DocumentMasking(), prefetch=prefetch)
    try:
        loader.next_step()
        harm(Path(f"{prefix}.bin"))
        with pytest.raises(DataError, match=words):
            for _ in range(100):
                loader.next_step()
    finally:
        loader.close()


def test_equal_data_in_its_place_is_read_on(prefix, tmp_path):
    corpus = TokenCorpus([prefix])
    corpus.fingerprint()
    shutil.copy(f"{prefix}.bin", tmp_path / "copy")
    os.replace(tmp_path / "copy", f"{prefix}.bin")
    os.utime(f"{prefix}.bin", ns=(1, 1))
    assert corpus.read(5000, 10).tolist() == list(range(5000, 5010))
    assert corpus.shards[0].is_current()


def test_harm_between_runs_is_told_by_the_fingerprint(prefix):
    before = TokenCorpus([prefix]).fingerprint()
    assert TokenCorpus([prefix]).fingerprint() == before
    raw = bytearray(Path(f"{prefix}.bin").read_bytes())
    raw[-1] ^= 1
    Path(f"{prefix}.bin").write_bytes(raw)
    assert TokenCorpus([prefix]).fingerprint() != before


def test_an_index_that_shrinks_while_it_is_read_is_an_error(prefix):
    dataset = IndexedDataset(prefix)
    os.truncate(f"{prefix}.idx", 100)
    with pytest.raises(DataError, match="shorter"):
        dataset.sequence_pointers[:]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGATRON_PATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote_files, "_CHUNK_BYTES", 1000)
    return tmp_path / "cache"


@pytest.fixture
def memory(tmp_path):
    """Two shards, a list of them and the same corpus here."""
    local = corpus_of(tmp_path, 3000, 2000)
    system = fsspec.filesystem("memory")
    for number, prefix in enumerate(local.prefixes):
        for suffix in (".bin", ".idx"):
            system.pipe(f"/corpus/{number}{suffix}", Path(prefix + suffix).read_bytes())
    system.pipe("/corpus/list.txt", b"# two shards\n0\nmemory://corpus/1.idx\n")
    yield local, system
    system.rm("/corpus", recursive=True)


@pytest.mark.parametrize("word", ["memory://corpus/?", "@memory://corpus/list.txt"])
def test_addresses_give_the_tokens_of_files(memory, word):
    local, _ = memory
    remote = open_corpus(word)
    assert [prefix.removeprefix("memory:").lstrip("/") for prefix in remote.prefixes] == ["corpus/0", "corpus/1"]
    assert np.array_equal(remote.read(0, 5000), local.read(0, 5000)) and np.array_equal(remote.read(2990, 33), np.arange(2990, 3023))
    assert remote.fingerprint() == local.fingerprint()
    check_vocabulary(remote, 5000)
    with pytest.raises(DataError, match="token id"):
        check_vocabulary(remote, 4000)
    assert not integrity_problems(remote.shards[0], 5000)


def test_what_was_fetched_is_read_from_the_cache(memory, cache):
    _, system = memory
    corpus = open_corpus("memory://corpus/0")
    corpus.fetch(np.array([0, 700, 1400]), 600)
    kept = {path.relative_to(cache): path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    assert max(map(len, kept.values())) == 1000 and not any(name.suffix for name in kept)
    system.pipe("/corpus/0.bin", b"gone")
    assert corpus.read(700, 600).tolist() == list(range(700, 1300))
    with pytest.raises(DataError, match="has changed since it was opened|requested bytes"):
        corpus.read(2500, 400)
    for path in cache.rglob("000"):
        if path.is_file():
            path.write_bytes(b"torn")
    with pytest.raises(DataError, match="has changed since it was opened|requested bytes"):
        corpus.read(0, 10)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("memory://corpus/none", "does not exist"),
        ("memory://corpus/none-*", "matches no dataset"),
        ("nowhere://x/y", "cannot be read.*nowhere"),
        *((f"{kind}://x/y", "does not name a file on a server") for kind in ("git", "async_wrapper", "asyncwrapper", "reference")),
    ],
)
def test_wrong_addresses_are_refused(memory, word, words):
    with pytest.raises(DataError, match=words):
        open_corpus(word)


def test_merging_wants_files(memory, tmp_path):
    with pytest.raises(DataError, match="is a remote address"):
        merge_datasets(["memory://corpus/0"], str(tmp_path / "out"))


def test_a_cache_without_space_is_an_error(memory, cache):
    cache.write_text("a file where the folder should be")
    with pytest.raises(DataError, match="MEGATRON_PATCH_CACHE"):
        open_corpus("memory://corpus/0")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves ranges, which Python's handler does not, and fails now and then, as networks do."""

    def do_GET(self):
        self.server.requests += 1
        if self.server.requests % 5 == 0:
            self.send_error(503)
            return
        data = Path(self.translate_path(self.path)).read_bytes()
        first, _, last = self.headers.get("Range", f"bytes=0-{len(data) - 1}").removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(part)

    def end_headers(self):
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *words):
        pass


@pytest.fixture
def server(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path))) as server:
        server.requests = 0
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_corpus_on_a_web_server_is_fetched_once(prefix, server, monkeypatch):
    monkeypatch.setattr(remote_files, "_CHUNK_BYTES", 1 << 14)
    monkeypatch.setattr(remote_files, "_PAUSE_SECONDS", 0.01)
    local = TokenCorpus([prefix])
    address = f"http://127.0.0.1:{server.server_port}/x"
    remote = open_corpus(address)
    assert np.array_equal(remote.read(0, TOKENS), local.read(0, TOKENS))
    asked = server.requests
    assert asked >= TOKENS * 4 / (1 << 14)
    again = open_corpus(address)
    assert np.array_equal(again.read(77, 9000), local.read(77, 9000)) and server.requests == asked
    overwrite(Path(f"{prefix}.bin"))
    assert not open_corpus(address).read(77, 9000).any(), "cached chunks of the earlier file are not used for the new one"
