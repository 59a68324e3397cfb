"""Registries: plain dictionaries from a name, as a flag gives it, to what the name stands for.

In: a dictionary and a name. Out: its entry, or an error that lists the names and suggests the nearest one. A launcher script adds
an entry to a registry before it calls the program.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from megatron_patch.errors import ConfigError, MegatronPatchError

Entry = TypeVar("Entry")


def suggestion(name: str, known: Iterable[str], prefix: str = "") -> str | None:
    """Returns "did you mean NAME?" with the known names (at most three) that are spelled like `name`, or None if there are none.

    Args:
        name: as the user gave it, without the prefix.
        known: the names that exist, without the prefix.
        prefix: printed before each suggested name, as the dashes of a flag.
    """
    known = list(known)
    # Case is the most frequent slip, and difflib counts each letter of it as an error.
    lower = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6) or difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return f"did you mean {' or '.join(prefix + lower.get(match, match) for match in close)}?" if close else None


def lookup(
    registry: Mapping[str, Entry],
    name: str,
    flag: str,
    *,
    also: str = "",
    home: str = "",
    error: type[MegatronPatchError] = ConfigError,
) -> Entry:
    """Returns the registered entry of a name.

    Args:
        registry: what is registered, by name.
        name: as the user gave it.
        flag: where the user gave it, as "--recipe".
        also: what the flag takes in addition to the names, as "numbers with commas between them".
        home: the dotted name of the registry, for users who want to add an entry; "": not shown.
        error: the class of the error.

    Raises:
        MegatronPatchError: nothing is registered under this name; an error of class `error`.
    """
    if name in registry:
        return registry[name]
    allowed = ", ".join(registry) + (f", or {also}" if also else "")
    do = "choose one of these names" + (f", or add yours to {home}" if home else "")
    raise error(f"{flag} {name} is not a known name", allowed, suggestion(name, registry) or do)
