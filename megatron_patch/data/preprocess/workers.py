"""Worker processes that encode batches, each on a pipe of its own.

In: batches in order. Out: what they became, in the same order. A worker that dies, even in the middle of a message, closes its pipe and is
noticed at once; workers on one shared queue (as in `concurrent.futures`) wait for the lock and the rest of the message that died with it.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Generator, Iterable
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

import numpy as np

from megatron_patch.data.preprocess.encode import Encoded, Encoder, EncodeSettings
from megatron_patch.data.preprocess.readers import Batch
from megatron_patch.errors import DataError

# Batches a worker holds: one that it encodes, and one that waits so that it never does.
_HELD = 2
_GOODBYE_SECONDS = 5.0
_RESULT_BYTES = 1 << 20  # a batch's tokens, so that a worker hands them over and goes on


def _receive(pipe: Connection, inbox: queue.SimpleQueue[Batch | None]) -> None:
    """Takes batches off the pipe at once: a full pipe in both directions would hold up both ends."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            inbox.put(pipe.recv())
    inbox.put(None)


def _hand_over(pipe: Connection, encoded: Encoded) -> None:
    """Sends a result, its tokens behind the rest and as they lie in memory; see `_take`."""
    tokens = [part.tokens for part in encoded.parts]
    without = tuple(replace(part, tokens=part.tokens[:0]) for part in encoded.parts)
    pipe.send((replace(encoded, parts=without), [array.size for array in tokens]))
    for array in tokens:
        view = np.ascontiguousarray(array).view(np.uint8).data
        while view.nbytes:
            view = view[os.write(pipe.fileno(), view) :]


def _take(pipe: Connection) -> Encoded | Exception:
    """What `_hand_over` has sent, or the error that was sent in its place.

    Raises:
        EOFError: the other end is gone.
    """
    answer = pipe.recv()
    if isinstance(answer, Exception):
        return answer
    encoded, sizes = answer
    parts = []
    for part, size in zip(encoded.parts, sizes, strict=True):
        tokens = np.empty(size, part.tokens.dtype)
        view = tokens.view(np.uint8).data
        while view.nbytes:
            count = os.readv(pipe.fileno(), [view])
            if count == 0:
                raise EOFError
            view = view[count:]
        parts.append(replace(part, tokens=tokens))
    return replace(encoded, parts=tuple(parts))


def _serve(work: Connection, results: Connection, settings: EncodeSettings) -> None:
    """A worker's life: it ends when its pipes do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    inbox: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(work, inbox), daemon=True).start()
    encoder = Encoder(settings)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while (batch := inbox.get()) is not None:
            try:
                _hand_over(results, encoder(batch))
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:  # told to whoever asked
                results.send(error)


def _context() -> Any:
    methods = multiprocessing.get_all_start_methods()
    return multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")


def prepare_workers() -> None:
    """Starts what workers are forked from, which imports what they need while the caller goes on."""
    context = _context()
    if context.get_start_method() == "forkserver":
        from multiprocessing import forkserver

        context.set_forkserver_preload(["__main__", __name__, "tokenizers", "fastokens"])
        forkserver.ensure_running()


class _Worker:
    """A process, the pipes to it and from it, and the numbers of the batches it holds."""

    def __init__(self, settings: EncodeSettings) -> None:
        context = _context()
        work, self._work = context.Pipe(duplex=False)
        self.results, results = context.Pipe(duplex=False)
        if hasattr(fcntl, "F_SETPIPE_SZ"):
            with contextlib.suppress(OSError):  # more than this user may have
                fcntl.fcntl(results.fileno(), fcntl.F_SETPIPE_SZ, _RESULT_BYTES)
        self.process: BaseProcess = context.Process(target=_serve, args=(work, results, settings), daemon=True)
        self.process.start()
        work.close()
        results.close()
        self.held: collections.deque[int] = collections.deque()

    def send(self, number: int, batch: Batch) -> None:
        """Hands over a batch.

        Raises:
            DataError: the worker has died.
        """
        self.held.append(number)
        try:
            self._work.send(batch)
        except OSError as error:
            raise _dead() from error

    def receive(self) -> tuple[int, Encoded]:
        """The oldest batch it holds, encoded.

        Raises:
            DataError: the worker has died.
            Exception: whatever encoding raised.
        """
        try:
            answer = _take(self.results)
        except (EOFError, OSError) as error:
            raise _dead() from error
        if isinstance(answer, Exception):
            raise answer
        return self.held.popleft(), answer

    def end(self) -> None:
        """Ends the process: kindly, then by force."""
        self._work.close()
        self.results.close()
        if self.held:
            self.process.terminate()
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


def encode_in_order(work: Iterable[Batch], count: int, settings: EncodeSettings) -> Generator[Encoded]:
    """Encodes batches in worker processes.

    Args:
        work: the batches; read only as far ahead as the workers need.
        count: processes, from 1.
        settings: how to encode.

    Yields:
        Each batch, encoded, in the order of `work`.

    Raises:
        DataError: a worker died.
        Exception: whatever encoding raised.
    """
    with contextlib.ExitStack() as stack:
        workers = []
        for _ in range(count):
            workers.append(_Worker(settings))
            stack.callback(workers[-1].end)
        batches = enumerate(work)
        done: dict[int, Encoded] = {}
        following, more = 0, True
        while True:
            while more and len(done) + sum(len(worker.held) for worker in workers) < (_HELD + 1) * count:
                idlest = min(workers, key=lambda worker: len(worker.held))
                if len(idlest.held) == _HELD:
                    break
                item = next(batches, None)
                if item is None:
                    more = False
                else:
                    idlest.send(*item)
            if following in done:
                yield done.pop(following)
                following += 1
                continue
            busy = {worker.results: worker for worker in workers if worker.held}
            if not busy:
                return
            for pipe in wait(list(busy)):
                number, encoded = busy[cast(Connection, pipe)].receive()
                done[number] = encoded
