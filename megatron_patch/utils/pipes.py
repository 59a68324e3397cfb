"""What happens when the reader of standard output leaves, as in `… --help | head`: the program ends without a message."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

CODE = 128 + signal.SIGPIPE
"""The exit code of a program whose reader has left, as of any other program in a shell."""


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """Ends the process with `CODE` if standard output can no longer be written inside of the `with` block, or at its end.

    Raises:
        SystemExit: the reader has left.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Otherwise Python writes the rest once more at exit, and prints a message.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(CODE) from None
