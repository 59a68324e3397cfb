#!/usr/bin/env python
"""Puts runs on one page: python tools/report.py SAVE [SAVE …] --output report.html

The file holds everything it needs: open it anywhere. Losses against tokens, cost and time, stages, learning rate, gradient norm, speed,
data, checkpoints, events, and which options differ.
"""

from __future__ import annotations

import sys
from pathlib import Path

import package_check  # noqa: F401 - before the package itself

from megatron_patch.command_line import ArgumentParser, run_tool
from megatron_patch.reporting.page import write_report


def main(argv: list[str]) -> None:
    """Runs the tool."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--output", type=Path, default=Path("report.html"))
    parser.add_argument("--names", nargs="+", help="one for each run; by default the folders'")
    parser.add_argument("--title")
    args = parser.parse_args(argv)
    runs = write_report(args.runs, args.output, args.names, args.title)
    for run in runs:
        torn = f", {run.torn} lines could not be read" if run.torn else ""
        print(f"{run.name}: {run.steps['step'][-1]:,} steps, {run.state}{torn}")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    sys.exit(run_tool(main))
