"""Shows a run's checkpoints, and checks them.

python tools/inspect_checkpoint.py RUN [--verify] [--explain] [--json]

The exit code is 4 if a checkpoint is not valid.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.table import Table

from megatron_patch.checkpoint.report import checkpoint_folders, describe, explain, flatten
from megatron_patch.cli.command_line import ArgumentParser
from megatron_patch.errors import CheckpointError
from megatron_patch.utils.console import make_console
from megatron_patch.utils.tables import FittingTable
from megatron_patch.utils.units import format_count


def add_flags(parser: argparse._ActionsContainer) -> None:
    """Adds the flags of the tool to a parser or a group of one."""
    parser.add_argument("--verify", action="store_true", help="read all files and compare their checksums; default: compare only sizes")
    parser.add_argument(
        "--explain", action="store_true", help="show model, layout, stages, data and given options of the newest readable checkpoint"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of tables")


def main(argv: list[str]) -> None:
    """Runs the tool."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run's folder, or one of its step-N folders")
    add_flags(parser)
    args = parser.parse_args(argv)
    checkpoints = [describe(folder, full=args.verify) for folder in checkpoint_folders(args.run)]
    result: dict[str, object] = {"checkpoints": checkpoints}
    if args.explain:
        readable = [checkpoint for checkpoint in checkpoints if checkpoint["tokens"] is not None]
        result["explanation"] = {"folder": readable[0]["folder"], **explain(Path(readable[0]["folder"]))} if readable else None
    if args.json:
        print(json.dumps(result))
    else:
        print_tables(checkpoints, result.get("explanation"))
    invalid = [checkpoint for checkpoint in checkpoints if not checkpoint["valid"]]
    if invalid:
        raise CheckpointError(
            f"{invalid[0]['folder']} is not valid: {invalid[0]['problems'][0]}",
            "checkpoints whose files match their manifest",
            "nothing if another checkpoint is valid: resuming skips this one; else restore it from a copy",
        )


def print_tables(checkpoints: list[dict[str, object]], explanation: object) -> None:
    """Prints one row per checkpoint, and the explanation as a second table.

    Args:
        checkpoints: summaries as `describe` returns them.
        explanation: what `explain` returns, or None.
    """
    console = make_console(width=160)
    names = ("checkpoint", "step", "stage", "K", "tokens", "MiB", "files", "valid")
    table = FittingTable("", names, left=("checkpoint", "stage", "valid"), folded=("stage", "valid"))
    for checkpoint in checkpoints:
        size, tokens = checkpoint["bytes"], checkpoint["tokens"]
        problems = checkpoint["problems"]
        assert isinstance(problems, list)
        cells = (
            Path(str(checkpoint["folder"])).name,
            checkpoint["step"],
            checkpoint["stage"],
            checkpoint["patch_size"],
            format_count(tokens) if isinstance(tokens, int) else None,
            f"{size / 2**20:,.1f}" if isinstance(size, int) else None,
            checkpoint["files"],
            f"yes ({checkpoint['checked']})" if checkpoint["valid"] else "NO: " + "; ".join(map(str, problems)),
        )
        table.add_row(*("" if value is None else str(value) for value in cells))
    console.print(table)
    if isinstance(explanation, dict):
        details = Table(show_header=False)
        for name, text in flatten(explanation).items():
            details.add_row(name, text)
        console.print(details)
