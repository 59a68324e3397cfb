"""Says what is at the place of an input that is no file. In: a word of --input. Out: what is there, and what to give instead."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path

from megatron_patch.utils.registry import suggestion
from megatron_patch.utils.units import plural

_MOST_ENTRIES, _SHOWN = 10_000, 5


def content_of_folder(folder: str, suffix_of: Callable[[str], str | None]) -> tuple[str, str | None]:
    """Returns what a folder contains, and the globs of its inputs for a shell, or None if it has none.

    Args:
        folder: its path.
        suffix_of: returns the suffix of a file that can be an input, such as .jsonl.gz, and None of another file.
    """
    files = list(_files(folder))
    inputs = [name for name in files if suffix_of(name) is not None]
    if not inputs:
        return (f"it has no such files, but {_listing(files)}" if files else "it is empty"), None
    nested = any(os.sep in name for name in inputs)
    suffixes = sorted({str(suffix_of(name)) for name in inputs})
    globs = [os.path.join(folder, "**" if nested else "", f"*{suffix}") for suffix in suffixes]
    return f"it has {_listing(inputs)}", " ".join(f"'{one}'" if "'" not in one else shlex.quote(one) for one in globs)


def near_file(path: str) -> str | None:
    """Returns "did you mean …?" with files of the same folder that are spelled like a path, or None."""
    folder, name = os.path.split(path)
    try:
        with os.scandir(folder or ".") as entries:
            names = [entry.name for entry, _ in zip(entries, range(_MOST_ENTRIES), strict=False)]
    except OSError:
        return None
    return suggestion(name, names, prefix=os.path.join(folder, ""))


def _files(folder: str) -> Iterable[str]:
    """Yields the paths of the files below a folder, relative to it."""
    found = 0
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            yield str((Path(root) / name).relative_to(folder))
            found += 1
            if found == _MOST_ENTRIES:
                return


def _listing(names: list[str]) -> str:
    more = len(names) - _SHOWN
    shown = ", ".join(map(shlex.quote, names[:_SHOWN])) + (f" and {more:,} more" if more > 0 else "")
    return f"{plural(len(names), 'file')}: {shown}"
