"""Paths as a user writes them: a file that exists is itself, and everything else may be a glob."""

from __future__ import annotations

import glob
import os


def expand_local(pattern: str) -> list[str]:
    """Returns the paths on this machine's file systems that a word stands for.

    Args:
        pattern: a path, or a glob, in which `**` stands for any folders.

    Returns:
        The path itself, if it exists; else the matches of the glob, sorted; none if there are none.
    """
    if os.path.exists(pattern):
        return [pattern]
    return sorted(glob.glob(pattern, recursive=True))
