"""Plots the held-out token loss of runs against tokens and against cost.

python tools/plot.py RUN [RUN …] --output loss.png [--corpus NAME]
"""

from __future__ import annotations

from pathlib import Path

from megatron_patch.cli.command_line import ArgumentParser
from megatron_patch.reporting.plotting import plot_runs
from megatron_patch.utils.console import print_line


def main(argv: list[str]) -> None:
    """Runs the tool.

    Raises:
        DataError: a run cannot be read, or the plot cannot be written.
    """
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders that --save named, or their metrics.jsonl files")
    parser.add_argument("--output", type=Path, default=Path("loss.png"), help="PNG file to write (default: loss.png)")
    parser.add_argument("--labels", nargs="+", help="one label per run (default: names of the folders)")
    parser.add_argument("--title", help="title of the plot")
    parser.add_argument("--corpus", metavar="NAME", help="draw the loss of one corpus of a blend, by its name in metrics.jsonl")
    args = parser.parse_args(argv)
    for curve in plot_runs(args.runs, args.output, args.labels, args.title, args.corpus):
        for note in curve.notes:
            print_line(f"{curve.label}: {note}")
    print_line(f"wrote {args.output}")
