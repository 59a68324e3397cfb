r"""Trains a byte-level BPE tokenizer on text.

python tools/train_tokenizer.py --input corpus.jsonl --vocab-size 8192 \
    --output tokenizer
"""

from __future__ import annotations

from megatron_patch.cli.command_line import ArgumentParser
from megatron_patch.preprocess.train_tokenizer import train_tokenizer
from megatron_patch.utils.console import print_line
from megatron_patch.utils.units import parse_count


def main(argv: list[str]) -> None:
    """Runs the tool."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="files, globs in quotes, or - for standard input")
    parser.add_argument("--vocab-size", required=True, help="number of ids, including the 256 bytes and the end-of-document token")
    parser.add_argument("--output", required=True, help="folder to write tokenizer.json and tokenizer_config.json to")
    parser.add_argument("--json-key", default="text", help="JSON key of the text, with dots for nested keys")
    parser.add_argument("--max-bytes", default="200M", help="bytes of text to read at most")
    args = parser.parse_args(argv)
    path = train_tokenizer(
        args.input,
        args.output,
        parse_count(args.vocab_size),
        args.json_key,
        parse_count(args.max_bytes),
        notice=lambda text: print_line(text, stderr=True),
    )
    print_line(f"wrote {path}")
