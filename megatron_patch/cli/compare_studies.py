"""Compares studies in one table and one plot: gain at equal cost, by steps.

python examples/replicate/compare_studies.py runs/small-1M runs/small-3M \\
    --output runs/comparison

A study is its output folder or the file of its --records. Studies of one model
that differ in their length show from how many steps an arm reaches token level.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_patch.cli.command_line import ArgumentParser
from megatron_patch.replication.comparison import comparison_markdown, plot_comparison, read_study
from megatron_patch.replication.publish import publish
from megatron_patch.replication.results import COLORS
from megatron_patch.utils.files import write_durably


def main(argv: list[str]) -> None:
    """Reads the studies, and writes and prints the comparison."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("studies", nargs="+", type=Path, help="output folders of studies, or files of their records")
    parser.add_argument("--output", type=Path, required=True, help="folder that receives comparison.md and comparison.png")
    parser.add_argument("--docs", type=Path, help="Markdown file that receives the table between <!-- NAME --> and <!-- end of NAME -->")
    parser.add_argument("--docs-name", default="comparison", help="name of these markers and of the plot (default: comparison)")
    args = parser.parse_args(argv)
    read = {path: read_study(path) for path in args.studies}
    for path, study in read.items():
        if study.left_out:
            print(f"{path}: left out, as this program has no such arm: {', '.join(study.left_out)}", file=sys.stderr)
    studies = sorted(read.values(), key=lambda study: (study.steps, study.budget))
    args.output.mkdir(parents=True, exist_ok=True)
    plot_comparison(
        args.output / "comparison.png", studies, COLORS[2:] + COLORS[:2]
    )  # in the other plots the first two, greys, are the baselines
    text = comparison_markdown(studies, "comparison.png")
    write_durably(args.output / "comparison.md", text)
    if args.docs:
        plot = f"{args.docs_name}.png"
        publish(args.docs, args.docs_name, comparison_markdown(studies, plot), {plot: args.output / "comparison.png"})
    print(text)
