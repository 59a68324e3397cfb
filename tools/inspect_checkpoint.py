#!/usr/bin/env python
"""Shows a run's checkpoints: python tools/inspect_checkpoint.py RUN [--verify] [--explain] [--json]

RUN is a run's folder or one of its step-N folders. --verify compares every checksum (else only sizes); exit code 4 where one is not sound.
--explain tells model, layout, stages, data and given options of the newest, or of the one named.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import package_check  # noqa: F401 - before the package itself
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_patch.checkpoint.report import describe, explain, flat, folders_of
from megatron_patch.cli.command_line import ArgumentParser, run_tool
from megatron_patch.errors import CheckpointError
from megatron_patch.utils.units import format_count


def main(argv: list[str]) -> None:
    """Runs the tool."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run's folder, or one of its step-N folders")
    parser.add_argument("--verify", action="store_true", help="read everything and compare checksums")
    parser.add_argument("--explain", action="store_true", help="model, layout, stages, data, options of the newest one that can be read")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of tables")
    args = parser.parse_args(argv)
    lines = [describe(folder, full=args.verify) for folder in folders_of(args.run)]
    result: dict[str, object] = {"checkpoints": lines}
    if args.explain:
        readable = [line for line in lines if line["tokens"] is not None]
        result["explanation"] = {"folder": readable[0]["folder"], **explain(Path(readable[0]["folder"]))} if readable else None
    if args.json:
        print(json.dumps(result))
    else:
        show(lines, result.get("explanation"))
    damaged = [line for line in lines if not line["sound"]]
    if damaged:
        raise CheckpointError(
            f"{damaged[0]['folder']} is not sound: {damaged[0]['problems'][0]}",
            "checkpoints whose files are what their manifest says",
            "nothing, if another is sound: resuming skips it; else restore it from a copy",
        )


def show(lines: list[dict[str, object]], explanation: object) -> None:
    """Prints tables."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    table = Table()
    for name in ("checkpoint", "step", "stage", "K", "tokens", "MiB", "files", "sound"):
        table.add_column(name, justify="left" if name in ("checkpoint", "stage", "sound") else "right")
    for line in lines:
        size, tokens = line["bytes"], line["tokens"]
        problems = line["problems"]
        assert isinstance(problems, list)
        shown = (
            Path(str(line["folder"])).name,
            line["step"],
            line["stage"],
            line["patch_size"],
            format_count(tokens) if isinstance(tokens, int) else None,
            f"{size / 2**20:,.1f}" if isinstance(size, int) else None,
            line["files"],
            f"yes ({line['checked']})" if line["sound"] else "NO: " + "; ".join(map(str, problems)),
        )
        table.add_row(*("" if value is None else escape(str(value)) for value in shown))
    console.print(table)
    if isinstance(explanation, dict):
        details = Table(show_header=False)
        for name, text in flat(explanation).items():
            details.add_row(escape(name), escape(text))
        console.print(details)


if __name__ == "__main__":
    sys.exit(run_tool(main))
