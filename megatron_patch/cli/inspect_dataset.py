"""Shows what is in a dataset, and compares or checks it.

python tools/inspect_dataset.py PREFIX [--check] [--samples 2] [--diff OTHER]
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_patch.cli.command_line import ArgumentParser, count, count_from_one
from megatron_patch.data.compare_datasets import compare
from megatron_patch.data.corpus import TokenCorpus
from megatron_patch.data.dataset_metadata import read_metadata
from megatron_patch.data.indexed_dataset import IndexedDataset
from megatron_patch.data.inspect import describe, integrity_problems, patch_statistics
from megatron_patch.data.split import stage_division
from megatron_patch.errors import DataError
from megatron_patch.tokenizers.base import Tokenizer, load_tokenizer_for_display
from megatron_patch.utils.console import make_console
from megatron_patch.utils.tables import FittingTable


def show_patches(dataset: IndexedDataset, patch_size: int, tokenizer: Tokenizer | None, samples: int, console: Console) -> None:
    """Prints the first patches of some sequences."""
    for number in range(samples):
        index = number * max(1, len(dataset) // max(1, samples))
        tokens = dataset[index][: 24 * patch_size]
        pieces = [tokens[start : start + patch_size] for start in range(0, len(tokens), patch_size)]
        shown = [tokenizer.decode(piece.tolist()) if tokenizer else " ".join(map(str, piece.tolist())) for piece in pieces]
        patches = Text("|", style="dim").join(Text(repr(text)[1:-1], style="not dim") for text in shown)
        console.print(Text(f"sequence {index}", style="bold"), patches, soft_wrap=True)


def show_division(prefix: str, config: str, console: Console) -> dict[str, Any]:
    """Prints how the stages of a configuration would divide a dataset, and returns the numbers."""
    from megatron_patch.config.parsing import parse
    from megatron_patch.config.resolve import resolve

    run = resolve(parse(["--config", config, "--data-path", prefix, "--dry-run"]), 1)
    found = stage_division(run.plan, TokenCorpus([prefix]), run.options.data.split)
    title = f"{found['blocks']:,} blocks of {found['block_tokens']:,} tokens for training"
    table = FittingTable(title, [name.replace("_", " ") for name in found["stages"][0]], left=("stage",))
    for stage in found["stages"]:
        shown = {**stage, "share": f"{stage['share']:.1%}", "epochs": f"{stage['epochs']:.3f}"}
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in shown.values()))
    console.print(table)
    return found


def add_flags(parser: argparse._ActionsContainer) -> None:
    """Adds the flags of the tool to a parser or a group of one."""
    parser.add_argument("--check", action="store_true", help="read all data and check offsets, lengths, token ids and checksums")
    parser.add_argument(
        "--patch-size", type=count_from_one, default=1, help="show patches of this many tokens, and count how they overlap documents"
    )
    parser.add_argument("--samples", type=count, default=1, help="number of sequences to show")
    parser.add_argument("--tokenizer-type", help="tokenizer for showing text; by default the one in the metadata file (PREFIX.json)")
    parser.add_argument("--tokenizer-model", help="its file or folder")
    parser.add_argument("--vocab-size", type=count_from_one, help="with --check: all token ids must be below this number")
    parser.add_argument("--eod-token-id", type=count, help="id of the end-of-document token; by default the one in the metadata file")
    parser.add_argument("--diff", metavar="OTHER", help="compare with the dataset of another prefix; exit code 3 if they differ")
    parser.add_argument("--config", metavar="FILE", help="show how the stages of this training configuration would divide the dataset")


def _shown(name: str, value: Any) -> str:
    """Returns a value of the result for the table."""
    if name == "diff":
        return "; ".join(value["differences"]) or "equal"
    if name == "tokens_per_sequence" and value:
        low, middle, high, longest = value
        return f"5 %: {low:,}   50 %: {middle:,}   95 %: {high:,}   longest: {longest:,}"
    if value is None or value == []:
        return "unknown"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main(argv: list[str]) -> None:
    """Runs the tool with these arguments."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("prefix", help="dataset prefix: the path without .bin and .idx")
    add_flags(parser)
    args = parser.parse_args(argv)
    dataset = IndexedDataset(args.prefix)
    console = make_console(width=140, stderr=True)
    result: dict[str, Any] = describe(dataset)
    try:
        metadata = read_metadata(args.prefix)
    except DataError:
        if not args.check:
            raise
        metadata = None
    if metadata is not None:
        result.update(
            vocab_size=metadata.vocab_size,
            eod_id=metadata.eod_id,
            tokenizer=metadata.tokenizer_model,
            patch_align=metadata.patch_align,
        )
    if args.patch_size > 1:
        eod_id = args.eod_token_id if args.eod_token_id is not None else (metadata.eod_id if metadata else None)
        result.update(patch_statistics(dataset, args.patch_size, eod_id))
    if args.diff is not None:
        result["diff"] = compare(dataset, IndexedDataset(args.diff))
    if args.check:
        result["problems"] = integrity_problems(dataset, args.vocab_size)
    table = Table(show_header=False)
    for name, value in result.items():
        table.add_row(name.replace("_", " "), _shown(name, value))
    console.print(table)
    if not result.get("problems"):
        known = (metadata.tokenizer_type, metadata.tokenizer_model) if metadata else None
        show_patches(
            dataset,
            args.patch_size,
            load_tokenizer_for_display(known, args.tokenizer_type, args.tokenizer_model),
            min(args.samples, len(dataset)),
            console,
        )
    if args.config is not None:
        result["division"] = show_division(args.prefix, args.config, console)
    print(json.dumps(result))
    if result.get("problems"):
        raise DataError(
            f"{args.prefix} is damaged: {result['problems'][0]}", "a valid dataset", "copy it again, or preprocess the data again"
        )
    if args.diff is not None and not result["diff"]["equal"]:
        raise DataError(
            f"{args.prefix} and {args.diff} differ: {result['diff']['differences'][0]}", "equal datasets", "see the differences above"
        )
