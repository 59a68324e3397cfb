"""The ledger of the soak test: one row for each fault, as JSON lines while it runs, as a table for people at its end.

In: faults, what the program said, and how it went on. Out: rows; the table; the rows of a summary in Markdown.
"""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

WIDTH = 100


@dataclass
class Row:
    """One fault.

    Args:
        number: from 1.
        minute: minutes since the start of the soak test.
        run: number and kind of the run.
        kind: the kind of the fault, by which faults are counted.
        fault: what was done.
        moment: the step or the phase in which it was done.
        said: exit codes and the last line of the program, or that it kept going.
        then: how the run went on.
    """

    number: int
    minute: float
    run: str
    kind: str
    fault: str
    moment: str
    said: str = ""
    then: str = ""


@dataclass
class Ledger:
    """The faults of a soak test, in order.

    Args:
        path: file of JSON lines; a row is written once it is known how the run went on.
    """

    path: Path
    rows: list[Row] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)
    _open: list[Row] = field(default_factory=list)

    @property
    def minutes(self) -> float:
        """Minutes since the start."""
        return (time.monotonic() - self._began) / 60

    @property
    def counts(self) -> Counter[str]:
        """Number of faults by kind."""
        return Counter(row.kind for row in self.rows)

    def add(self, run: str, kind: str, fault: str, moment: str, said: str = "", then: str = "") -> None:
        """Adds a fault; without `then`, how the run goes on is not known yet."""
        row = Row(len(self.rows) + 1, round(self.minutes, 2), run, kind, fault, moment, said, then)
        self.rows.append(row)
        self._open.append(row)
        if then:
            self._write([row])

    def settle(self, then: str) -> None:
        """Writes down how the run went on after all faults whose outcome was not known."""
        for row in self._open:
            row.then = then
        self._write(list(self._open))

    def _write(self, rows: list[Row]) -> None:
        with self.path.open("a") as file:
            for row in rows:
                file.write(json.dumps(asdict(row)) + "\n")
                self._open.remove(row)

    def table(self) -> str:
        """Returns the ledger as a table of 100 columns."""
        table = Table(box=MARKDOWN, pad_edge=False, padding=(0, 1, 0, 0))
        for name, width in (("no.", 4), ("min", 5), ("kind", 10), ("fault, and when", 26), ("what the program said", 25), ("then", 19)):
            table.add_column(name, width=width, overflow="fold")
        for row in self.rows:
            table.add_row(str(row.number), f"{row.minute:.1f}", row.kind, f"{row.fault}; {row.moment}", row.said or "-", row.then)
        return _printed(table)

    def summary(self, kinds: Mapping[str, tuple[str, str]]) -> str:
        """Returns a Markdown table with a row for each kind.

        Args:
            kinds: kind -> (what is done, what happens then).
        """
        lines = ["| fault | how often | what happens |", "| --- | --- | --- |"]
        return "\n".join([*lines, *(f"| {what} | {self.counts[kind]} | {then} |" for kind, (what, then) in kinds.items())])


def _printed(table: Table) -> str:
    """Returns a table as text."""
    buffer = io.StringIO()
    Console(file=buffer, width=WIDTH).print(table)
    return buffer.getvalue()
