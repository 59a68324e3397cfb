"""Where the program prints: standard output, and where that is no terminal, wide enough for every line to stay one line."""

from __future__ import annotations

from rich.console import Console


def make_console() -> Console:
    """A console for people."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=180)
