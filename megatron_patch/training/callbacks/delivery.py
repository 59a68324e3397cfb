"""Delivers the records of a run to a service; what the service refuses waits in memory and is delivered later.

In: records. Out: calls of the service, all of them from one thread. A service that fails must not end a run on a thousand GPUs, and one
that does not answer must not make it wait: the failure is printed once, and the service is tried again later.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_patch.training.callbacks.base import RunEnd, RunStart
from megatron_patch.training.callbacks.servers import why
from megatron_patch.training.faults.exit_protocol import print_stderr
from megatron_patch.utils.units import plural

_FIRST_PAUSE, _LONGEST_PAUSE = 60.0, 960.0  # seconds before a service that failed is tried again; doubled with each further failure
_MOST_WAITING = 10_000
"""The most records that wait for a service; some 20 MB."""


@dataclass(frozen=True)
class Timed:
    """A record and when it was made.

    Args:
        time: seconds since 1970.
        record: the record.
    """

    time: float
    record: Any


class Service(Protocol):
    """What receives the records of a run. Any method may raise any exception and may take long; all are called from one thread."""

    name: str
    records: tuple[type, ...]
    """The records that it receives."""

    def open(self, start: RunStart | None) -> None:
        """Opens the service.

        Args:
            start: where the run starts: values of previous starts after it are repeated. None: the service was open in this start.
        """

    def add(self, records: Sequence[Timed]) -> None:
        """Delivers records, in order; after an error they are delivered again."""

    def abandon(self) -> None:
        """Lets go of the service after an error, so that it can be opened again."""

    def close(self, end: RunEnd | None) -> None:
        """Closes the service at the end of the run.

        Args:
            end: how the run ended; None: by an error.
        """


class Delivery:
    """What waits for a service, and what is known about the service.

    Args:
        service: the service.
        kept: the file that has all values whatever happens to the service, or None.
        clock: returns seconds.
    """

    def __init__(self, service: Service, kept: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._service, self._clock = service, clock
        self._kept = f"{kept} has all values" if kept is not None else "without --save no file has them"
        self._lock = threading.Lock()
        self._waiting: deque[Timed] = deque()
        self._dropped = 0
        self._start: RunStart | None = None
        self._was_open = self._open = self._failing = False
        self._pause, self._retry_at = _FIRST_PAUSE, 0.0

    def begin(self, start: RunStart) -> None:
        """Sets where the run starts; called before everything else."""
        self._start = start

    def put(self, record: Any) -> None:
        """Takes a record; never waits for the service."""
        with self._lock:
            self._waiting.append(Timed(time.time(), record))
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        while len(self._waiting) > _MOST_WAITING:
            self._waiting.popleft()
            self._dropped += 1

    def due(self) -> float | None:
        """Returns the seconds until `attempt` should be called: 0 now, None when the next record comes."""
        if self._failing:
            return max(0.0, self._retry_at - self._clock())
        return None if self._open and not self._waiting else 0.0

    def attempt(self) -> None:
        """Tries to open the service, if it is not open, and to deliver what waits; reports a failure, and its end."""
        if (error := self._try()) is not None:
            self._fail(error)
        elif self._failing:
            self._failing, self._pause = False, _FIRST_PAUSE
            lost = f", but lacks {plural(self._dropped, 'record')}; {self._kept}" if self._dropped else "; no value was lost"
            print_stderr(f"{self._service.name} works again{lost}")

    def _try(self) -> Exception | None:
        with self._lock:
            batch, self._waiting = self._waiting, deque()
        try:
            if not self._open:
                self._service.open(None if self._was_open else self._start)
                self._open = self._was_open = True
            if batch:
                self._service.add(list(batch))
        except Exception as error:
            with self._lock:
                batch.extend(self._waiting)
                self._waiting = batch
                self._drop_oldest()
            return error
        return None

    def _fail(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            print_stderr(f"{self._service.name} fails: {why(error)}; training continues, its values wait in memory, and a retry follows")
        self._retry_at = self._clock() + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self._abandon()

    def _abandon(self) -> None:
        self._open = False
        with contextlib.suppress(Exception):
            self._service.abandon()

    def finish(self, end: RunEnd | None) -> None:
        """Tries once more to deliver what waits, and closes the service.

        Args:
            end: how the run ended; None: by an error.
        """
        error = self._try() if self._waiting or not self._open else None
        if error is not None:
            self._abandon()
        else:
            try:
                self._service.close(end)
            except Exception as failure:
                error = failure
        if error is not None:
            print_stderr(f"{self._service.name} may lack the last values: {why(error)}; {self._kept}")
