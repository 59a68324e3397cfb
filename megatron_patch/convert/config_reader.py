"""Reads the values of a Hugging Face config.json, or of another program's arguments, with checks.

In: a configuration as a dict. Out: values of the asked kind; an error names the file, the key, the value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_patch.errors import CheckpointError

_LARGEST_COUNT = 1_000_000_000
_LARGEST_REAL = 1e30


def shown_value(value: Any) -> str:
    """Returns a value as text for a message, without the end of a long one."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


class ConfigReader:
    """Reads a configuration's keys and reports missing and unsupported ones by name.

    Args:
        values: the configuration.
        where: the file, for messages.
        do: what to do about a value that cannot be used.
        found: collects the errors of all keys, so that they are reported together; a key with an error then gives a value with which the
            others can still be read. None: the first error is raised.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str,
        do: str = "use the model's original config.json",
        found: list[CheckpointError] | None = None,
    ) -> None:
        self._values, self.where, self._do, self._found = values, where, do, found
        self._refused: set[str] = set()

    def number(self, key: str, default: int | None = None, least: int = 1) -> int:
        """Returns a whole number from `least` to a billion; a missing or null key gives the default.

        Raises:
            CheckpointError: the value is something else, or the key is missing and has no default.
        """
        value = self._values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _LARGEST_COUNT:
            self._refuse(key, value, f"a whole number from {least} to {_LARGEST_COUNT:,}")
            return max(least, 1) if default is None else default
        return value

    def real(self, key: str, default: float, above_zero: bool = False) -> float:
        """Returns a number as a float; a missing key gives the default.

        Raises:
            CheckpointError: the value is not a finite number, or not above zero where it must be.
        """
        value = self._values.get(key, default)
        # Compared, not converted: an integer may be too large for a float.
        if not isinstance(value, int | float) or isinstance(value, bool) or not -_LARGEST_REAL <= value <= _LARGEST_REAL:
            self._refuse(key, value, f"a number of at most {_LARGEST_REAL:g} in size")
            return default
        if above_zero and value <= 0:
            self._refuse(key, value, "a number above 0")
            return default
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Returns true or false; a missing or null key gives the default.

        Raises:
            CheckpointError: the value is something else.
        """
        value = self._values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            self._refuse(key, value, "true or false")
            return default
        return value

    def per_layer(self, key: str, layers: int, allowed: tuple[Any, ...], longer: bool = False) -> list[Any] | None:
        """Returns a list with a value for each layer, or None where the key is missing or null.

        Args:
            key: the key.
            layers: number of layers.
            allowed: the supported values.
            longer: whether the list may be longer; what is too much is left out.

        Raises:
            CheckpointError: the value is no list of this length, or has other values.
        """
        value = self._values.get(key)
        if value is None or "num_hidden_layers" in self._refused:
            return None
        fits = isinstance(value, list) and (len(value) == layers or (longer and len(value) > layers))
        if not fits or not all(type(item) is type(allowed[0]) and item in allowed for item in value[:layers]):
            self._refuse(key, value, f"a list with {' or '.join(map(repr, allowed))} for each of {layers} layers")
            return None
        found: list[Any] = value[:layers]
        return found

    def numbers(self, key: str) -> set[int]:
        """Returns a list of whole numbers from 0 as a set; a missing or null key gives none.

        Raises:
            CheckpointError: the value is something else.
        """
        value = self._values.get(key)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
            self._refuse(key, value, "a list of whole numbers from 0")
            return set()
        return set(value)

    def without(self, *keys: str) -> ConfigReader:
        """Returns a reader of the same configuration in which these keys are missing."""
        return ConfigReader({key: value for key, value in self._values.items() if key not in keys}, self.where, self._do, self._found)

    def part(self, key: str, values: Mapping[str, Any]) -> ConfigReader:
        """Returns a reader of the values under a key."""
        return ConfigReader(values, f"{self.where}: {key}", self._do, self._found)

    def _refuse(self, key: str, value: Any, allowed: str) -> None:
        self._report(CheckpointError(f"{self.where}: {key} is {shown_value(value)}", allowed, self._do), key)

    def _report(self, error: CheckpointError, key: str) -> None:
        self._refused.add(key)
        if self._found is None:
            raise error
        self._found.append(error)

    def get(self, key: str, default: Any = None) -> Any:
        """Returns a value as it is; a missing key gives the default."""
        return self._values.get(key, default)

    def require(self, key: str, default: Any, allowed: tuple[Any, ...]) -> None:
        """Checks that a key has one of the values that the model supports.

        Args:
            key: the key.
            default: the value that transformers uses where the key is missing.
            allowed: the supported values.

        Raises:
            CheckpointError: the value is another one.
        """
        value = self._values.get(key, default)
        if value not in allowed:
            error = CheckpointError(
                f"{self.where}: {key} is {shown_value(value)}, which megatron_patch does not implement",
                " or ".join(repr(option) for option in allowed),
                "convert another model",
            )
            self._report(error, key)
