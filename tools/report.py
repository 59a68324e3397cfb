#!/usr/bin/env python
"""Writes one HTML file about runs, to be opened without a network: python tools/report.py SAVE [SAVE …] --output report.html"""

from __future__ import annotations

import sys
from pathlib import Path

import package_check  # noqa: F401 - before the package itself

from megatron_patch.cli.command_line import ArgumentParser, run_tool
from megatron_patch.reporting.page import write_report


def main(argv: list[str]) -> None:
    """Runs the tool."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs; they may still be running")
    parser.add_argument("--output", type=Path, default=Path("report.html"))
    parser.add_argument("--labels", nargs="+", help="one for each run; by default the folders' names")
    parser.add_argument("--title", help="the heading; by default the labels")
    args = parser.parse_args(argv)
    histories = write_report(args.runs, args.output, args.labels, args.title)
    for history in histories:
        for note in history.notes:
            print(f"{history.label}: {note}")
    print(f"wrote {args.output} ({args.output.stat().st_size / 1e6:.1f} MB, {len(histories)} run{'s' if len(histories) > 1 else ''})")


if __name__ == "__main__":
    sys.exit(run_tool(main))
