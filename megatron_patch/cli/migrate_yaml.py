"""Writes translated flags as a YAML file, in the order of the program's options, with comments.

In: a translation. Out: `Line` records, and the text of the file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

import yaml

from megatron_patch.cli.migrate_deepspeed import DEEPSPEEDS_JSON, DeepSpeedParts
from megatron_patch.cli.migrate_defaults import MEGATRONS_DEFAULT
from megatron_patch.config.megatron.flags import key_of
from megatron_patch.config.megatron.translator import MEGATRON_FLAGS, Translation
from megatron_patch.config.options import Options
from megatron_patch.config.values import KINDS, SEVERAL, SWITCHES
from megatron_patch.utils.console import visible

_NUMBER = re.compile(r"[-+]?(?:\d[\d_]*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")
_LISTS = {key_of(name) for name, kind in KINDS.items() if kind.form in SEVERAL}


@dataclass(frozen=True)
class Line:
    """A line of the file.

    Args:
        key: name of the option, with dashes.
        value: its value: text, a list of texts, or True or False.
        comment: where it is from, or what it means.
    """

    key: str
    value: str | list[str] | bool
    comment: str


def lines_of(translation: Translation, parts: DeepSpeedParts) -> list[Line]:
    """Returns the lines for a translation, in the order of the options.

    Args:
        translation: the flags of this program, and how they came about.
        parts: the values that are from DeepSpeed's JSON.
    """
    comments: dict[str, str] = {}
    for row in translation.rows:
        text = f"from {row.given.text}"
        if row.given.source == MEGATRONS_DEFAULT:
            text = f"{MEGATRONS_DEFAULT}, --{MEGATRON_FLAGS[row.given.key].name} {' '.join(row.given.words)}"
        for word in row.becomes.split():
            if word.startswith("--"):
                comments[key_of(word).removeprefix("no-")] = f"{text}: {row.meaning}"
    lines: dict[str, Line] = {}
    switches = {key_of(name) for name in SWITCHES}
    for flag in translation.flags:
        negated = flag.key.startswith("no-") and flag.key[3:] in switches
        key = flag.key[3:] if negated else flag.key
        value: str | list[str] | bool = not negated if key in switches else list(flag.words) if key in _LISTS else " ".join(flag.words)
        if key == "model-family" and flag.source == MEGATRONS_DEFAULT:
            comments[key] = "the family nearest to what the flags mean; the lines below say what it is in full"
        comment = comments.get(key, MEGATRONS_DEFAULT if flag.source == MEGATRONS_DEFAULT else "")
        if key in parts.flags and flag.source == DEEPSPEEDS_JSON:
            comment = f"from DeepSpeed's JSON, {parts.flags[key][1]}"
        lines[key] = Line(key, value, comment)
    for known in ("world-size", "dry-run", "local-rank"):
        lines.pop(known, None)
    order = {key_of(name): number for number, name in enumerate(KINDS)}
    return sorted(lines.values(), key=lambda line: order[line.key])


def render(
    lines: Sequence[Line],
    filled_in: Sequence[Line] = (),
    left_out: Sequence[tuple[str, str]] = (),
    ignored: Sequence[tuple[str, str]] = (),
    name: str = "",
    ranks: int | None = None,
) -> str:
    """Returns the text of the file.

    Args:
        lines: the values.
        filled_in: values that are not known; they become comments.
        left_out: (what, why) of what this program does not have.
        ignored: (what, why) of what changes nothing.
        name: from what the file is made; "": without the comments at its beginning.
        ranks: number of ranks, if known.
    """
    text: list[str] = []
    if name:
        text += [
            f"# Made by megatron-patch migrate from {visible(name)}.",
            f"# Check it: megatron-patch pretrain --config FILE.yaml --dry-run --world-size {ranks or 8}",
        ]
    groups = _groups()
    named = set().union(*groups.values())
    groups["keys of Megatron, which this program translates"] = {line.key for line in filled_in} - named
    for heading, keys in groups.items():
        inside = [line for line in lines if line.key in keys]
        missing = [line for line in filled_in if line.key in keys]
        if inside or missing:
            text += ["", f"# {heading}"] if name else []
        text += [_text(line) for line in inside]
        text += [f"# {line.key}: {visible(str(line.value))}  # fill in: {line.comment}" for line in missing]
    if left_out:
        text += ["", "# Left out, because this program does not have it"]
        text += [f"#   {visible(what)}: {why}" for what, why in left_out]
    if ignored:
        text += ["", "# Without an effect here", *(f"#   {visible(what)}: {why}" for what, why in ignored)]
    return "\n".join(text) + "\n"


def _groups() -> dict[str, set[str]]:
    """Returns the headings of the program's help, and the options under each."""
    groups: dict[str, set[str]] = {}
    for name, group in get_type_hints(Options).items():
        heading = {"engine": "precision, parallelism and memory", "schedule": "learning rate and optimizer", "stages": "stages"}.get(
            name, name
        )
        groups[heading] = {key_of(option.name) for option in dataclasses.fields(group)}
    return groups


def _text(line: Line) -> str:
    comment = f"  # {visible(line.comment)}" if line.comment else ""
    return f"{line.key}: {_scalar(line.value)}{comment}"


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(_scalar(item) for item in value)}]"
    if _NUMBER.fullmatch(value):
        return str(value)
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("\n").removesuffix("\n...")
