r"""Converts text to the indexed datasets that pretraining reads.

python tools/preprocess_data.py --input a.jsonl 'shards/*.jsonl.gz' \
    --output-prefix my --tokenizer-type HuggingFaceTokenizer \
    --tokenizer-model tokenizer.json --append-eod --workers 8
"""

from __future__ import annotations

import argparse
import codecs
import json
import os
import time

from rich.table import Table

from megatron_patch.cli.command_line import ArgumentParser, count, count_from_one
from megatron_patch.data.dataset_paths import shard_prefix
from megatron_patch.errors import DataError
from megatron_patch.preprocess.encode import EncodeSettings
from megatron_patch.preprocess.pipeline import ReportProgress, preprocess
from megatron_patch.preprocess.summary import Summary
from megatron_patch.raw_text.inputs import parse_shard
from megatron_patch.tokenizers.base import TOKENIZERS
from megatron_patch.tokenizers.tiktoken import PATTERNS
from megatron_patch.utils.console import make_console, one_line, print_line
from megatron_patch.utils.registry import lookup
from megatron_patch.utils.units import format_count, format_duration, plural


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="files, globs in quotes, or - for standard input; .jsonl, .json and .txt, also compressed (.gz, .bz2, .xz, .zst); .parquet; "
        "a .zst takes as much memory as its window (2 GiB if made with zstd --long=31)",
    )
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX_KEY_document.bin, .idx and .json")
    parser.add_argument(
        "--json-keys", nargs="+", default=["text"], help="JSON keys of the text, with dots for nested keys; each key gets its own output"
    )
    parser.add_argument("--tokenizer-type", required=True, help=f"one of {', '.join(TOKENIZERS)}")
    parser.add_argument("--tokenizer-model", help="the tokenizer's file or folder")
    parser.add_argument("--vocab-file", help="vocab.json of GPT2BPETokenizer")
    parser.add_argument("--merge-file", help="merges.txt of GPT2BPETokenizer")
    parser.add_argument("--vocab-size", type=count_from_one, help="number of ids of NullTokenizer")
    parser.add_argument("--eod-token", help="the end-of-document token, where the tokenizer's files do not name it")
    parser.add_argument("--bos-token", help="the beginning-of-sequence token, where the tokenizer's files do not name it")
    parser.add_argument("--tiktoken-pattern", help=f"how TikTokenizer splits text: {', '.join(PATTERNS)}, or a regular expression")
    parser.add_argument(
        "--special-tokens", nargs="+", metavar="NAME[=ID]", help="special tokens of TikTokenizer; ids default to the next free ones"
    )
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    parser.add_argument("--prepend-bos", action="store_true", help="start each document with the beginning-of-sequence token")
    parser.add_argument(
        "--patch-align",
        type=count_from_one,
        default=1,
        help="pad each document with end-of-document tokens to a multiple of this many tokens",
    )
    parser.add_argument("--workers", type=count_from_one, default=1, help="number of processes that encode")
    parser.add_argument(
        "--on-bad-line", choices=("skip", "fail"), default="skip", help="skip bad lines and list them, or fail at the first one"
    )
    parser.add_argument(
        "--backend",
        choices=("auto", "reference"),
        default="auto",
        help="auto: a faster encoder (fastokens or the word cache), if it gives the same ids; reference: only the tokenizer's own library",
    )
    parser.add_argument(
        "--txt-separator", help=r"separator of the documents in a .txt, with escapes: '\n\n'; default: each file is one document"
    )
    for name, unit in (("chars", "characters"), ("tokens", "tokens (added tokens do not count)")):
        parser.add_argument(f"--min-{name}", type=count, help=f"leave out documents with fewer {unit}")
        parser.add_argument(f"--max-{name}", type=count, help=f"leave out documents with more {unit}")
    parser.add_argument("--keep-empty", action="store_true", help="keep documents without a token, as Megatron's tool does")
    parser.add_argument("--dedup", action="store_true", help="leave out documents whose tokens equal those of an earlier one")
    parser.add_argument("--shuffle-documents", type=int, metavar="SEED", help="write documents in a random order")
    parser.add_argument(
        "--shard",
        help="i/n: process only part i of n, from 0; slurm/n: i is the task id of the Slurm array; slurm: n is the array's size, too",
    )
    parser.add_argument("--resume", action="store_true", help="resume an unfinished run, if there is one")
    parser.add_argument("--save-interval", type=float, default=30.0, help="seconds between two points from which a run can resume")
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs and the files of an unfinished run")
    parser.add_argument("--log-interval", type=float, default=10.0, help="seconds between progress lines")
    args = parser.parse_args(argv)
    lookup(TOKENIZERS, args.tokenizer_type, "--tokenizer-type")
    return args


def unescape(text: str) -> bytes:
    r"""Replaces escapes such as \n, \t or \x1e, which are hard to type in a shell, and returns bytes.

    Raises:
        DataError: an escape is not valid, or the text is empty.
    """
    try:
        found = codecs.escape_decode(text.encode("utf-8"))[0]
    except ValueError as error:
        raise DataError(f"--txt-separator {text!r} is not valid: {error}", r"text with escapes, such as '\n\n'") from error
    if not found:
        raise DataError("--txt-separator is empty", r"text with escapes, such as '\n\n'", "remove it if each file is one document")
    return bytes(found)


def progress_lines(interval: float) -> ReportProgress:
    """Returns a function that prints a progress line at most every `interval` seconds."""
    last = [time.monotonic()]

    def show(documents: int, tokens: int, read: int, seconds: float, fraction: float) -> None:
        if time.monotonic() - last[0] >= interval:
            last[0] = time.monotonic()
            print_line(
                f"{format_count(documents)} documents, {format_count(tokens)} tokens, {read / 1e6:,.0f} MB, "
                f"{read / 1e6 / seconds:.1f} MB/s, {format_count(tokens / seconds)} tokens/s, {format_duration(seconds)}"
                + (f", {fraction:.1%} done, {format_duration(seconds / fraction - seconds)} left" if fraction else ""),
                stderr=True,
            )

    return show


def show_summary(summary: Summary) -> None:
    """Prints the summary: a table to standard error, and a line of JSON to standard output."""
    table = Table(show_header=False, title="Preprocessing finished", title_justify="left")
    low, middle, high, longest = summary.tokens_per_document
    rows = {
        "outputs": "\n".join(map(one_line, summary.outputs)),
        "documents": f"{summary.documents:,}" + (f", {summary.kept_empty:,} of them without a token" if summary.kept_empty else ""),
        "tokens": f"{summary.tokens:,} ({summary.dtype})",
        "tokens per document": f"5 %: {low:,}   50 %: {middle:,}   95 %: {high:,}   longest: {longest:,}",
        "read": f"{summary.bytes / 1e6:,.1f} MB in {format_duration(summary.seconds)}",
        "left out": plural(summary.bad_lines, "bad line")
        + (f" (listed in {summary.bad_lines_file})" if summary.bad_lines_file else "")
        + f", {plural(summary.empty, 'empty document')}, {summary.filtered:,} too short or too long, "
        + plural(summary.duplicates, "duplicate"),
        **({"first bad line": summary.first_bad_line} if summary.first_bad_line is not None else {}),
        **({"warning": summary.mostly_bad} if summary.mostly_bad is not None else {}),
        "vocabulary": f"{summary.vocab_size:,} ids"
        + (f", largest id in the text {summary.largest_id:,}" if summary.largest_id is not None else ""),
        "special tokens": ", ".join(
            f"{role} {token:,} {name!r}"
            for role, token, name in (
                ("end of document", summary.eod_id, summary.eod_token),
                ("beginning", summary.bos_id, summary.bos_token),
            )
            if token is not None
        )
        or "none",
        "encoded by": summary.encoder + (f"; {plural(summary.checked, 'document')} compared with it" if summary.checked else ""),
        **({"text not kept": "\n".join(summary.text_notes)} if summary.text_notes else {}),
        **({"resumed": f"after {summary.resumed_at / 1e6:,.1f} MB"} if summary.resumed_at else {}),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    make_console(width=120, stderr=True).print(table)
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
        bos_token=args.bos_token,
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
        keep_empty=args.keep_empty,
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
        notice=lambda text: print_line(text, stderr=True),
    )
    show_summary(summary)
