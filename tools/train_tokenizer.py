#!/usr/bin/env python
"""Trains a byte-level BPE tokenizer on text: python tools/train_tokenizer.py --input corpus.jsonl --vocab-size 8192 --output tokenizer"""

from __future__ import annotations

import sys

import package_check  # noqa: F401 - before the package itself

from megatron_patch.cli.command_line import ArgumentParser, run_tool
from megatron_patch.preprocess.train_tokenizer import train_tokenizer
from megatron_patch.utils.units import parse_count


def main(argv: list[str]) -> None:
    """Runs the tool."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="files, globs in quotes, or - for standard input")
    parser.add_argument("--vocab-size", required=True, help="ids, with 256 bytes and the end-of-document token")
    parser.add_argument("--output", required=True, help="a folder")
    parser.add_argument("--json-key", default="text", help="key of the text")
    parser.add_argument("--max-bytes", default="200M", help="how much text to read")
    args = parser.parse_args(argv)
    path = train_tokenizer(args.input, args.output, parse_count(args.vocab_size), args.json_key, parse_count(args.max_bytes))
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(run_tool(main))
