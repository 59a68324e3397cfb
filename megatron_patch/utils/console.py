"""The console: standard output; where that is not a terminal, it is wide enough to keep every line on one line.

A log on a full disk does not end a run: what cannot be written is dropped.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import IO, Any, cast

from rich.console import Console


class _TolerantOutput:
    """The current standard output, whose errors are ignored."""

    def write(self, text: str) -> int:
        """Writes the text, or drops what cannot be written, and returns its length."""
        with contextlib.suppress(OSError):
            sys.stdout.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes standard output and ignores errors."""
        with contextlib.suppress(OSError):
            sys.stdout.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)


def make_console() -> Console:
    """Returns a console on standard output."""
    file = cast("IO[str]", _TolerantOutput())
    console = Console(file=file, highlight=False)
    return console if console.is_terminal else Console(file=file, highlight=False, width=180)


def flush_output() -> None:
    """Flushes standard output and error before the process ends, and drops what a full disk refuses.

    Otherwise Python would try to write it again at exit, fail, and change the exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
