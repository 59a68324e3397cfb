"""From what a user writes to dataset prefixes: one prefix, a glob over shards, or @FILE with a list of them.

In: a word of a command line or a configuration. Out: prefixes in order. The shards of one word are one dataset, laid end to end.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence

from megatron_patch.data.storage import exists, is_address, matching, read_bytes
from megatron_patch.errors import DataError

_SHARD = re.compile(r"_shard-(\d+)-of-(\d+)(?=_|$)")


def shard_prefix(prefix: str, number: int, count: int) -> str:
    """The output prefix of one shard of a run over many machines; the order of the names is that of the shards."""
    return f"{prefix}_shard-{number:05d}-of-{count:05d}"


def expand_prefixes(word: str) -> tuple[str, ...]:
    """The prefixes that a word stands for.

    Args:
        word: a prefix (with or without .idx or .bin; a path or an address), a glob of prefixes, or @FILE: a file with a prefix or glob on
            each line, where relative paths begin at the folder of that file and lines that begin with # are skipped.

    Raises:
        DataError: a list that cannot be read or is empty, a glob without a match.
    """
    if word.startswith("@"):
        return _listed(word[1:])
    word = _bare(word)
    if not glob.has_magic(word) or exists(f"{word}.idx"):
        return (word,)
    matches = [match.removesuffix(".idx") for match in matching(f"{word}.idx")]
    if not matches:
        raise DataError(f"{word} matches no dataset", "a glob of prefixes in quotes: 'shards/*_text_document'", "check the path")
    return tuple(matches)


def _bare(word: str) -> str:
    return word.removesuffix(".idx").removesuffix(".bin")


def _listed(path: str) -> tuple[str, ...]:
    try:
        lines = [line.strip() for line in read_bytes(path).decode("utf-8").splitlines()]
    except (DataError, UnicodeDecodeError) as error:
        what = error.what if isinstance(error, DataError) else str(error)
        raise DataError(f"@{path} cannot be read: {what}", "@FILE, a text file with a prefix on each line", "check the path") from error
    words = [_beside(path, line) for line in lines if line and not line.startswith("#")]
    if not words:
        raise DataError(f"@{path} lists no dataset", "a prefix on each line", "write the shards into it")
    return tuple(prefix for word in words for prefix in expand_prefixes(word))


def _beside(path: str, line: str) -> str:
    """A line of a list, from the folder of the list where it is relative."""
    if is_address(line):
        return line
    return f"{path.rpartition('/')[0]}/{line}" if is_address(path) else os.path.join(os.path.dirname(path), line)


def check_all_shards(prefixes: Sequence[str]) -> None:
    """Where names say which of how many shards each is, all must be there, once and in order.

    Raises:
        DataError: they are not.
    """
    found = [_SHARD.search(prefix) for prefix in prefixes]
    named = [(int(match[1]), int(match[2])) for match in found if match]
    if not named or len(named) < len(prefixes):
        return
    counts = {count for _, count in named}
    numbers = [number for number, _ in named]
    if len(counts) > 1:
        raise DataError(f"shards of runs with {_listing(counts)} shards", "the shards of one run", "merge each run by itself")
    missing = sorted(set(range(named[0][1])) - set(numbers))
    if missing:
        raise DataError(
            f"shards {_listing(missing)} of {named[0][1]} are missing", "all of them", "finish those shards first, or use --allow-missing"
        )
    if numbers != sorted(set(numbers)):
        raise DataError("the shards are not in order, or one comes twice", "each shard once, by number", "order them")


def _listing(numbers: Iterable[int]) -> str:
    ordered = sorted(numbers)
    return ", ".join(map(str, ordered[:10])) + (f" and {len(ordered) - 10} more" if len(ordered) > 10 else "")
