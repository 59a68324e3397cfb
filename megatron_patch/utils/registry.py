"""Registries: plain dictionaries that map a flag's value to an object.

In: a dictionary and a name. Out: its entry, or an error that lists the names and suggests the nearest one. A user's own script adds an
entry to a registry before it calls the program.
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
        name: the name that the user gave, without the prefix.
        known: the names that exist, without the prefix.
        prefix: text before each suggested name, such as the dashes of a flag.
    """
    known = list(known)
    # Wrong case is the most common mistake, and difflib is case-sensitive.
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
        registry: the registered entries, by name.
        name: the name that the user gave.
        flag: the flag that the user gave it to, such as "--recipe".
        also: other accepted input, such as "numbers with commas between them".
        home: dotted name of the registry, for users who want to add an entry; "": not shown.
        error: the class of the error.

    Raises:
        MegatronPatchError: nothing is registered under this name; an error of class `error`.
    """
    if name in registry:
        return registry[name]
    allowed = ", ".join(registry) + (f", or {also}" if also else "")
    do = "choose one of these names" + (f", or add yours to {home}" if home else "")
    raise error(f"{flag} {name} is not a known name", allowed, suggestion(name, registry) or do)
