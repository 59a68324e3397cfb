"""The table of Megatron's flags as Markdown, for docs/migrating.md.

In: the tables. Out: `markdown()`.
"""

from __future__ import annotations

from itertools import groupby

from megatron_patch.config.megatron.flags import Kind, MegatronFlag
from megatron_patch.config.megatron.long_tail import LONG_TAIL
from megatron_patch.config.megatron.table import MAIN


def markdown() -> str:
    """Returns a heading and a table for each group of flags; flags with one meaning share a row."""
    text: list[str] = []
    flags = (*MAIN, *LONG_TAIL)
    for group in dict.fromkeys(flag.group for flag in flags):
        text += [f"### {group}", "", "| Megatron | here | meaning |", "| --- | --- | --- |"]
        inside = [flag for flag in flags if flag.group == group]
        for _, same in groupby(inside, key=lambda flag: (flag.kind, flag.text, flag.here, flag.harmless)):
            text.append(_row(list(same)))
        text.append("")
    return "\n".join(text).rstrip("\n")


def _row(flags: list[MegatronFlag]) -> str:
    first = flags[0]
    names = ", ".join(f"`--{flag.name}`" for flag in flags)
    meaning = first.text
    if first.harmless:
        meaning += f"; accepted: {', '.join(f'`{value}`' for value in first.harmless)}"
    if first.kind in (Kind.SAME, Kind.VALUES):
        here = names if first.kind is Kind.SAME else f"{names}, other values"
    elif first.kind in (Kind.RENAMED, Kind.COMPUTED):
        here = f"`{first.here}`" if first.here.startswith("--") else first.here or "depends on other flags"
    elif first.kind is Kind.DETAIL:
        here = f"as `--{first.here}`"
    elif first.kind is Kind.IGNORED:
        here = "no effect"
    else:
        here = "refused" + (f"; write {_code(first.here)}" if first.here else "")
    return f"| {names} | {here} | {meaning} |"


def _code(text: str) -> str:
    return f"`{text}`" if text.startswith("--") and " in " not in text and ", " not in text and " with " not in text else text
