"""Tells from a file's first lines that it is not JSON lines but one JSON document: an array, or an object over many lines.

In: the first lines of a file. Out: an error that says how to convert it. Read line by line, such a file would lose most of its objects, or
all, as bad lines. A line of this kind further on is one bad line.
"""

from __future__ import annotations

import re
import shlex
from typing import BinaryIO

from megatron_patch.errors import DataError
from megatron_patch.raw_text.encodings import BYTE_ORDER_MARK
from megatron_patch.raw_text.inputs import LINE_SUFFIXES, inner_suffix, is_compressed
from megatron_patch.raw_text.json_lines import texts_of_line
from megatron_patch.raw_text.large_documents import MOST_DOCUMENT_BYTES

JUDGED_LINES = 2
"""Lines that are looked at: an object, and the next one, which may follow a comma. Blank lines do not count."""
_BEGINNING = 1 << 12  # bytes of a line that show what it is, unless it is an object
_LEADING_COMMA = re.compile(rb",\s*\{")


def judge_first_lines(file: BinaryIO, source: str, judged: int = 0) -> int:
    """Looks at the next lines of a file, which hold its first ones or follow those that were judged before.

    Args:
        file: is read from its position.
        source: the path of the input, for messages.
        judged: lines that were judged before.

    Returns:
        How many lines were judged in all: `JUDGED_LINES`, or fewer if the file has no more.

    Raises:
        DataError: the file is not JSON lines.
    """
    while judged < JUDGED_LINES and (line := file.readline(_BEGINNING)):
        text = line.removeprefix(BYTE_ORDER_MARK).strip()
        if not text:
            continue
        if len(line) == _BEGINNING and not line.endswith(b"\n"):
            if judged or not text.startswith(b"{"):
                _judge(text, source, judged)
                return JUDGED_LINES  # the rest of a line of any length is not read
            line += file.readline(MOST_DOCUMENT_BYTES)
            text = line.removeprefix(BYTE_ORDER_MARK).strip()
        _judge(text, source, judged)
        judged += 1
    return judged


def _judge(line: bytes, source: str, judged: int) -> None:
    if line.startswith(b"[") and not judged:
        raise _not_lines(source, "begins with [, as a JSON array does", "jq -c '.[]'")
    if _LEADING_COMMA.match(line):
        raise _not_lines(source, "has commas between its objects, as a JSON array does", "sed 's/^[[:space:]]*,//'")
    if line == b"{" and not judged:
        raise _not_lines(source, "has an object over several lines", "jq -c .")
    if line.startswith(b"{") and line.endswith(b",") and not judged and texts_of_line(line[:-1], ()) == ():
        raise _not_lines(source, "has commas between its objects, as a JSON array does", "sed 's/,[[:space:]]*$//'")


def _not_lines(source: str, what: str, command: str) -> DataError:
    name = shlex.quote(source) if inner_suffix(source) in LINE_SUFFIXES and not is_compressed(source) else "FILE"
    return DataError(
        f"{source} is not JSON lines: it {what}",
        "a file with one object per line, without brackets or commas around the objects",
        f"convert {'the decompressed text' if is_compressed(source) else 'it'} with {command} {name} > NEW.jsonl",
    )
