"""Writes a report about runs as one HTML file that needs no network.

python tools/report.py SAVE [SAVE …] --output report.html
"""

from __future__ import annotations

from pathlib import Path

from megatron_patch.cli.command_line import ArgumentParser
from megatron_patch.reporting.page import write_report
from megatron_patch.utils.console import print_line
from megatron_patch.utils.units import plural


def main(argv: list[str]) -> None:
    """Runs the tool.

    Raises:
        DataError: a run cannot be read, or the report cannot be written.
    """
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders that --save named; the runs may still be running")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="HTML file to write (default: report.html)")
    parser.add_argument("--labels", nargs="+", help="one label per run (default: names of the folders)")
    parser.add_argument("--title", help="heading of the report (default: the labels)")
    args = parser.parse_args(argv)
    histories = write_report(args.runs, args.output, args.labels, args.title)
    for history in histories:
        for note in history.notes:
            print_line(f"{history.label}: {note}")
    print_line(f"wrote {args.output} ({args.output.stat().st_size / 1e6:.1f} MB, {plural(len(histories), 'run')})")
