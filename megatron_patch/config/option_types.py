"""The types of options: how numbers with units are shown in the help, and what a resumed run may change.

In: nothing. Out: annotated types for the fields in `options`, and the mark of each option (`AtResume`).
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from megatron_patch.utils.units import parse_count, parse_duration

Value = TypeVar("Value")


def _number(parse: Callable[[str], Value], write: Callable[[Value], str], metavar: str) -> PrimitiveConstructorSpec[Value | None]:
    """Returns how a number that is written with units is shown in the help, with its default."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: parse(words[0]),
        is_instance=lambda value: value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)),
        str_from_instance=lambda value: ["None" if value is None else write(value)],
    )


def _write_count(value: int) -> str:
    return f"{value // 10**6}M" if value and value % 10**6 == 0 else str(value)


def _write_duration(value: float) -> str:
    return f"{value / 60:g}min" if value and value % 60 == 0 else f"{value:g}s"


def _hint(default: str) -> str:
    """Returns the note on an option's default. A default of None has no note, because the help text explains it."""
    return "" if default in ("None", "") else f"(default: {default})"


_COUNT = _number(parse_count, _write_count, "COUNT")
_DURATION = _number(parse_duration, _write_duration, "TIME")
OPTIONAL = tyro.conf.arg(help_behavior_hint=_hint)

Count = Annotated[int, _COUNT]
"""A whole number with an optional unit: 4096, 512k, 2M, 270B."""
OptionalCount = Annotated[int | None, _COUNT, OPTIONAL]
"""A count that may be left out."""
Duration = Annotated[float, _DURATION]
"""Seconds, written with units: 45min, 3h30m, 1.5d."""
OptionalDuration = Annotated[float | None, _DURATION, OPTIONAL]
"""A duration that may be left out."""
OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=_hint)]
"""A number that may be left out."""
OptionalId = Annotated[int | None, tyro.conf.arg(metavar="ID", help_behavior_hint=_hint)]
"""A token id that may be left out."""
OptionalSwitch = Annotated[bool | None, OPTIONAL]
"""On, off, or decided by the model family: --name, --no-name, or neither."""
OptionalName = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint=_hint)]
"""A name that may be left out."""
OptionalPath = Annotated[str | None, tyro.conf.arg(metavar="PATH", help_behavior_hint=_hint)]
"""A file or folder that may be left out."""
OptionalList = Annotated[str | None, tyro.conf.arg(metavar="JSON", help_behavior_hint=_hint)]
"""A list as JSON that may be left out."""

OptionalPattern = Annotated[str | None, tyro.conf.arg(metavar="N|LIST", help_behavior_hint=_hint)]
"""Every N-th block, or a list with a number for each block; may be left out."""


def texts(metavar: str) -> Any:
    """Returns the annotation of an option that takes several words, each of them shown as `metavar` in the help."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=_hint)


class AtResume(enum.Enum):
    """What happens if an option has another value when a run is resumed than when the checkpoint was written."""

    FIXED = "the start is refused"
    REPORTED = "the new value is used, and the start prints both"
    FREE = "the new value is used"


Fixed = Annotated[Value, AtResume.FIXED]
"""An option that decides what is learned: the model, the stages, the data and its order."""
Reported = Annotated[Value, AtResume.REPORTED]
"""An option that alters learning or what is measured, and that may be changed on purpose."""
Free = Annotated[Value, AtResume.FREE]
"""An option that changes results at most by rounding: layout, memory, intervals, logging."""


def flag_of(name: str) -> str:
    """Returns the flag of an option: num_layers -> "--num-layers"."""
    return "--" + name.replace("_", "-")


def option_types(options: type) -> dict[str, Any]:
    """Returns the annotated type of each option by its name, over all groups."""
    types: dict[str, Any] = {}
    for group in get_type_hints(options).values():
        hints = get_type_hints(group, include_extras=True)
        types.update({f.name: hints[f.name] for f in fields(group)})
    return types


def split_mark(hint: Any) -> tuple[Any, AtResume | None]:
    """Returns the type of an option without its mark, and the mark."""
    metadata = getattr(hint, "__metadata__", ())
    marks = [item for item in metadata if isinstance(item, AtResume)]
    others = [item for item in metadata if not isinstance(item, AtResume)]
    kind = hint.__origin__ if metadata else hint
    for item in others:
        kind = Annotated[kind, item]
    return kind, marks[0] if marks else None
