"""Detokenization of WikiText, whose files are split into words with spaces that plain text does not have.

In: a document in WikiText's format. Out: plain text, by the rules that Megatron-LM and lm-evaluation-harness use.
"""

from __future__ import annotations

import re

_PAIRS = ((r"\(", r"\)"), (r"\[", r"\]"), ("{", "}"), ('"', '"'), ("'", "'"))
_ENCLOSED = tuple(re.compile(rf"{begin}\s*([^{end}]*?)\s*{end}") for begin, end in _PAIRS)
_AFTER = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenize(text: str) -> str:
    """Returns the text without WikiText's extra spaces in numbers, punctuation, brackets, quotation marks and headings."""
    text = text.replace("s '", "s'")
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    for pattern in _ENCLOSED:
        text = pattern.sub(lambda match: match[0][0] + match[1] + match[0][-1], text)
    for old, new in _AFTER:
        text = text.replace(old, new)
    return text
