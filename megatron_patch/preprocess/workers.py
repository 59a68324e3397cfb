"""Processes that encode batches and write the tokens to their places in the outputs.

In: batches in order, and one writer a key. Out: what became of each batch, in the same order; its tokens stay where they were made. A
worker says how many there are, is told from which byte on they go, and writes them itself, so that the process that keeps the order
touches none of them and one more worker is one more worker's speed. Each worker is on pipes of its own: one that dies, even in the middle
of a message, closes them and is noticed at once; workers on one shared queue (as in `concurrent.futures`) wait for the lock and the rest
of the message that died with it.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import numpy as np

from megatron_patch.data.indexed_dataset import IndexedDatasetWriter
from megatron_patch.errors import DataError
from megatron_patch.preprocess.encode import Encoded, Encoder, EncodeSettings, Part
from megatron_patch.preprocess.prefetch import prefetch_if, spare_cores
from megatron_patch.raw_text.parse_documents import Texts, read_texts
from megatron_patch.raw_text.readers import Batch
from megatron_patch.tokenizers.base import Tokenizer
from megatron_patch.utils.files import begin_writing_back, copy_range

# Batches a worker holds: one that it encodes, and one that waits so that it never does.
_HELD = 2
_GOODBYE_SECONDS = 5.0
# They start threads of their own, which a forked process would wait for and not have.
_WITH_THREADS = ("fastokens", "torch")


@dataclass(frozen=True)
class _Places:
    """Where the oldest batch that a worker has encoded and not written goes: a first byte in each output."""

    starts: tuple[int, ...]


@dataclass(frozen=True)
class _Written:
    """A batch's tokens are where they belong; or the output that they could not be written to, and why."""

    output: int = 0
    error: OSError | None = None


@dataclass(frozen=True)
class _Task:
    """What every worker is to do.

    Args:
        settings: how to encode.
        tokenizer: for them, where it is loaded.
        outputs: files that tokens go into.
        ahead: a thread reads the next batch while one is encoded.
    """

    settings: EncodeSettings
    tokenizer: Tokenizer | None
    outputs: tuple[Path, ...]
    ahead: bool


class _Server:
    """A worker's life.

    Args:
        work: where batches and places come from.
        results: where `Encoded` without tokens, `_Written` and errors go.
        task: what it is to do with them.
    """

    def __init__(self, work: Connection, results: Connection, task: _Task) -> None:
        self._work, self._results, self._task = work, results, task
        self._inbox: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._unwritten: collections.deque[tuple[Part, ...]] = collections.deque()
        self._one_at_a_time = threading.Lock()
        threading.Thread(target=self._receive, daemon=True).start()
        self._encoder = Encoder(task.settings, task.tokenizer)

    def _send(self, message: Encoded | _Written | Exception) -> None:
        with self._one_at_a_time:
            self._results.send(message)

    def run(self) -> None:
        """Encodes until there is no more."""
        texts = (read_texts(batch, self._task.settings.keys) for batch in iter(self._inbox.get, None))
        with prefetch_if(self._task.ahead, texts) as read:
            try:
                for encoded in map(self._encoder.encode, read):
                    self._unwritten.append(encoded.parts)
                    self._send(replace(encoded, parts=tuple(replace(part, tokens=part.tokens[:0], file="") for part in encoded.parts)))
            except Exception as error:  # told to whoever asked, who then ends what the thread waits for
                self._send(error)

    def _receive(self) -> None:
        """Takes messages at once, so that a full pipe holds nobody up; writes while the other thread encodes."""
        try:
            files = [os.open(path, os.O_WRONLY) for path in self._task.outputs]
            while True:
                message = self._work.recv()
                if isinstance(message, _Places):
                    self._send(_write(self._unwritten.popleft(), files, message.starts))
                else:
                    self._inbox.put(message)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass  # the other end is gone
        finally:
            self._inbox.put(None)  # whatever happened, this worker ends, which is noticed


def _write(parts: Sequence[Part], files: Sequence[int], starts: Sequence[int]) -> _Written:
    """Writes each key's tokens from its first byte on."""
    for output, (part, file, start) in enumerate(zip(parts, files, starts, strict=True)):
        try:
            if part.file:
                with open(part.file, "rb") as source:
                    os.lseek(file, start, os.SEEK_SET)
                    copy_range(source.fileno(), file, 0, os.fstat(source.fileno()).st_size)
                os.unlink(part.file)
                continue
            view = np.ascontiguousarray(part.tokens).view(np.uint8).data
            begin, size = start, view.nbytes
            while view.nbytes:
                count = os.pwrite(file, view, start)
                view, start = view[count:], start + count
            begin_writing_back(file, begin, size)
        except OSError as error:
            return _Written(output, error)
    return _Written()


def _serve(work: Connection, results: Connection, task: _Task, others: Sequence[Connection]) -> None:
    """A worker process: it ends when its pipes do, so that it may hold no other's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for pipe in others:
        pipe.close()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        _Server(work, results, task).run()


def _context() -> Any:
    """Forked workers begin with all that is loaded; where this process has threads, with what a server of its own has loaded."""
    if sys.platform == "linux" and threading.active_count() == 1 and not any(name in sys.modules for name in _WITH_THREADS):
        return multiprocessing.get_context("fork")
    methods = multiprocessing.get_all_start_methods()
    return multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")


def prepare_workers() -> None:
    """Starts what workers are forked from, where that is not this process; it imports what they need while the caller goes on."""
    context = _context()
    if context.get_start_method() == "forkserver":
        from multiprocessing import forkserver

        context.set_forkserver_preload(["__main__", __name__, "tokenizers", "fastokens"])
        forkserver.ensure_running()


class _Worker:
    """A process, the pipes to it and from it, the numbers of the batches that it is to encode, and how many it is to write."""

    def __init__(self, task: _Task, others: Sequence[_Worker]) -> None:
        context = _context()
        work, self._work = context.Pipe(duplex=False)
        self.results, results = context.Pipe(duplex=False)
        forked = context.get_start_method() == "fork"
        inherited = [pipe for worker in (*others, self) for pipe in (worker._work, worker.results)] if forked else []
        task = task if forked else replace(task, tokenizer=None)
        self.process: BaseProcess = context.Process(target=_serve, args=(work, results, task, inherited), daemon=True)
        self.process.start()
        work.close()
        results.close()
        self.held: collections.deque[int] = collections.deque()
        self.writing = 0

    def send(self, message: Batch | _Places) -> None:
        """Hands over a batch, or the places of one.

        Raises:
            DataError: the worker has died.
        """
        try:
            self._work.send(message)
        except OSError as error:
            raise _dead() from error

    def receive(self) -> Encoded | _Written:
        """What it says next.

        Raises:
            DataError: the worker has died.
            Exception: whatever encoding raised.
        """
        try:
            answer = self.results.recv()
        except (EOFError, OSError) as error:
            raise _dead() from error
        if isinstance(answer, Exception):
            raise answer
        return cast("Encoded | _Written", answer)

    def let_go(self) -> None:
        """Tells the process to end: kindly where it has nothing to do."""
        self._work.close()
        self.results.close()
        if self.held or self.writing:
            self.process.terminate()

    def end(self) -> None:
        """Waits for the end of the process, and then ends it by force."""
        self.process.join(_GOODBYE_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _dead() -> DataError:
    return DataError(
        "a worker process died (killed, or out of memory)",
        "workers that live to the end",
        "use fewer --workers or a machine with more memory, and run again; nothing was written under the final names",
    )


class Workers:
    """Encodes and writes in processes of their own; a context manager, which ends them.

    Args:
        work: the batches; read only as far ahead as the workers need.
        count: processes, from 1.
        settings: how to encode.
        tokenizer: as `checked_tokenizer` gave it for them.
        writers: one a key.
    """

    def __init__(
        self,
        work: Iterable[Batch],
        count: int,
        settings: EncodeSettings,
        tokenizer: Tokenizer,
        writers: Sequence[IndexedDatasetWriter],
    ) -> None:
        self._batches, self._more = enumerate(work), True
        self._count, self._settings, self._tokenizer, self._writers = count, settings, tokenizer, writers
        self._workers: list[_Worker] = []
        self._done: dict[int, tuple[_Worker, Encoded]] = {}

    def __enter__(self) -> Workers:
        outputs = tuple(writer.tokens_path for writer in self._writers)
        task = _Task(self._settings, self._tokenizer, outputs, spare_cores(self._count))
        with contextlib.ExitStack() as stack:
            stack.callback(self._end)
            for _ in range(self._count):
                self._workers.append(_Worker(task, self._workers))
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        for worker in self._workers:
            worker.let_go()
        for worker in self._workers:
            worker.end()

    def __iter__(self) -> Iterator[Encoded]:
        """Each batch that has been given its places, in order; `settle` says when they are filled.

        Raises:
            DataError: a worker died, or an output cannot be written.
            Exception: whatever encoding raised.
        """
        following = 0
        while True:
            self._hand_out()
            if following in self._done:
                worker, encoded = self._done.pop(following)
                following += 1
                places = [writer.reserve(part.lengths) for writer, part in zip(self._writers, encoded.parts, strict=True)]
                worker.send(_Places(tuple(places)))
                worker.writing += 1
                yield encoded
            elif any(worker.held for worker in self._workers):
                self._take()
            else:
                self.settle()
                return

    def _hand_out(self) -> None:
        """Gives every worker what it may hold."""
        while self._more and len(self._done) + sum(len(worker.held) for worker in self._workers) < (_HELD + 1) * self._count:
            idlest = min(self._workers, key=lambda worker: len(worker.held))
            if len(idlest.held) == _HELD:
                return
            item = next(self._batches, None)
            if item is None:
                self._more = False
            else:
                idlest.held.append(item[0])
                idlest.send(item[1])

    def _take(self) -> None:
        """Waits for what workers say, and takes one message of each that has one."""
        busy = {worker.results: worker for worker in self._workers if worker.held or worker.writing}
        for pipe in wait(list(busy)):
            worker = busy[cast(Connection, pipe)]
            answer = worker.receive()
            if isinstance(answer, _Written):
                worker.writing -= 1
                if answer.error is not None:
                    raise self._writers[answer.output].failure(answer.error)
            else:
                self._done[worker.held.popleft()] = worker, answer

    def settle(self) -> None:
        """Waits until all that has places is in its places.

        Raises:
            DataError: as iterating.
            Exception: as iterating.
        """
        while any(worker.writing for worker in self._workers):
            self._take()


class InProcessEncoder:
    """Encodes and writes in this process: one thread reads ahead, one encodes, and the caller's writes; a context manager, which ends them.

    Args:
        work: the batches.
        settings: how to encode.
        tokenizer: as `checked_tokenizer` gave it for them.
        writers: one a key.
        ahead: with threads; without, where there is no core for them, or the input may keep one waiting for ever.
    """

    def __init__(
        self,
        work: Iterable[Batch],
        settings: EncodeSettings,
        tokenizer: Tokenizer,
        writers: Sequence[IndexedDatasetWriter],
        ahead: bool = True,
    ) -> None:
        self._work, self._encoder, self._writers, self._ahead = work, Encoder(settings, tokenizer), writers, ahead
        self._threads = contextlib.ExitStack()
        self._encoded: Iterable[Encoded] = ()

    def __enter__(self) -> InProcessEncoder:
        keys = self._encoder.settings.keys
        read: Iterable[Texts] = (read_texts(batch, keys) for batch in self._work)
        with contextlib.ExitStack() as stack:
            read = stack.enter_context(prefetch_if(self._ahead, read))
            self._encoded = stack.enter_context(prefetch_if(self._ahead, map(self._encoder.encode, read)))
            self._threads = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.close()

    def __iter__(self) -> Iterator[Encoded]:
        """Each batch that has been given its places, in order."""
        for encoded in self._encoded:
            for writer, part in zip(self._writers, encoded.parts, strict=True):
                if part.file:
                    writer.append_file(Path(part.file), part.lengths)
                    os.unlink(part.file)
                else:
                    writer.append(part.tokens, part.lengths)
            yield encoded

    def settle(self) -> None:
        """Nothing is under way between two batches."""
