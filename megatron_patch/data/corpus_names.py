"""Short names of corpora, for metrics and charts. In: words of --data-path. Out: one name for each, no two of them the same.

A name depends on the other corpora. So a run records its names, and a corpus keeps its own when the run resumes with other corpora.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from megatron_patch.checkpoint.trainer_state import HeldOutName
from megatron_patch.data.dataset_paths import bare_prefix
from megatron_patch.data.same_dataset import real_path
from megatron_patch.utils.console import one_line

_MOST_PARTS = 8


def corpus_names(words: Sequence[str], taken: Iterable[str] = ()) -> tuple[str, ...]:
    """Returns the last part of each path or address; where several end alike, with as many parts before it as tell them apart.

    Those that eight parts do not tell apart get a number.

    Args:
        words: prefixes, globs or @FILE, as --data-path takes them.
        taken: names that none of them gets.
    """
    parts = list(map(_parts, words))
    counted = [1] * len(parts)

    def names() -> list[str]:
        return ["/".join(path[-count:]) for path, count in zip(parts, counted, strict=True)]

    for _ in range(_MOST_PARTS - 1):
        counts = Counter(names())
        counted = [count + (counts[name] > 1) for count, name in zip(counted, names(), strict=True)]
    used = set(taken)
    numbers: Counter[str] = Counter()
    found = []
    for name in map(one_line, names()):
        numbers[name] += 1
        while (unique := _numbered(name, numbers[name])) in used:
            numbers[name] += 1
        used.add(unique)
        found.append(unique)
    return tuple(found)


def names_in_run(words: Sequence[str], tokens: Sequence[int], used: Sequence[HeldOutName]) -> tuple[HeldOutName, ...]:
    """Returns the names of a run's corpora, and after them those of earlier corpora that it no longer evaluates.

    A corpus keeps its name, by its path. One with another path keeps it if its path ends in the name, it has as many tokens as before, and
    the old path is no longer given: then the files have moved.

    Args:
        words: prefixes, globs or @FILE, as --data-path takes them.
        tokens: number of tokens of each of these corpora.
        used: the names that the run has used so far.
    """
    paths = list(map(real_path, words))
    names = {one.path: one.name for one in used if one.path in paths}
    for word, path, count in zip(words, paths, tokens, strict=True):
        moved = [
            one.name
            for one in used
            if one.path not in paths and one.name not in names.values() and one.tokens in (None, count) and _ends_in(word, one.name)
        ]
        if path not in names and moved:
            names[path] = max(moved, key=len)
    others = [one for one in used if one.name not in names.values()]
    # Also told apart from the corpora that are gone.
    fresh = corpus_names([*words, *(one.path for one in others)], [one.name for one in used])
    found = [HeldOutName(names.get(path, name), path, count) for name, path, count in zip(fresh[: len(words)], paths, tokens, strict=True)]
    return (*found, *others)


def _ends_in(word: str, name: str) -> bool:
    parts = name.split("/")
    return [one_line(part) for part in _parts(word)[-len(parts) :]] == parts


def _parts(word: str) -> list[str]:
    """Returns the parts of a word's path, without the sign of a list and without the suffix of a dataset's file."""
    return [part for part in bare_prefix(word.removeprefix("@")).split("/") if part not in ("", ".")] or [word]


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name} ({number})"
