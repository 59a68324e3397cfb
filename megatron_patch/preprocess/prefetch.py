"""A thread that works ahead. In: an iterator. Out: what it gives, in the same order, made while the caller was at what came before."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class _End:
    """There is no more; because of an error, where there is one."""

    error: BaseException | None = None


class Prefetcher(Generic[Item]):
    """Iterates in a thread of its own, one item ahead of the caller; a context manager, which ends the thread.

    Args:
        items: taken in the thread, which is at most in the middle of one when it is told to end.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = items
        self._made: queue.SimpleQueue[Item | _End] = queue.SimpleQueue()
        self._room = threading.Semaphore(1)
        self._wanted = True
        self._thread = threading.Thread(target=self._make, daemon=True, name="ahead")

    def __enter__(self) -> Prefetcher[Item]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._wanted = False
        self._room.release()
        self._thread.join()

    def _make(self) -> None:
        try:
            items = iter(self._items)
            while self._room.acquire() and self._wanted:
                self._made.put(next(items))
        except StopIteration:
            self._made.put(_End())
        except BaseException as error:  # the caller's, who asked for the item
            self._made.put(_End(error))

    def __iter__(self) -> Iterator[Item]:
        """The items.

        Raises:
            Exception: whatever making one raised, behind those before it.
        """
        while True:
            item = self._made.get()
            self._room.release()
            if not isinstance(item, _End):
                yield item
                continue
            try:
                if item.error is not None:
                    raise item.error
                return
            finally:
                del item  # else the error would hold this frame, and the frame the error, and both what is open in the thread


def prefetch_if(wanted: bool, items: Iterable[Item]) -> AbstractContextManager[Iterable[Item]]:
    """Items that a thread makes ahead, or that are made when they are asked for."""
    return Prefetcher(items) if wanted else contextlib.nullcontext(items)


def spare_cores(workers: int) -> bool:
    """Whether this process may use more cores than workers, so that each can do two things at once."""
    return len(os.sched_getaffinity(0)) > workers
