"""Checks the arguments of the Python functions. In: a name and a value. Out: the value in its plain type, or a `ConfigError`."""

from __future__ import annotations

import operator
import os
from typing import Any

from megatron_patch.errors import ConfigError


def whole(name: str, value: Any, least: int, most: int = 2**63 - 1) -> int:
    """Returns a whole number, also one of numpy.

    Raises:
        ConfigError: it is no whole number, or out of range.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not least <= number <= most:
        raise ConfigError(f"{name}={value!r}"[:200], f"whole numbers from {least}", f"give another value for {name}")
    return number


def real(name: str, value: Any) -> float:
    """Returns a number as a float.

    Raises:
        ConfigError: it is no number.
    """
    if isinstance(value, (str, bytes, bool)) or not hasattr(value, "__float__"):
        raise ConfigError(f"{name}={value!r}"[:200], "a number", f"give another value for {name}")
    return float(value)


def switch(name: str, value: Any) -> bool:
    """Returns True or False, also one of numpy.

    Raises:
        ConfigError: it is neither, for example the text "no".
    """
    plain = value.item() if type(value).__name__ in ("bool_", "bool") and hasattr(value, "item") else value
    if not isinstance(plain, bool):
        raise ConfigError(f"{name}={value!r}"[:200], "True or False", "write True or False")
    return plain


def path(name: str, value: Any) -> str:
    """Returns a path as a text.

    Raises:
        ConfigError: it is no text and no `Path`.
    """
    found = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(found, str):
        raise ConfigError(f"{name} is given as a value of type {type(value).__name__}", "a text or a Path", f"give a path as {name}")
    return found
