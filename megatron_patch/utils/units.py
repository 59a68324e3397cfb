"""Numbers with units: "2M" tokens, "1.5k" steps, "3h30m". In: text. Out: numbers, and text from numbers."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from megatron_patch.errors import ConfigError

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
# A comma is allowed only before three digits. Otherwise 1,5M, a decimal comma, would be read as 15M.
_WHOLE = r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+(?:_[0-9]+)*"
_PATTERN = re.compile(rf"^\s*((?:{_WHOLE})(?:\.[0-9]+)?|\.[0-9]+)(?:[eE]\+?([0-9]{{1,2}}))?\s*([A-Za-z]{{0,2}})\s*$")
_LONGEST = 64


def parse_count(text: str | int | float) -> int:
    """Returns the whole number that a text gives: digits (with `_` or `,` between them), a fraction or an exponent, and a unit.

    Units are k, M, B (or G) and T for powers of 1,000, and Ki, Mi, Gi and Ti for powers of 1,024, in upper or lower case.

    Raises:
        ConfigError: the text is not such a number, or the number is negative or not whole.
    """
    match = _PATTERN.match(str(text)) if len(str(text)) <= _LONGEST else None
    if isinstance(text, bool) or match is None or match.group(3).lower() not in _FACTORS:
        raise ConfigError(
            f"{text!r}"[:80] + " is not a count", "a whole number with an optional unit: 4096, 512k, 2M, 1.5B, 1T, 64Ki", "write it like 2M"
        )
    digits, exponent, unit = match.groups()
    value = Fraction(digits.replace("_", "").replace(",", "")) * 10 ** int(exponent or 0) * _FACTORS[unit.lower()]
    if value.denominator != 1:
        raise ConfigError(
            f"{text!r} is not a whole number ({float(value):g})", "whole numbers, as 1500 or 1.5k", "use fewer decimals or a larger unit"
        )
    return int(value)


def format_count(value: int | float) -> str:
    """Returns a count with three significant digits and a unit: 2_000_000 -> "2M", 1_234_567 -> "1.23M"."""
    for factor, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.3g}{unit}" if abs(value) < 999.5 * factor else f"{value / factor:,.0f}{unit}"
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.3g}"


_STEPS = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")
_MOST_STEPS = 20


def parse_steps(text: str, flag: str) -> tuple[int, int]:
    """Returns the first and the last step of "10" or "10-12".

    Args:
        text: the steps.
        flag: the flag that gives them, for the error.

    Raises:
        ConfigError: the text is not that, or the steps are more than 20, whose records would fill memory and disk.
    """
    match = _STEPS.fullmatch(text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match is not None else (0, 0)
    if not 1 <= first <= last < first + _MOST_STEPS:
        raise ConfigError(
            f"{flag} {text[:_LONGEST]!r}",
            f"a step, or the first and the last of up to {_MOST_STEPS} steps, which are counted from 1",
            f"give {flag} 10, or {flag} 10-12",
        )
    return first, last


_DURATION = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(d|h|min|m|s|)\s*")
_SECONDS = {"d": 86400, "h": 3600, "min": 60, "m": 60, "s": 1, "": 1}


def parse_duration(text: str | int | float) -> float:
    """Returns the seconds of a duration: "90" or "90 s", "45 min", "3h30m", "1.5 d".

    Raises:
        ConfigError: the text is not a duration.
    """
    rest, seconds = str(text), 0.0
    while rest and (match := _DURATION.match(rest)):
        seconds += float(match.group(1)) * _SECONDS[match.group(2)]
        rest = rest[match.end() :]
    if rest or not str(text).strip() or isinstance(text, bool):
        raise ConfigError(f"{text!r} is not a duration", "numbers with d, h, min or s: 45min, 3h30m, 1.5d", "write it like 3h30m")
    return seconds


def format_duration(seconds: float) -> str:
    """Returns a duration as text: 42 s, 3 min 05 s, 2 h 07 min, 4 d 03 h; "?" if it is infinite or not a number."""
    if not math.isfinite(seconds):
        return "?"
    total = round(seconds)
    if total < 60:
        return f"{seconds:.0f} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    if total < 86400:
        return f"{total // 3600} h {total % 3600 // 60:02d} min"
    return f"{total // 86400:,} d {total % 86400 // 3600:02d} h"


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """Returns a count with its noun: "1 step", "2 steps", "1,200 steps".

    Args:
        count: how many.
        noun: the singular.
        nouns: the plural; None: the singular with an "s".
    """
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"
