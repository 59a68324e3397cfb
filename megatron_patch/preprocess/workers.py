"""Runs worker processes: sends them batches, and returns their results in the order of the input.

In: batches in order, and one writer for each key. Out: the result of each batch, in the same order. A worker reports how many tokens a
batch has, receives the byte from which to write them, and writes them itself (worker_process.py), so that throughput grows with the number
of workers. Each worker has pipes of its own: if it dies, even in the middle of a message, the pipes close and the failure is noticed at
once. Workers on one shared queue, as in `concurrent.futures`, would wait for the lock of the dead one.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

from megatron_patch.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_patch.errors import DataError
from megatron_patch.preprocess.encode import EncodedBatch, EncodeSettings
from megatron_patch.preprocess.prefetch import spare_cores
from megatron_patch.preprocess.worker_process import WorkerTask, WriteAt, Written, run_worker
from megatron_patch.raw_text.readers import Batch
from megatron_patch.tokenizers.base import Tokenizer

# One batch that is being encoded, and one that waits, so that the worker never waits.
_BATCHES_PER_WORKER = 2
_EXIT_SECONDS = 5.0
# These modules start threads, which a forked process does not have but would wait for.
_MODULES_WITH_THREADS = ("fastokens", "torch")


def _context() -> Any:
    """Chooses how workers start. Forked workers start with everything loaded; if this process has threads, a fork server forks them."""
    if sys.platform == "linux" and threading.active_count() == 1 and not any(name in sys.modules for name in _MODULES_WITH_THREADS):
        return multiprocessing.get_context("fork")
    methods = multiprocessing.get_all_start_methods()
    return multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")


def prepare_workers() -> None:
    """Starts the fork server, if workers need one. It imports what workers need while the caller continues."""
    context = _context()
    if context.get_start_method() == "forkserver":
        from multiprocessing import forkserver

        context.set_forkserver_preload(["__main__", __name__, "tokenizers", "fastokens"])
        forkserver.ensure_running()


class _Worker:
    """A worker process as its parent sees it: the process, its pipes, and what it has to do.

    Attributes:
        results: the pipe on which its results arrive.
        held: the numbers of the batches that it is to encode, in order.
        writing: the number of batches that it is to write.
    """

    def __init__(self, task: WorkerTask, others: Sequence[_Worker]) -> None:
        context = _context()
        work, self._work = context.Pipe(duplex=False)
        self.results, results = context.Pipe(duplex=False)
        forked = context.get_start_method() == "fork"
        inherited = [pipe for worker in (*others, self) for pipe in (worker._work, worker.results)] if forked else []
        task = task if forked else replace(task, tokenizer=None)
        self.process: BaseProcess = context.Process(target=run_worker, args=(work, results, task, inherited), daemon=True)
        self.process.start()
        work.close()
        results.close()
        self.held: collections.deque[int] = collections.deque()
        self.writing = 0

    def send(self, message: Batch | WriteAt) -> None:
        """Sends a batch, or the position of an encoded one.

        Raises:
            DataError: the worker has died.
        """
        try:
            self._work.send(message)
        except OSError as error:
            raise _worker_died() from error

    def receive(self) -> EncodedBatch | Written:
        """Receives the next result.

        Raises:
            DataError: the worker has died.
            Exception: whatever encoding raised.
        """
        try:
            answer = self.results.recv()
        except (EOFError, OSError) as error:
            raise _worker_died() from error
        if isinstance(answer, Exception):
            raise answer
        return cast("EncodedBatch | Written", answer)

    def close(self) -> None:
        """Closes the pipes, which ends the process; terminates it if it still has work."""
        self._work.close()
        self.results.close()
        if self.held or self.writing:
            self.process.terminate()

    def join(self) -> None:
        """Waits for the end of the process; kills it if it does not end in time."""
        self.process.join(_EXIT_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _worker_died() -> DataError:
    return DataError(
        "a worker process died (it was killed, or ran out of memory)",
        "worker processes that run until the end",
        "run again with fewer --workers or on a machine with more memory; nothing was written under the final names",
    )


class Workers:
    """Encodes and writes batches in worker processes. A context manager, which ends them.

    Args:
        work: the batches; only as many are read as the workers need.
        count: the number of processes, from 1.
        settings: how to encode.
        tokenizer: the tokenizer that `load_checked_tokenizer` returned for these settings.
        writers: one for each key.
    """

    def __init__(
        self,
        work: Iterable[Batch],
        count: int,
        settings: EncodeSettings,
        tokenizer: Tokenizer,
        writers: Sequence[IndexedDatasetWriter],
    ) -> None:
        self._batches, self._has_more = enumerate(work), True
        self._count, self._settings, self._tokenizer, self._writers = count, settings, tokenizer, writers
        self._workers: list[_Worker] = []
        self._encoded: dict[int, tuple[_Worker, EncodedBatch]] = {}

    def __enter__(self) -> Workers:
        outputs = tuple(writer.tokens_path for writer in self._writers)
        task = WorkerTask(self._settings, self._tokenizer, outputs, spare_cores(self._count))
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
            worker.close()
        for worker in self._workers:
            worker.join()

    def __iter__(self) -> Iterator[EncodedBatch]:
        """Yields each batch, in order, after its position in the outputs is fixed; `wait_for_writes` waits until it is written.

        Raises:
            DataError: a worker died, or an output cannot be written.
            Exception: whatever encoding raised.
        """
        number = 0
        while True:
            self._hand_out()
            if number in self._encoded:
                worker, encoded = self._encoded.pop(number)
                number += 1
                starts = [writer.reserve(column.lengths) for writer, column in zip(self._writers, encoded.columns, strict=True)]
                worker.send(WriteAt(tuple(starts)))
                worker.writing += 1
                yield encoded
            elif any(worker.held for worker in self._workers):
                self._receive_results()
            else:
                self.wait_for_writes()
                return

    def _hand_out(self) -> None:
        """Sends batches to the workers, as many as each may hold."""
        limit = (_BATCHES_PER_WORKER + 1) * self._count
        while self._has_more and len(self._encoded) + sum(len(worker.held) for worker in self._workers) < limit:
            least_busy = min(self._workers, key=lambda worker: len(worker.held))
            if len(least_busy.held) == _BATCHES_PER_WORKER:
                return
            item = next(self._batches, None)
            if item is None:
                self._has_more = False
            else:
                least_busy.held.append(item[0])
                least_busy.send(item[1])

    def _receive_results(self) -> None:
        """Waits for results, and receives one from each worker that has sent one."""
        busy = {worker.results: worker for worker in self._workers if worker.held or worker.writing}
        for pipe in wait(list(busy)):
            worker = busy[cast(Connection, pipe)]
            answer = worker.receive()
            if isinstance(answer, Written):
                worker.writing -= 1
                if answer.error is not None:
                    raise self._writers[answer.output].failure(answer.error)
            else:
                self._encoded[worker.held.popleft()] = worker, answer

    def wait_for_writes(self) -> None:
        """Waits until every batch that was yielded is written.

        Raises:
            DataError: as for iterating.
            Exception: as for iterating.
        """
        while any(worker.writing for worker in self._workers):
            self._receive_results()
