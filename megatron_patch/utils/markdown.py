"""Generated text inside hand-written documents. In: a Markdown file with a pair of marker lines. Out: its new text."""

from __future__ import annotations

import textwrap
from pathlib import Path

from megatron_patch.errors import ConfigError


def replace_between(document: Path, begin: str, end: str, text: str) -> str:
    """Returns the document's text with everything between two markers replaced. The file is not changed.

    Args:
        document: a Markdown file.
        begin: the marker above the generated text.
        end: the marker below it.
        text: the new text between them.

    Raises:
        ConfigError: the document cannot be read, or does not contain each marker once and in this order.
    """
    try:
        before = document.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {document}: {error.strerror}", "a Markdown file", "check the path") from None
    if before.count(begin) != 1 or before.count(end) != 1 or before.index(begin) > before.index(end):
        raise ConfigError(
            f"{document} needs the lines {begin} and {end}", "each line once, in this order", "add them where the generated text belongs"
        )
    return before[: before.index(begin)] + f"{begin}\n\n{text}\n{end}" + before[before.index(end) + len(end) :]


def wrap_prose(text: str, width: int = 100) -> str:
    """Returns Markdown text whose lines of prose are at most `width` characters long.

    Tables, headings, images, comments, code blocks and indented lines stay as they are; an item of a list is continued with an indent.
    """
    lines: list[str] = []
    in_code = False
    for line in text.split("\n"):
        in_code ^= line.startswith("```")
        if in_code or len(line) <= width or line.startswith(("|", "#", "!", "<", "`", " ")):
            lines.append(line)
        else:
            indent = "  " if line.startswith("- ") else ""
            lines += textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)
