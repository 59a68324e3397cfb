"""Output in ASCII, Latin-1 or another encoding that lacks characters: they are spelled (`lambda`) or shown as escapes, and no program ends.

In: standard output and error. Out: the same streams, which accept any text. Only the standard library is imported here.
"""

from __future__ import annotations

import codecs
import contextlib
import sys
from typing import Any

_SPELLED = {"λ": "lambda", "×": "x", "…": "...", "·": "-", "→": "->", "━": "=", "─": "-", "┿": "+", "↘": "\\", "↗": "/"}
_SPELLED |= dict(zip("▁▂▃▄▅▆▇█", "_.,-=+*#", strict=True))
_HANDLER = "megatron_patch.spelled"
"""Name of the error handler of an output that has no code for a character."""


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    """Returns ASCII in place of characters without a code, and where to continue; see `codecs.register_error`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    chars = error.object[error.start : error.end]
    return "".join(_SPELLED.get(char) or ascii(char)[1:-1] for char in chars), error.end


codecs.register_error(_HANDLER, _spell)


def accept_all_text() -> None:
    """Lets standard output and error take any text, whatever their encoding; programs call it first."""
    for stream in (sys.stdout, sys.stderr):
        accept_text(stream)


def accept_text(stream: Any) -> None:
    """Lets a stream take any text, if it has an encoding that can be configured."""
    if getattr(stream, "errors", None) not in (None, _HANDLER) and hasattr(stream, "reconfigure"):
        with contextlib.suppress(OSError, ValueError):
            stream.reconfigure(errors=_HANDLER)
