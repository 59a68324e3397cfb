"""Decides the simple conditions of a shell script: comparisons of texts and of whole numbers, and what joins them.

In: the words between `[` and `]`, with values in place of variables. Out: true, false, or None where files or programs decide.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence


def holds(words: list[str]) -> bool | None:
    """Returns whether a condition holds; None if that cannot be known.

    Args:
        words: comparisons, joined by `&&`, `||`, `-a` or `-o`, such as `["a", "=", "b", "-o", "1", "-lt", "2"]`.
    """
    return _any(_split(words, ("||", "-o")))


def _split(words: list[str], at: Sequence[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word in at and len(parts[-1]) > 1:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def _any(alternatives: list[list[str]]) -> bool | None:
    results = [_all(_split(words, ("&&", "-a"))) for words in alternatives]
    return True if True in results else None if None in results else False


def _all(conditions: list[list[str]]) -> bool | None:
    results: list[bool | None] = []
    for words in conditions:
        negated = words[:1] == ["!"]
        value = _compare(words[1:] if negated else words)
        results.append(value if value is None or not negated else not value)
    return False if False in results else None if None in results else True


def _compare(words: list[str]) -> bool | None:
    if len(words) == 2 and words[0] in ("-n", "-z"):
        return (words[1] != "") == (words[0] == "-n")
    if len(words) == 1:
        return None if words[0].startswith("-") else words[0] != ""
    if len(words) != 3:
        return None
    left, how, right = words
    if how in ("=", "=="):
        return left == right
    if how == "!=":
        return left != right
    numbers = {"-eq": operator.eq, "-ne": operator.ne, "-gt": operator.gt, "-ge": operator.ge, "-lt": operator.lt, "-le": operator.le}
    if how in numbers and re.fullmatch(r"-?\d+", left) and re.fullmatch(r"-?\d+", right):
        return bool(numbers[how](int(left), int(right)))
    return None
