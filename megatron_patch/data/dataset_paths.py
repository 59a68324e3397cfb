"""Dataset prefixes as a user writes them: one prefix, a glob over shards, or @FILE, a list.

In: a word of the command line or of a configuration file. Out: prefixes, in order. All shards of a word are one dataset.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence

from megatron_patch.data.addresses import check_address, check_no_credentials
from megatron_patch.data.storage import exists, glob_files, is_address, read_bytes
from megatron_patch.errors import DataError
from megatron_patch.raw_text.encodings import HEAD_BYTES, other_encoding
from megatron_patch.utils.path_patterns import LONGEST_PATH, is_too_long
from megatron_patch.utils.text import shortened

_MOST_LIST_BYTES = 1 << 26
_MOST_LISTS = 50
_WEIGHT = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[-+]?[0-9]+)?(\s|$)", re.I)
_SHARD = re.compile(r"_shard-(\d+)-of-(\d+)(?=_|$)")


def shard_prefix(prefix: str, number: int, count: int) -> str:
    """Returns the output prefix of one shard of a run on many machines. The names sort in the order of the shards."""
    return f"{prefix}_shard-{number:05d}-of-{count:05d}"


def expand_prefixes(word: str) -> tuple[str, ...]:
    """Returns the prefixes that a word stands for.

    Args:
        word: a prefix (a path or an address, with or without .idx or .bin), a glob of prefixes, or @FILE. The file has such a word
            on each line; relative paths start at the folder of the file, and lines that begin with # are skipped. A dataset that exists is
            itself, also if its name is a glob or begins with @.

    Raises:
        DataError: a list cannot be read or is empty, or lists itself; a glob has no match; an address is refused (see `check_address`).
    """
    return _expanded(word, ())


def _expanded(word: str, lists: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the prefixes of a word that was found in `lists`, of which each is in the one before."""
    check_word(word)
    if not is_address(word) and _is_dataset(word):
        return (word,)
    if word.startswith("@"):
        return _listed(word[1:], lists)
    word = bare_prefix(word)
    if not glob.has_magic(word) or _is_dataset(word):
        return (word,)
    matches = [match.removesuffix(".idx") for match in glob_files(f"{word}.idx")]
    if not matches:
        raise DataError(
            f"{shortened(word)} matches no dataset", "a glob of prefixes in quotes: 'shards/*_text_document'", "check the pattern"
        )
    return tuple(matches)


def _is_dataset(prefix: str) -> bool:
    return exists(f"{prefix}.idx") or exists(f"{prefix}.bin")


def check_word(word: str) -> None:
    """Checks a word of --data-path without reading anything.

    Raises:
        DataError: it cannot be a path, or its address is refused, see `check_address`.
    """
    if "\0" in word:
        raise DataError(f"{shortened(word)!r} has a null character", "paths and addresses, which have none", "correct the path")
    if is_too_long(word):
        raise DataError(
            f"{shortened(word)} is too long for a path", f"paths and addresses of up to {LONGEST_PATH:,} bytes", "correct the path"
        )
    if is_address(word):
        check_address(word.removeprefix("@"))


def bare_prefix(word: str) -> str:
    """Returns a prefix without the suffix of one of its files."""
    return word.removesuffix(".idx") if word.endswith(".idx") else word.removesuffix(".bin")


def _listed(path: str, lists: tuple[str, ...]) -> tuple[str, ...]:
    check_word(path)
    here = path if is_address(path) else os.path.realpath(path)
    if here in lists or len(lists) >= _MOST_LISTS:
        raise DataError(
            f"@{path} lists itself" if here in lists else f"@{path} is in more than {_MOST_LISTS} lists, of which each is in another",
            "lists of prefixes, globs and other lists",
            "remove the line with this list",
        )
    try:
        content = read_bytes(path, _MOST_LIST_BYTES)
        other = other_encoding(content[:HEAD_BYTES])
        lines = [] if other is not None else [line.strip() for line in content.decode("utf-8-sig").splitlines()]
    except (DataError, UnicodeDecodeError) as error:
        what = error.what if isinstance(error, DataError) else str(error)
        raise DataError(f"@{path} cannot be read: {what}", "@FILE, a text file with a prefix on each line", "check the path") from error
    if other is not None:
        raise DataError(f"@{path} looks like {other.words}", "a list in UTF-8", f"convert it with iconv -f {other.name} -t UTF-8")
    words = []
    for number, line in enumerate(lines, start=1):
        if line and not line.startswith("#"):
            words.append(_word_of_line(path, line, f"@{path}, line {number}: "))
    if not words:
        raise DataError(f"@{path} lists no dataset", "a prefix on each line", "add the prefixes of the shards to the file")
    return tuple(prefix for word in words for prefix in _expanded(word, (*lists, here)))


def _word_of_line(path: str, line: str, source: str) -> str:
    """Returns the word that a line of a list stands for.

    Raises:
        DataError: it has a weight, a password or a null character, or is too long; the message names the line.
    """
    try:
        check_word(line)
    except DataError as error:
        raise DataError(f"{source}{error.what}", error.allowed, error.do) from error
    check_no_credentials(line, source)
    word = _relative_to(path, line)
    if line.startswith("@") and not is_address(line) and not _is_dataset(word):
        return f"@{_relative_to(path, line[1:])}"
    if _WEIGHT.match(line) and not is_address(line) and not _is_dataset(word) and not glob_files(f"{word}.idx"):
        raise DataError(
            f"{source}{shortened(line)} begins with a weight",
            "a prefix or a glob on each line of a list, without weights: all shards of a list are one dataset",
            "write weights on the command line, before each prefix or list: --data-path 0.7 @web.txt 0.3 @code.txt",
        )
    return word


def _relative_to(path: str, line: str) -> str:
    """Returns the path on a line of a list; a relative one starts at the folder of the list."""
    if is_address(line):
        return line
    return f"{path.rpartition('/')[0]}/{line}" if is_address(path) else os.path.join(os.path.dirname(path), line)


def check_all_shards(prefixes: Sequence[str]) -> None:
    """Checks that all shards of a run are given, once and in order, where their names contain number and count.

    Raises:
        DataError: a shard is missing, repeated or out of order.
    """
    found = [_SHARD.search(prefix) for prefix in prefixes]
    named = [(int(match[1]), int(match[2])) for match in found if match]
    if not named or len(named) < len(prefixes):
        return
    counts = {count for _, count in named}
    numbers = [number for number, _ in named]
    if len(counts) > 1:
        raise DataError(f"shards of several runs, with {_listing(counts)} shards", "the shards of one run", "merge each run by itself")
    missing = sorted(set(range(named[0][1])) - set(numbers))
    if missing:
        raise DataError(
            f"shards {_listing(missing)} of {named[0][1]} are missing",
            f"all {named[0][1]} shards",
            "finish these shards first, or use --allow-missing",
        )
    if numbers != sorted(set(numbers)):
        raise DataError("the shards are not in order, or one is repeated", "each shard once, ordered by number", "sort the prefixes")


def _listing(numbers: Iterable[int]) -> str:
    ordered = sorted(numbers)
    return ", ".join(map(str, ordered[:10])) + (f" and {len(ordered) - 10} more" if len(ordered) > 10 else "")
