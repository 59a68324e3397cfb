"""Prefetching in a thread. In: an iterator. Out: its items, in the same order; each is made while the caller processes the one before."""

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
    """The end of the items; with the exception that ended them, if any."""

    error: BaseException | None = None


class Prefetcher(Generic[Item]):
    """Iterates in a thread, one item ahead of the caller. A context manager, which ends the thread.

    Args:
        items: iterated in the thread. When the context ends, an item that is being made is completed first.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = items
        self._made: queue.SimpleQueue[Item | _End] = queue.SimpleQueue()
        self._room = threading.Semaphore(1)
        self._wanted = True
        self._thread = threading.Thread(target=self._make, daemon=True, name="prefetch")

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
        except BaseException as error:  # raised again where the caller takes the item
            self._made.put(_End(error))

    def __iter__(self) -> Iterator[Item]:
        """Yields the items.

        Raises:
            Exception: whatever the iterator raised, after the items before it.
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
                del item  # breaks the cycle of error and frame, which would keep the thread's files open


def prefetch_if(wanted: bool, items: Iterable[Item]) -> AbstractContextManager[Iterable[Item]]:
    """Returns the items, prefetched in a thread or not, as a context manager."""
    return Prefetcher(items) if wanted else contextlib.nullcontext(items)


def spare_cores(workers: int) -> bool:
    """Returns whether this process may use more cores than it has workers, so that each can prefetch in a second thread."""
    return len(os.sched_getaffinity(0)) > workers
