#!/usr/bin/env python
"""Turns text into the indexed datasets that pretraining reads (Megatron's format).

python tools/preprocess_data.py --input a.jsonl 'shards/*.jsonl.gz' --output-prefix my --tokenizer-type HuggingFaceTokenizer \
    --tokenizer-model tokenizer.json --append-eod --workers 8
"""

from __future__ import annotations

import argparse
import codecs
import json
import os
import sys
import time

import package_check  # noqa: F401 - before the package itself
from rich.console import Console
from rich.table import Table

from megatron_patch.cli.command_line import ArgumentParser, count, count_from_one, run_tool
from megatron_patch.data.dataset_paths import shard_prefix
from megatron_patch.errors import DataError
from megatron_patch.preprocess.encode import EncodeSettings
from megatron_patch.preprocess.pipeline import Progress, preprocess
from megatron_patch.preprocess.summary import Summary
from megatron_patch.raw_text.inputs import parse_shard
from megatron_patch.tokenizers.base import TOKENIZERS
from megatron_patch.tokenizers.tiktoken import PATTERNS
from megatron_patch.utils.registry import lookup
from megatron_patch.utils.units import format_count, format_duration


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="files, globs in quotes, or - for standard input: .jsonl .json .txt, also .gz .bz2 .xz .zst; .parquet",
    )
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX_KEY_document.bin, .idx and .json")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys of the text, one output each; dots for nested keys")
    parser.add_argument("--tokenizer-type", required=True, help=f"one of {', '.join(TOKENIZERS)}")
    parser.add_argument("--tokenizer-model", help="its file or folder")
    parser.add_argument("--vocab-file", help="vocab.json of GPT2BPETokenizer")
    parser.add_argument("--merge-file", help="merges.txt of GPT2BPETokenizer")
    parser.add_argument("--vocab-size", type=count_from_one, help="of NullTokenizer")
    parser.add_argument("--eod-token", help="the end-of-document token, where the usual names do not fit")
    parser.add_argument("--tiktoken-pattern", help=f"of TikTokenizer: {', '.join(PATTERNS)}, or a regular expression")
    parser.add_argument("--special-tokens", nargs="+", metavar="NAME[=ID]", help="of TikTokenizer; without ids the next behind all before")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    parser.add_argument("--prepend-bos", action="store_true", help="begin each document with the beginning-of-sequence token")
    parser.add_argument(
        "--patch-align",
        type=count_from_one,
        default=1,
        help="pad each document with end-of-document tokens to whole patches of so many tokens",
    )
    parser.add_argument("--workers", type=count_from_one, default=1, help="processes that encode")
    parser.add_argument(
        "--on-bad-line", choices=("skip", "fail"), default="skip", help="leave bad lines out and list them, or stop at the first"
    )
    parser.add_argument(
        "--backend",
        choices=("auto", "words", "reference"),
        default="auto",
        help="auto: fastokens and a memory for words, where they agree with the reference; words: without fastokens",
    )
    parser.add_argument("--txt-separator", help=r"between the documents of a .txt, with escapes: '\n\n'; without: one document a file")
    for name, unit in (("chars", "characters"), ("tokens", "tokens, without those that are added")):
        parser.add_argument(f"--min-{name}", type=count, help=f"leave documents out that have fewer {unit}")
        parser.add_argument(f"--max-{name}", type=count, help=f"leave documents out that have more {unit}")
    parser.add_argument("--dedup", action="store_true", help="leave documents out whose tokens are those of an earlier one")
    parser.add_argument("--shuffle-documents", type=int, metavar="SEED", help="put documents into a random order")
    parser.add_argument("--shard", help="i/n: only part i of n, from 0; slurm/n: i is the task of the Slurm array; slurm: n is its size")
    parser.add_argument("--resume", action="store_true", help="go on with an unfinished run, if there is one")
    parser.add_argument("--save-interval", type=float, default=30.0, help="seconds between the points from which a run can be resumed")
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist, and what an unfinished run left")
    parser.add_argument("--log-interval", type=float, default=10.0, help="seconds between progress lines")
    args = parser.parse_args(argv)
    lookup(TOKENIZERS, args.tokenizer_type, "--tokenizer-type")
    return args


def unescape(text: str) -> bytes:
    r"""What a shell can hardly write: \n, \t, \x1e in the words of a command line.

    Raises:
        DataError: an escape that is none, or nothing at all.
    """
    try:
        found = codecs.escape_decode(text.encode("utf-8"))[0]
    except ValueError as error:
        raise DataError(f"--txt-separator {text!r}: {error}", r"text with escapes: '\n\n'") from error
    if not found:
        raise DataError("--txt-separator ''", r"text with escapes: '\n\n'", "leave it out for one document a file")
    return bytes(found)


def progress_lines(interval: float) -> Progress:
    """Prints a line every so many seconds."""
    last = [time.monotonic()]

    def show(documents: int, tokens: int, read: int, seconds: float, share: float) -> None:
        if time.monotonic() - last[0] >= interval:
            last[0] = time.monotonic()
            print(
                f"{format_count(documents)} documents, {format_count(tokens)} tokens, {read / 1e6:,.0f} MB, "
                f"{read / 1e6 / seconds:.1f} MB/s, {format_count(tokens / seconds)} tokens/s, {format_duration(seconds)}"
                + (f", {share:.1%} done, {format_duration(seconds / share - seconds)} to go" if share else ""),
                file=sys.stderr,
            )

    return show


def show_summary(summary: Summary) -> None:
    """Prints a table for people and a JSON line for scripts."""
    table = Table(show_header=False, title="Preprocessed", title_justify="left")
    low, middle, high, longest = summary.tokens_per_document
    rows = {
        "outputs": "\n".join(summary.outputs),
        "documents": f"{summary.documents:,}",
        "tokens": f"{summary.tokens:,} ({summary.dtype})",
        "tokens a document": f"5 %: {low:,}   50 %: {middle:,}   95 %: {high:,}   longest: {longest:,}",
        "read": f"{summary.bytes / 1e6:,.1f} MB in {format_duration(summary.seconds)}",
        "left out": f"{summary.bad_lines:,} bad lines, {summary.empty:,} empty documents, {summary.filtered:,} too short or too long, "
        + f"{summary.duplicates:,} duplicates"
        + (f" (listed in {summary.bad_lines_file})" if summary.bad_lines_file else ""),
        "vocabulary": f"{summary.vocab_size:,} ids, end of document {summary.eod_id}"
        + (f"; the largest in the text is {summary.largest_id:,}" if summary.largest_id is not None else ""),
        "encoded by": summary.backend + (f", {summary.checked:,} documents compared with the reference" if summary.checked else ""),
        **({"resumed": f"after {summary.resumed_at / 1e6:,.1f} MB"} if summary.resumed_at else {}),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console(stderr=True, width=120).print(table)
    print(json.dumps(summary.to_json()))


def main(argv: list[str]) -> None:
    """Runs the tool."""
    args = parse(argv)
    settings = EncodeSettings(
        tokenizer_type=args.tokenizer_type,
        tokenizer_model=args.tokenizer_model,
        vocab_file=args.vocab_file,
        merge_file=args.merge_file,
        vocab_size=args.vocab_size,
        eod_token=args.eod_token,
        tiktoken_pattern=args.tiktoken_pattern,
        special_tokens=tuple(args.special_tokens) if args.special_tokens else None,
        keys=tuple(args.json_keys),
        append_eod=args.append_eod,
        prepend_bos=args.prepend_bos,
        patch_align=args.patch_align,
        backend=args.backend,
        min_chars=args.min_chars,
        max_chars=args.max_chars,
        min_tokens=args.min_tokens,
        max_tokens=args.max_tokens,
    )
    shard = parse_shard(args.shard, os.environ) if args.shard else None
    summary = preprocess(
        args.input,
        shard_prefix(args.output_prefix, *shard) if shard else args.output_prefix,
        settings,
        workers=args.workers,
        on_bad_line=args.on_bad_line,
        overwrite=args.overwrite,
        resume=args.resume,
        shard=shard,
        separator=unescape(args.txt_separator) if args.txt_separator is not None else None,
        dedup=args.dedup,
        shuffle_seed=args.shuffle_documents,
        save_seconds=args.save_interval,
        progress=progress_lines(args.log_interval),
        notice=lambda text: print(text, file=sys.stderr),
    )
    show_summary(summary)


if __name__ == "__main__":
    sys.exit(run_tool(main))
