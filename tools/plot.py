#!/usr/bin/env python
"""Plots held-out loss against tokens and against cost: python tools/plot.py RUN [RUN …] --output loss.png"""

from __future__ import annotations

import sys
from pathlib import Path

import package_check  # noqa: F401 - before the package itself

from megatron_patch.cli.command_line import ArgumentParser, run_tool
from megatron_patch.reporting.plotting import plot_runs


def main(argv: list[str]) -> None:
    """Runs the tool."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--output", type=Path, default=Path("loss.png"))
    parser.add_argument("--labels", nargs="+", help="one for each run; by default the folders' names")
    parser.add_argument("--title")
    args = parser.parse_args(argv)
    plot_runs(args.runs, args.output, args.labels, args.title)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    sys.exit(run_tool(main))
