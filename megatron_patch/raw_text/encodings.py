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
_UTF_16_LE = Encoding("UTF-16 little endian", "UTF-16LE")
# Without a mark: which bytes of a character are zero in text of ASCII characters.
_ZEROS = (
    ("x000", Encoding("UTF-32 little endian", "UTF-32LE")),
    ("000x", Encoding("UTF-32 big endian", "UTF-32BE")),
    ("x0", _UTF_16_LE),
    ("0x", Encoding("UTF-16 big endian", "UTF-16BE")),
)
_LEAST_BYTES = 4  # in a shorter text, zeros may be by chance
_CHINESE = ((0x3000, 0x3100), (0x4E00, 0xA000), (0xFF00, 0xFFF0))  # with the punctuation that Japanese shares, and kana


def byte_order_mark(head: bytes, source: str) -> int:
    """Returns the length of the byte-order mark of UTF-8 that a text begins with: 3, or 0 without one.

    Args:
        head: the first bytes of the text, of which `HEAD_BYTES` are looked at; fewer only if it is shorter.
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
    head = head[:HEAD_BYTES]
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    shown = "".join("x" if byte else "0" for byte in head)
    for pattern, encoding in _ZEROS:
        if len(head) >= _LEAST_BYTES and shown == pattern * (len(head) // len(pattern)):
            return encoding
    return _UTF_16_LE if _is_chinese(head) else None


def _is_chinese(head: bytes) -> bool:
    """Returns whether a text begins with Chinese in UTF-16, little endian, also with ASCII between it.

    False is also returned where the bytes may be UTF-8 or Shift JIS. Big endian, which looks like Shift JIS more often, is not looked for.
    """
    if _is_valid(head, "utf-8") or (0 not in head and _is_valid(head, "shift_jis")):
        return False
    units = [head[start] | head[start + 1] << 8 for start in range(0, len(head) - 1, 2)]
    chinese = sum(any(first <= unit < end for first, end in _CHINESE) for unit in units)
    ascii_units = sum(unit in (9, 10, 13) or 32 <= unit < 127 for unit in units)
    return len(head) >= 2 * _LEAST_BYTES and chinese > 0 and chinese + ascii_units == len(units)


def _is_valid(head: bytes, encoding: str) -> bool:
    try:
        codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    return True
