"""A thread works one item ahead, in order, and ends with whoever iterates; so preprocessing reads and writes while it encodes."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

from megatron_patch.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_patch.preprocess import in_process
from megatron_patch.preprocess.encode import Encoder, EncodeSettings, load_checked_tokenizer
from megatron_patch.preprocess.prefetch import Prefetcher
from megatron_patch.raw_text.readers import BATCH_BYTES, Batch

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 60  # seconds, for what comes at once unless it never does
SETTINGS = EncodeSettings("NullTokenizer", None, vocab_size=1000, append_eod=True)


def no_thread_is_left() -> bool:
    return not any(thread.name == "prefetch" for thread in threading.enumerate())


def test_all_items_come_in_order():
    with Prefetcher(iter(range(1000))) as numbers:
        assert list(numbers) == list(range(1000))
    assert no_thread_is_left()
    with Prefetcher(iter(())) as nothing:
        assert list(nothing) == []


def test_exactly_one_item_is_made_ahead():
    made, second = [], threading.Event()

    def items():
        for number in range(100):
            made.append(number)
            if number == 1:
                second.set()
            yield number

    with Prefetcher(items()) as numbers:
        assert next(iter(numbers)) == 0
        assert second.wait(PATIENCE)
    assert made == [0, 1] and no_thread_is_left()


def test_an_error_comes_behind_the_items_before_it():
    def items():
        yield from "ab"
        raise KeyError("c")

    got = []
    with pytest.raises(KeyError, match="c"), Prefetcher(items()) as letters:
        for letter in letters:
            got.append(letter)
    assert got == ["a", "b"] and no_thread_is_left()


def test_an_error_lets_go_of_what_was_open():
    class Open:
        """What a generator holds."""

    held = []

    def items():
        mine = Open()
        held.append(weakref.ref(mine))
        yield 1
        raise KeyError

    gc.disable()  # what only it would find may stay open for long
    try:
        with contextlib.suppress(KeyError), Prefetcher(items()) as numbers:
            for _ in numbers:
                pass
        del numbers
        assert held[0]() is None
    finally:
        gc.enable()


def test_one_worker_reads_and_writes_while_it_encodes(tmp_path, monkeypatch):
    """Each batch is encoded only once the next has been read, and written only once the next has been encoded."""
    count = 5
    work = [Batch("x", data=b'{"text": "%d"}\n' % number, next_unit=number) for number in range(count)]
    read, encoded = ([threading.Event() for _ in range(count + 1)] for _ in range(2))
    read[count].set()
    encoded[count].set()
    plain_read, plain_encode = in_process.parse_batch, Encoder.encode

    def parse_batch(batch, keys):
        read[batch.next_unit].set()
        return plain_read(batch, keys)

    def encode(self, parsed):
        assert read[parsed.batch.next_unit + 1].wait(PATIENCE)
        encoded[parsed.batch.next_unit].set()
        return plain_encode(self, parsed)

    class Writer(IndexedDatasetWriter):
        def append(self, tokens, lengths):
            assert encoded[int(tokens[0]) + 1].wait(PATIENCE)
            super().append(tokens, lengths)

    monkeypatch.setattr(in_process, "parse_batch", parse_batch)
    monkeypatch.setattr(Encoder, "encode", encode)
    with (
        Writer(str(tmp_path / "x"), np.dtype(SETTINGS.dtype)) as writer,
        in_process.InProcessEncoder(work, SETTINGS, load_checked_tokenizer(SETTINGS), [writer]) as encoder,
    ):
        assert [batch.next_unit for batch in encoder] == list(range(count))
        writer.finish()
    assert np.fromfile(tmp_path / "x.bin", SETTINGS.dtype).reshape(count, 2)[:, 0].tolist() == list(range(count))
    assert no_thread_is_left()


def test_an_error_ends_the_tool_though_standard_input_is_still_open(tmp_path):
    tool = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", "-", "--output-prefix", str(tmp_path / "x")]
    tool += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "1000", "--append-eod", "--on-bad-line", "fail"]
    with subprocess.Popen(tool, stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stdin is not None and process.stderr is not None
        try:
            # A batch and a little more, which the pipe holds.
            process.stdin.write(b"no JSON\n" + b'{"text": "1 2 3"}\n' * (BATCH_BYTES // 18 + 100))
            process.stdin.flush()
            assert process.wait(PATIENCE) == 3
            assert b"not valid JSON" in process.stderr.read()
        finally:
            process.kill()
