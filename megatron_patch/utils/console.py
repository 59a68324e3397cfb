"""The console: standard output; where that is not a terminal, it is wide enough to keep every line on one line.

A log on a full disk does not end a run: what cannot be written is dropped. Nor does an output in ASCII or Latin-1 (spelling.py).

Names, samples and error messages may come from others, and a terminal obeys control characters in them: it can be made to hide text,
change its title or write to the clipboard. So they are shown as escapes (`\\x1b`), and square brackets are text, not rich's markup. A line
end in a name could begin a line that looks like one of the program's: what is printed as one line stays one.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterable
from typing import IO, Any, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from megatron_patch.utils.spelling import accept_text
from megatron_patch.utils.text import shortened as shortened

# Control characters except tab and newline, other ends of lines, the marks that reverse the direction of text, and halves of surrogate
# pairs, with which Python represents names that are not UTF-8 and which no output accepts.
_HIDDEN = [range(9), range(11, 32), range(127, 160), range(0x2028, 0x202F), range(0x2066, 0x206A), range(0xD800, 0xE000)]
_VISIBLE = {code: ascii(chr(code))[1:-1] for codes in _HIDDEN for code in codes}
_ONE_LINE = _VISIBLE | {ord("\n"): "\\n", ord("\t"): "\\t"}


def visible(text: str) -> str:
    """Returns a text in which control characters, except tabs and newlines, are escapes such as `\\x1b`."""
    return text.translate(_VISIBLE)


def one_line(text: str) -> str:
    """Returns a text in which all control characters are escapes, also tabs and newlines."""
    return text.translate(_ONE_LINE)


def shell_word(text: str) -> str:
    """Returns a text as one word of a shell's command line, to copy from a terminal; bash and zsh read the escapes in `$'…'`."""
    if one_line(text) == text:
        return shlex.quote(text)
    # Above 127, \x would be a byte and no character.
    escapes = {"\\": "\\\\", "'": "\\'"} | {chr(code): f"\\u{code:04x}" for code in _ONE_LINE if code > 127}
    return "$'" + "".join(escapes.get(character) or one_line(character) for character in text) + "'"


def for_terminal(text: str) -> str:
    """Returns the text `visible` if standard output is a terminal; files and pipes get it unchanged."""
    return visible(text) if sys.stdout.isatty() else text


def labeled(label: str, text: str, style: str = "bold") -> Text:
    """Returns a text, on one line, after a label in another style."""
    return Text.assemble((label, style), f" {one_line(text)}")


class _TextConsole(Console):
    """A console for which the content of text is never a command, neither for the terminal nor for rich."""

    def render_str(self, text: str, *args: Any, **options: Any) -> Text:
        """Returns the text that a string stands for, `visible` before its width is measured."""
        return super().render_str(visible(text), *args, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yields the segments of a renderable; those that are text are made `visible`."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


class _TolerantOutput:
    """The current standard output or error, whose errors are ignored.

    Args:
        name: "stdout" or "stderr".
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def write(self, text: str) -> int:
        """Writes the text, or drops what cannot be written, and returns its length."""
        stream = getattr(sys, self._name)
        accept_text(stream)
        with contextlib.suppress(OSError):
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes the stream and ignores errors."""
        with contextlib.suppress(OSError):
            getattr(sys, self._name).flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(sys, self._name), name)


NOTEBOOK_WIDTH = 100
"""Characters of a line of a notebook's output, which wraps longer ones."""


def make_console(width: int = 180, stderr: bool = False) -> Console:
    """Returns a console on which square brackets are text; style is in `Text` objects or in the argument `style`.

    Args:
        width: characters of a table, if the output is not a terminal.
        stderr: whether it prints to standard error instead of standard output.
    """
    file = cast("IO[str]", _TolerantOutput("stderr" if stderr else "stdout"))
    console = _TextConsole(file=file, highlight=False, markup=False, emoji=False)
    if console.is_jupyter:
        # Rich would make an output of HTML of each line; and kernels set FORCE_COLOR, which stands for a terminal.
        width = min(width, NOTEBOOK_WIDTH)
    elif console.is_terminal:
        return console
    # A line of text stays one line of a log, however long it is; the width is that of tables.
    return _TextConsole(
        file=file, highlight=False, markup=False, emoji=False, force_jupyter=False, force_terminal=False, width=width, soft_wrap=True
    )


def in_notebook() -> bool:
    """Returns whether this process is the kernel of a notebook."""
    return Console(markup=False).is_jupyter


def line_width(console: Console, of_log: int) -> int:
    """Returns the number of characters of a line on a terminal or in a notebook, or the given number for all other outputs."""
    return console.width if console.is_terminal or in_notebook() else of_log


def print_line(text: str, *, stderr: bool = False) -> None:
    """Prints one line to standard output or error, with control characters as escapes."""
    print_lines(one_line(text), stderr=stderr)


def print_lines(text: str, *, stderr: bool = False) -> None:
    """Prints lines to standard output or error, with control characters other than line ends and tabs as escapes."""
    stream = sys.stderr if stderr else sys.stdout
    accept_text(stream)
    print(visible(text), file=stream, flush=True)


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
