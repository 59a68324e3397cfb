"""Finds datasets that are named twice, whatever the spelling. In: words or prefixes. Out: real paths, and what two corpora share."""

from __future__ import annotations

import os
from collections.abc import Sequence

from megatron_patch.data.dataset_paths import bare_prefix
from megatron_patch.data.storage import is_address

_LOCAL = "file://"


def real_path(word: str) -> str:
    """Returns the path of a dataset, list or glob without symbolic links, "..", and the suffix of a file; an address stays as it is.

    Args:
        word: a prefix, a glob or @FILE, as --data-path takes them. The files need not exist.
    """
    mark = "@" if word.startswith("@") else ""
    path = word.removeprefix("@").removeprefix(_LOCAL)
    if is_address(path):
        return mark + (path if mark else bare_prefix(path))
    try:
        # A symbolic link may be a file of the dataset, or a folder above it.
        return mark + (os.path.realpath(path) if mark else bare_prefix(os.path.realpath(f"{bare_prefix(path)}.bin")))
    except ValueError:  # a null character, or text that no path can contain
        return word


def named_twice(words: Sequence[str]) -> tuple[str, str] | None:
    """Returns the first two words that name the same dataset, or None."""
    found: dict[str, str] = {}
    for word in words:
        path = real_path(word)
        if path in found:
            return found[path], word
        found[path] = word
    return None


def shared_datasets(corpora: Sequence[tuple[str, Sequence[str]]]) -> list[tuple[str, str, str]]:
    """Returns (word, other word, prefix) for each two corpora that share a dataset: the first that they share, as the later one names it.

    Args:
        corpora: word and prefixes of each corpus.
    """
    found: dict[tuple[str, str], str] = {}
    first: dict[str, str] = {}
    for word, prefixes in corpora:
        for prefix in prefixes:
            other = first.setdefault(real_path(prefix), word)
            if other != word:
                found.setdefault((other, word), prefix)
    return [(*words, prefix) for words, prefix in found.items()]
