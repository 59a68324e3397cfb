"""Tables that fit the console, whatever its width.

In: columns and rows of text. Out: the table; where it is too wide, its rows as columns, several tables that share its columns, or a list.
No value is truncated: rich would shorten the cells of a table that is too wide to a few letters each.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from megatron_patch.utils.console import one_line

_SHORTEST_FOLDED = 16  # characters of a long name in one line of its cell


class FittingTable:
    """A table of text for a console of any width.

    Args:
        title: printed above.
        columns: their names.
        left: columns that are aligned left; the others are aligned right.
        folded: columns of long names, which may continue on the next line of their cell.
    """

    def __init__(self, title: str, columns: Sequence[str], *, left: Sequence[str] = (), folded: Sequence[str] = ()) -> None:
        self._title, self._columns, self._left, self._folded = title, list(columns), set(left), set(folded)
        self._rows: list[list[str]] = []
        self._sections: set[int] = set()

    def add_row(self, *cells: str) -> None:
        """Adds a row with a cell for each column."""
        self._rows.append([one_line(cell) for cell in cells])

    def add_section(self) -> None:
        """Draws a line below the last row."""
        self._sections.add(len(self._rows))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        if self._title:
            # A title of the table itself would be broken at the table's width.
            yield Text(one_line(self._title), "italic")
        names, *others = zip(self._columns, *self._rows, strict=True)
        if self._needed(self._columns, self._rows) <= width:
            yield self._as_it_is()
        elif self._needed(names, others) <= width:
            yield self._turned(names, others)
        elif self._needed(self._columns, self._rows, fold=True) <= width:
            yield self._as_it_is()
        elif (parts := self._parts(width)) is not None:
            yield from parts
        else:
            yield self._listed()

    def _parts(self, width: int) -> list[Table] | None:
        """Returns tables that share the columns, each with the first column and as many others as fit; None if one alone is too wide."""
        widths = [self._needed([name], [[cell] for cell in cells]) - 1 for name, *cells in zip(self._columns, *self._rows, strict=True)]
        groups: list[list[int]] = []
        for number in range(1, len(widths)):
            if 1 + widths[0] + widths[number] > width:
                return None
            if not groups or 1 + widths[0] + sum(widths[other] for other in groups[-1]) + widths[number] > width:
                groups.append([])
            groups[-1].append(number)
        parts = []
        for group in groups:
            part = FittingTable("", [self._columns[number] for number in (0, *group)], left=list(self._left))
            part._rows = [[row[number] for number in (0, *group)] for row in self._rows]
            part._sections = self._sections
            parts.append(part._as_it_is())
        return parts

    def _needed(self, head: Sequence[str], rows: Sequence[Sequence[str]], fold: bool = False) -> int:
        """Returns the characters of a line of a table."""
        widths = [max(map(cell_len, cells)) for cells in zip(head, *rows, strict=True)]
        if fold:
            widths = [min(width, _SHORTEST_FOLDED) if name in self._folded else width for name, width in zip(head, widths, strict=True)]
        return sum(width + 3 for width in widths) + 1

    def _as_it_is(self) -> Table:
        table = Table(header_style="bold")
        for name in self._columns:
            table.add_column(name, justify="left" if name in self._left else "right", overflow="fold", no_wrap=name not in self._folded)
        for number, row in enumerate(self._rows):
            if number and number in self._sections:
                table.add_section()
            table.add_row(*row)
        return table

    def _turned(self, names: Sequence[str], others: Sequence[Sequence[str]]) -> Table:
        """Returns the table with a column for each row."""
        table = Table(header_style="bold")
        for number, name in enumerate(names):
            table.add_column(name, justify="right" if number else "left", no_wrap=True)
        for cells in others:
            table.add_row(*cells)
        return table

    def _listed(self) -> Table:
        """Returns a table of two columns, with a block for each row."""
        table = Table(show_header=False)
        table.add_column("name", style="bold", no_wrap=True)
        table.add_column("value", overflow="fold")
        for row in self._rows:
            for name, cell in zip(self._columns, row, strict=True):
                table.add_row(name, cell)
            table.add_section()
        return table
