"""What runs inside a worker process: it encodes batches and writes their tokens into the outputs.

In: through one pipe, batches and the positions of encoded batches in the outputs. Out: through another pipe, for each batch an
`EncodedBatch` without its tokens, and later that the tokens are written. Tokens never leave the worker: it writes them to the outputs
itself, so the process that keeps the order does not handle them.
"""

from __future__ import annotations

import collections
import contextlib
import os
import queue
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from megatron_patch.preprocess.encode import EncodedBatch, EncodedColumn, Encoder, EncodeSettings
from megatron_patch.preprocess.prefetch import prefetch_if
from megatron_patch.raw_text.parse_documents import parse_batch
from megatron_patch.raw_text.readers import Batch
from megatron_patch.tokenizers.base import Tokenizer
from megatron_patch.utils.files import begin_writing_back, open_descriptor


@dataclass(frozen=True)
class WriteAt:
    """Where the worker writes its oldest encoded batch that is not written yet: the first byte in each output."""

    starts: tuple[int, ...]


@dataclass(frozen=True)
class Written:
    """A batch has been written; or, if `error` is not None, the output with index `output` could not be written."""

    output: int = 0
    error: OSError | None = None


@dataclass(frozen=True)
class WorkerTask:
    """What every worker does.

    Args:
        settings: how to encode.
        tokenizer: the reference tokenizer, if it is loaded; None: the worker loads it.
        outputs: the files that tokens are written to, one for each key.
        prefetch: a thread reads the next batch while one is encoded.
    """

    settings: EncodeSettings
    tokenizer: Tokenizer | None
    outputs: tuple[Path, ...]
    prefetch: bool


def run_worker(work: Connection, results: Connection, task: WorkerTask, inherited: Sequence[Connection]) -> None:
    """The main function of a worker process. It returns when its pipes are closed.

    Args:
        work: batches and `WriteAt` arrive here.
        results: `EncodedBatch` without tokens, `Written` and exceptions are sent here.
        task: what to do.
        inherited: pipes of other workers, which a forked process inherits. They are closed, so that the end of a pipe is noticed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for pipe in inherited:
        pipe.close()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        _WorkerLoop(work, results, task).run()


class _WorkerLoop:
    """Encodes in the main thread; a second thread receives messages and writes tokens."""

    def __init__(self, work: Connection, results: Connection, task: WorkerTask) -> None:
        self._work, self._results, self._task = work, results, task
        self._inbox: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._unwritten: collections.deque[tuple[EncodedColumn, ...]] = collections.deque()
        self._send_lock = threading.Lock()
        threading.Thread(target=self._receive, daemon=True).start()
        self._encoder = Encoder(task.settings, task.tokenizer)

    def _send(self, message: EncodedBatch | Written | Exception) -> None:
        with self._send_lock:
            self._results.send(message)

    def run(self) -> None:
        """Encodes until there are no more batches."""
        parsed = (parse_batch(batch, self._task.settings.keys) for batch in iter(self._inbox.get, None))
        with prefetch_if(self._task.prefetch, parsed) as batches:
            try:
                for encoded in map(self._encoder.encode, batches):
                    self._unwritten.append(encoded.columns)
                    self._send(replace(encoded, columns=tuple(replace(column, tokens=column.tokens[:0]) for column in encoded.columns)))
            except Exception as error:  # the parent process raises it, and closes the pipes
                self._send(error)

    def _receive(self) -> None:
        """Receives messages as they arrive, so that the sender never waits for a full pipe; writes while the other thread encodes."""
        try:
            files = [open_descriptor(Path(path), os.O_WRONLY) for path in self._task.outputs]
            while True:
                message = self._work.recv()
                if isinstance(message, WriteAt):
                    self._send(_write(self._unwritten.popleft(), files, message.starts))
                else:
                    self._inbox.put(message)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass  # the parent closed the pipe
        finally:
            self._inbox.put(None)  # ends this worker after any failure, and the parent notices that


def _write(columns: Sequence[EncodedColumn], files: Sequence[int], starts: Sequence[int]) -> Written:
    """Writes the tokens of each key to its output, from the given byte on."""
    for output, (column, file, start) in enumerate(zip(columns, files, starts, strict=True)):
        try:
            view = np.ascontiguousarray(column.tokens).view(np.uint8).data
            begin, size = start, view.nbytes
            while view.nbytes:
                count = os.pwrite(file, view, start)
                view, start = view[count:], start + count
            begin_writing_back(file, begin, size)
        except OSError as error:
            return Written(output, error)
    return Written()
