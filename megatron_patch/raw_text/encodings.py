"""Tells from a file's first bytes that it is not UTF-8, and how many of them are a byte-order mark.

In: the first bytes of the text, after decompression. Out: the number of bytes to skip, or an error that names the encoding.
"""

from __future__ import annotations

import codecs
from typing import NamedTuple

from megatron_patch.errors import DataError

BYTE_ORDER_MARK = codecs.BOM_UTF8
HEAD_BYTES = 16
"""First bytes of a text that are looked at."""


class Encoding(NamedTuple):
    """An encoding other than UTF-8.

    Args:
        words: its name in a sentence.
        name: its name for iconv.
    """

    words: str
    name: str


# UTF-32 first: its mark for little endian begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, Encoding("UTF-32 little endian", "UTF-32")),
    (codecs.BOM_UTF32_BE, Encoding("UTF-32 big endian", "UTF-32")),
    (codecs.BOM_UTF16_LE, Encoding("UTF-16 little endian", "UTF-16")),
    (codecs.BOM_UTF16_BE, Encoding("UTF-16 big endian", "UTF-16")),
)
# Without a mark: the bytes of a character that are zero in text of ASCII characters.
_ZEROS = (
    ("x000", Encoding("UTF-32 little endian", "UTF-32LE")),
    ("000x", Encoding("UTF-32 big endian", "UTF-32BE")),
    ("x0x0", Encoding("UTF-16 little endian", "UTF-16LE")),
    ("0x0x", Encoding("UTF-16 big endian", "UTF-16BE")),
)


def byte_order_mark(head: bytes, source: str) -> int:
    """Returns the length of the byte-order mark of UTF-8 that a text begins with: 3, or 0 without one.

    Args:
        head: the first `HEAD_BYTES` bytes of the text, fewer only if it is shorter.
        source: the path of the input, for messages.

    Raises:
        DataError: the text is UTF-16 or UTF-32.
    """
    if (other := other_encoding(head)) is not None:
        raise DataError(
            f"{source} looks like {other.words}",
            "text in UTF-8, with or without a byte-order mark",
            f"convert the decompressed text with iconv -f {other.name} -t UTF-8",
        )
    return len(BYTE_ORDER_MARK) if head.startswith(BYTE_ORDER_MARK) else 0


def other_encoding(head: bytes) -> Encoding | None:
    """Returns the encoding of a text that is UTF-16 or UTF-32; None for all others.

    Args:
        head: the first `HEAD_BYTES` bytes of the text, fewer only if it is shorter.
    """
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    groups = [head[start : start + 4] for start in range(0, min(len(head), HEAD_BYTES) - 3, 4)]
    patterns = {"".join("x" if byte else "0" for byte in group) for group in groups}
    for pattern, encoding in _ZEROS:
        if patterns == {pattern} and len(groups) > 1:  # in a shorter text, zeros may be by chance
            return encoding
    return None
