"""Frozen dataclasses from JSON that is not trusted. In: a JSON object. Out: a record whose values all have the types of their fields."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")
_LARGEST = 1 << 62


def record_from_json(kind: type[Record], data: Any) -> Record:
    """Returns the record of a JSON object.

    Args:
        kind: a dataclass whose fields are whole numbers (below 2^62 in size), finite floats, strings, booleans, literals, tuples, unions
            of these, such dataclasses, or mappings, which are JSON objects whose values are not checked.
        data: the object.

    Raises:
        ValueError: a field is missing or unknown, or a value does not have the type of its field.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{kind.__name__}: expected a JSON object, found {type(data).__name__}")
    hints = get_type_hints(kind)
    known: tuple[Any, ...] = fields(kind)  # type: ignore[arg-type]
    missing = [f.name for f in known if f.name not in data and f.default is MISSING and f.default_factory is MISSING]
    unknown = [name for name in data if name not in hints]
    if missing or unknown:
        raise ValueError(f"{kind.__name__}: missing fields {missing}, unknown fields {unknown}"[:300])
    return kind(**{name: _value(hints[name], value, f"{kind.__name__}.{name}") for name, value in data.items()})


def whole_number(value: Any, least: int) -> int:
    """Returns the value if it is a whole number from `least` to below 2^62.

    Raises:
        ValueError: it is not.
    """
    if type(value) is not int or not least <= value < _LARGEST:
        raise ValueError(f"{value!r} is not a whole number from {least}"[:300])
    return value


def _value(hint: Any, value: Any, where: str) -> Any:
    """Returns a value as the type `hint` says, or raises a ValueError that names the field `where`."""
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
    elif (hint in (str, bool, NoneType) and type(value) is hint) or (origin is Mapping and isinstance(value, dict)):
        return value
    raise ValueError(f"{where} is {value!r}, which has the wrong type"[:300])
