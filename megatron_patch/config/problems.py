"""Several problems of one command line as one error, so that all of them are mended before the next start.

In: the errors, each of which has three parts. Out: one ConfigError; for several problems its message has a table.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.box import Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_patch.config.option_types import flag_of
from megatron_patch.errors import ConfigError
from megatron_patch.utils.console import visible
from megatron_patch.utils.units import plural

_LINES = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
_NARROWEST, _WIDEST = 60, 140


@dataclass(frozen=True)
class Problem:
    """One problem of a command line.

    Args:
        flag: the flag and its value; "": the problem belongs to no single flag.
        meaning: what the flag means here, or why the value is wrong.
        write: what to write instead.
        error: the same as an error, for a command line that has no other problem.
    """

    flag: str
    meaning: str
    write: str
    error: ConfigError


class SeveralConfigErrors(ConfigError):
    """Several problems of one command line; its message has all of them.

    Args:
        what: the table.
        allowed: as for every error.
        do: what to do about all of them.
        problems: the problems.
    """

    def __init__(self, what: str, allowed: str | None = None, do: str | None = None, problems: Sequence[Problem] = ()) -> None:
        super().__init__(what, allowed, do)
        self.problems = tuple(problems)


def shown(value: object) -> str:
    """Returns a value as text, without the end of a very long number."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:20]}… ({len(text)} characters)"


def flag_and_value(name: str, value: object) -> str:
    """Returns an option as it is given on the command line: ("lr", 1.0) -> "--lr 1.0"."""
    return f"{flag_of(name)} {shown(value)}"


def problems_of(*checks: Callable[[], object]) -> list[Problem]:
    """Calls checks, and returns the problems that they raise as a ConfigError."""
    problems: list[Problem] = []
    for check in checks:
        try:
            check()
        except SeveralConfigErrors as error:
            problems += error.problems
        except ConfigError as error:
            problems.append(problem_of(error))
    return problems


def problem_of(error: ConfigError) -> Problem:
    """Returns an error as a row of the table: its flag, its reason with what is allowed, and what to do."""
    found = re.fullmatch(r"(--[\w-]+): (.*)", error.what, re.DOTALL) or re.fullmatch(r"(--[\w-]+(?: [^\s,]+)?)()", error.what)
    flag, reason = found.groups() if found else ("", error.what)
    allowed = f"allowed: {error.allowed}" if error.allowed else ""
    return Problem(flag, "; ".join(part for part in (reason, allowed) if part), error.do or "", error)


def one_error(problems: Sequence[Problem], notes: Sequence[str] = (), do: str | None = None) -> ConfigError:
    """Returns the error that reports all problems: the only one as it is, or several in a table.

    Args:
        problems: at least one.
        notes: what else is to be known, after the table.
        do: what to do about all of them, such as the flags to write; None: what the table's last column says.
    """
    distinct = list({(problem.flag, problem.error.what): problem for problem in problems}.values())
    said = [f"Note: {note}" for note in notes]
    if len(distinct) == 1:
        error = distinct[0].error
        if do is None and not said:
            return error
        advice = "; ".join(part for part in (error.do, do) if part)
        return SeveralConfigErrors("\n  ".join([error.what, *said]), error.allowed, advice, distinct)
    columns: tuple[str, ...] = ("flag", "what it means here", "what to write")
    rows: list[tuple[str, ...]] = [(problem.flag, problem.meaning, problem.write) for problem in distinct]
    first = 30
    if not any(problem.flag for problem in distinct):  # each concerns several flags, which its reason names
        columns, rows, first = ("what is wrong", "what to write"), [row[1:] for row in rows], 50
    table = problem_table(rows, columns, 2, first)
    text = "\n".join([f"{plural(len(distinct), 'problem')} in the flags", table, *(f"  {note}" for note in said)])
    advice = "; ".join(part for part in ("write what the last column says", do) if part)
    return SeveralConfigErrors(text, None, advice, distinct)


def problem_table(rows: Sequence[tuple[str, ...]], columns: Sequence[str], indent: int = 0, first: int = 30) -> str:
    """Returns a table as text that fits the terminal, with control characters of its cells made visible.

    Args:
        rows: the cells.
        columns: the headings.
        indent: spaces before each line.
        first: width of the first column, in percent.
    """
    wide = max(_NARROWEST, min(shutil.get_terminal_size((100, 24)).columns, _WIDEST)) - indent
    table = Table(box=_LINES, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0), width=None)

    def share(number: int) -> int:
        return first if number == 0 else (100 - first) // (len(columns) - 1)

    for number, name in enumerate(columns):
        table.add_column(name, overflow="fold", max_width=max(16, wide * share(number) // 100 - 2))
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    output = io.StringIO()
    Console(file=output, width=wide, color_system=None, highlight=False, markup=False, emoji=False).print(table)
    return "\n".join(" " * indent + line.rstrip() for line in output.getvalue().splitlines())
