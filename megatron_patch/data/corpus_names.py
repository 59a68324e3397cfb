"""Short names of corpora, for metrics and charts. In: words of --data-path. Out: one name for each, no two of them the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_patch.utils.console import visible

_MOST_PARTS = 8


def corpus_names(words: Sequence[str]) -> tuple[str, ...]:
    """Returns the last part of each path or address; where several end alike, with as many parts before it as tell them apart.

    Those that eight parts do not tell apart get a number.

    Args:
        words: prefixes, globs or @FILE, as --data-path takes them.
    """
    parts = [[part for part in _path(word).split("/") if part not in ("", ".")] or [word] for word in words]
    taken = [1] * len(parts)

    def names() -> list[str]:
        return ["/".join(path[-count:]) for path, count in zip(parts, taken, strict=True)]

    for _ in range(_MOST_PARTS - 1):
        counts = Counter(names())
        taken = [count + (counts[name] > 1) for count, name in zip(taken, names(), strict=True)]
    used: set[str] = set()
    numbers: Counter[str] = Counter()
    found = []
    for name in map(visible, names()):
        numbers[name] += 1
        while (unique := _numbered(name, numbers[name])) in used:
            numbers[name] += 1
        used.add(unique)
        found.append(unique)
    return tuple(found)


def _path(word: str) -> str:
    """Returns the path of a word, without the sign of a list and without the suffix of a dataset's file."""
    return word.removeprefix("@").removesuffix(".idx").removesuffix(".bin")


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name} ({number})"
