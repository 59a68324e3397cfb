"""Merges datasets, one after another, in constant memory.

python tools/merge_datasets.py --input 'my_shard-*' --output-prefix all

Shards are merged in the order given; those of a glob by name. The result is
byte for byte what a single run over all the input writes.
"""

from __future__ import annotations

import json
from dataclasses import asdict

from megatron_patch.cli.command_line import ArgumentParser
from megatron_patch.data.dataset_paths import check_all_shards, expand_prefixes
from megatron_patch.preprocess.merge import merge_datasets
from megatron_patch.utils.console import print_line
from megatron_patch.utils.units import plural


def main(argv: list[str]) -> None:
    """Runs the tool."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="dataset prefixes, globs in quotes, or @FILE with one of them per line")
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX.bin, .idx and .json")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--allow-missing", action="store_true", help="merge even if shards of a sharded run are missing")
    parser.add_argument("--dedup", action="store_true", help="leave out documents whose tokens equal those of an earlier one")
    parser.add_argument("--shuffle-documents", type=int, metavar="SEED", help="write documents in a random order")
    args = parser.parse_args(argv)
    prefixes = [prefix for word in args.input for prefix in expand_prefixes(word)]
    if not args.allow_missing:
        check_all_shards(prefixes)
    merged = merge_datasets(
        prefixes,
        args.output_prefix,
        overwrite=args.overwrite,
        dedup=args.dedup,
        shuffle_seed=args.shuffle_documents,
        notice=lambda text: print_line(text, stderr=True),
    )
    print_line(
        f"{merged.output}: {plural(merged.documents, 'document')} and {plural(merged.tokens, 'token')} "
        f"from {plural(merged.shards, 'shard')}, read back and verified"
        + (f"; {plural(merged.duplicates, 'duplicate')} left out" if args.dedup else ""),
        stderr=True,
    )
    print(json.dumps(asdict(merged)))
