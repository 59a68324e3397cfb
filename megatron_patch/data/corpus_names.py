"""Short names of corpora, for metrics and charts. In: words of --data-path. Out: one name for each, no two of them the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_patch.utils.console import visible


def corpus_names(words: Sequence[str]) -> tuple[str, ...]:
    """Returns the last part of each path or address; where several end alike, with as many parts before it as tell them apart.

    Args:
        words: prefixes, globs or @FILE, as --data-path takes them.
    """
    parts = [[part for part in _path(word).split("/") if part not in ("", ".")] or [word] for word in words]
    taken = [1] * len(parts)

    def names() -> list[str]:
        return ["/".join(path[-count:]) for path, count in zip(parts, taken, strict=True)]

    for _ in range(max(map(len, parts), default=0)):
        counts = Counter(names())
        taken = [count + (counts[name] > 1) for count, name in zip(taken, names(), strict=True)]
    found: list[str] = []
    for name in map(visible, names()):
        number = next(number for number in range(1, len(parts) + 1) if _numbered(name, number) not in found)
        found.append(_numbered(name, number))
    return tuple(found)


def _path(word: str) -> str:
    """Returns the path of a word, without the sign of a list and without the suffix of a dataset's file."""
    return word.removeprefix("@").removesuffix(".idx").removesuffix(".bin")


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name} ({number})"
