"""Paths and globs of this machine's files.

In: what a user typed. Out: the existing paths that it names. What exists is named by its own path first: brackets, stars and question marks
are common in the names of files, so text is a glob only where nothing has that name.
"""

from __future__ import annotations

import glob
import os
import re

LONGEST_PATH = 4096
"""The most bytes of a path on Linux. Python's glob takes quadratic time in the length of a pattern."""


def is_too_long(path: str) -> bool:
    """Returns whether a text is longer than any path, or any pattern of paths, may be."""
    return len(path.encode("utf-8", "surrogatepass")) > LONGEST_PATH


def expand_local(pattern: str) -> list[str]:
    """Returns the existing paths that a path or a glob names, sorted; none if it names none.

    A path that exists is taken as it is. Otherwise the part of a glob that names an existing folder is taken as it is, so that
    `a[1]/*.jsonl` names the files of the folder `a[1]`; without a match there, all of it is a glob.

    Args:
        pattern: a path, or a glob, in which `**` means any number of folders.
    """
    if is_too_long(pattern):
        return []
    if os.path.lexists(pattern):
        return [pattern]
    if not glob.has_magic(pattern):
        return []
    folder = _existing_folder(pattern)
    rest = pattern[len(folder) :]
    return _glob(glob.escape(folder) + rest) or (_glob(pattern) if glob.has_magic(folder) else [])


def _existing_folder(pattern: str) -> str:
    """Returns the longest beginning of a path that names an existing folder, with the slash after it; "" without one."""
    end = len(pattern)
    while (end := pattern.rfind("/", 0, end)) >= 0:
        if os.path.isdir(pattern[: end + 1]):
            return pattern[: end + 1]
    return ""


def _glob(pattern: str) -> list[str]:
    # `**/**/` names what `**/` names, but glob visits every folder once for each way to divide a path among them.
    pattern = re.sub(r"(?<![^/])(?:\*\*/+)+(?=\*\*(?:/|$))", "", pattern)
    try:
        return sorted(glob.glob(pattern, recursive=True))
    except (ValueError, RecursionError):  # a null character, which no path has; more folders than any path has
        return []
