"""Frozen dataclasses from JSON that somebody else may have written: every value of its field's kind, or an error; nothing is guessed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")
_LARGEST = 1 << 62


def record_from_json(kind: type[Record], data: Any) -> Record:
    """Makes a record of a JSON object.

    Args:
        kind: a dataclass of whole numbers (below 2^62 in size), finite floats, texts, truth values, literals, tuples, unions of them and
            such dataclasses.
        data: the object.

    Raises:
        ValueError: a field is missing, unknown, or of another kind.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"a {kind.__name__} is a {type(data).__name__}")
    hints = get_type_hints(kind)
    known: tuple[Any, ...] = fields(kind)  # type: ignore[arg-type]
    missing = [f.name for f in known if f.name not in data and f.default is MISSING and f.default_factory is MISSING]
    unknown = [name for name in data if name not in hints]
    if missing or unknown:
        raise ValueError(f"{kind.__name__}: missing {missing}, unknown {unknown}"[:300])
    return kind(**{name: _value(hints[name], value, f"{kind.__name__}.{name}") for name, value in data.items()})


def whole_number(value: Any, least: int) -> int:
    """A whole number from `least` to below 2^62.

    Raises:
        ValueError: it is none.
    """
    if type(value) is not int or not least <= value < _LARGEST:
        raise ValueError(f"{value!r} is no whole number from {least}"[:300])
    return value


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for choice in arguments:
            try:
                return _value(choice, value, where)
            except ValueError:
                continue
    elif origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in arguments):
            return value
    elif origin is tuple and isinstance(value, (list, tuple)):
        kinds = (arguments[0],) * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(value):
            return tuple(_value(item_kind, item, where) for item_kind, item in zip(kinds, value, strict=True))
    elif is_dataclass(hint):
        return record_from_json(hint, value)  # type: ignore[arg-type]
    elif (hint is float and type(value) in (int, float) and abs(value) < _LARGEST) or (type(value) is int and hint is int):
        if abs(value) < _LARGEST and (hint is int or math.isfinite(value)):
            return value
    elif hint in (str, bool, NoneType) and type(value) is hint:
        return value
    raise ValueError(f"{where} is {value!r}"[:300])
