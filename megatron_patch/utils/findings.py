"""Several errors as one: all that is wrong with a command line or a file is shown at once. In: errors. Out: one error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron_patch.errors import ConfigError
from megatron_patch.utils.units import plural

Result = TypeVar("Result")


def all_at_once(errors: Sequence[ConfigError], where: str, prefix: str = "") -> ConfigError:
    """Returns one error that states all the given ones, each with its three parts.

    Args:
        errors: at least one.
        where: what they concern, as in "3 problems WHERE".
        prefix: text before each problem that is left out where `where` says it.
    """
    if len(errors) == 1:
        return errors[0]
    parts = [str(error).removeprefix(prefix).replace("\n  ", "\n    ") for error in errors]
    return ConfigError(f"{plural(len(errors), 'problem')} {where}:\n  - " + "\n  - ".join(parts))


class Findings:
    """Collects errors, so that one wrong value does not hide the next.

    Args:
        where: as for `all_at_once`.
        prefix: as for `all_at_once`.
    """

    def __init__(self, where: str, prefix: str = "") -> None:
        self._where, self._prefix = where, prefix
        self.errors: list[ConfigError] = []

    def add(self, what: str, allowed: str, do: str) -> None:
        """Adds an error by its three parts."""
        self.errors.append(ConfigError(what, allowed, do))

    def attempt(self, check: Callable[[], Result], otherwise: Result) -> Result:
        """Returns what the check returns, or `otherwise` if it raises a `ConfigError`, which is added."""
        try:
            return check()
        except ConfigError as error:
            self.errors.append(error)
            return otherwise

    def raise_all(self) -> None:
        """Raises everything that was added as one error.

        Raises:
            ConfigError: something was added.
        """
        if self.errors:
            raise all_at_once(self.errors, self._where, self._prefix)
