"""A flag of Megatron-LM or Megatron-DeepSpeed, as a record, and the helpers with which the tables are written.

In: nothing. Out: `MegatronFlag`, and `rows()`, which makes many records from one line of names.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Kind(enum.Enum):
    """What happens with a flag of Megatron here."""

    SAME = "the same"
    """A flag of this program with the same name and meaning."""
    VALUES = "other values"
    """A flag of this program with the same name, some of whose values are written differently."""
    RENAMED = "renamed"
    """A flag of this program has the same meaning and another name, or a fixed value stands for a switch."""
    COMPUTED = "computed"
    """The value of a flag of this program is computed from this value and others."""
    IGNORED = "no effect"
    """It is accepted, because it changes nothing here."""
    DETAIL = "detail"
    """It is accepted, because it belongs to another flag, without which it means nothing."""
    REFUSED = "refused"
    """This program does not have it; a run without it is possible, but another one."""
    OTHER_MODEL = "another model"
    """This program does not have the model or the program that it belongs to."""


LM = "Megatron-LM"
DS = "Megatron-DeepSpeed"
BOTH = "both"
BIGSCIENCE = "BigScience's Megatron-DeepSpeed"


@dataclass(frozen=True)
class MegatronFlag:
    """One flag of Megatron.

    Args:
        name: as Megatron spells it, without the leading dashes.
        source: which program has it.
        values: number of values, 0 for a switch; None for any number.
        kind: what happens with it here.
        text: what it means here, or why it is refused, in a few words without a full stop.
        here: RENAMED and COMPUTED: the flags that stand for it; DETAIL: the flag that it belongs to; refused flags: what to write instead.
        harmless: refused flags: the values that change nothing, in lower case.
        group: heading of the documentation's table.
    """

    name: str
    source: str
    values: int | None
    kind: Kind
    text: str
    here: str = ""
    harmless: tuple[str, ...] = ()
    group: str = ""

    @property
    def key(self) -> str:
        """The name by which it is found: with dashes."""
        return key_of(self.name)

    def is_harmless(self, words: list[str]) -> bool:
        """Returns whether values change nothing; numbers are compared as numbers."""
        return bool(words) and bool(self.harmless) and all(_normal(word) in {_normal(value) for value in self.harmless} for word in words)


def key_of(name: str) -> str:
    """Returns the name by which a flag is found: without leading dashes, with dashes inside."""
    return name.lstrip("-").replace("_", "-")


def _normal(value: str) -> str | float:
    try:
        return float(value)
    except ValueError:
        return value.strip("'\"").lower()


def rows(
    group: str, names: str, source: str, kind: Kind, text: str, here: str = "", harmless: str | tuple[str, ...] = ()
) -> tuple[MegatronFlag, ...]:
    """Returns a record for each name of a line.

    Args:
        group: heading of the documentation's table.
        names: names with spaces between them; a suffix gives the number of values: `/0` a switch, `/1` one value (the default), `/n` any.
        source: as in `MegatronFlag`, like all that follow.
        kind: what happens with them here.
        text: what they mean here.
        here: which flags stand for them.
        harmless: values that change nothing; a text is one value.
    """
    result = []
    for word in names.split():
        name, _, count = word.partition("/")
        values = None if count == "n" else int(count or 1)
        allowed = (harmless,) if isinstance(harmless, str) else harmless
        result.append(MegatronFlag(name, source, values, kind, text, here, allowed, group))
    return tuple(result)
