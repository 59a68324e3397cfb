#!/usr/bin/env python
"""Checkpoints out and in.

python tools/convert_checkpoint.py to-hf --load CKPT --output DIR [--verify]
python tools/convert_checkpoint.py from-hf --input DIR --output CKPT
python tools/convert_checkpoint.py from-megatron --input DIR --output CKPT
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import package_check  # noqa: F401 - before the package itself

from megatron_patch.cli.command_line import ArgumentParser, run_tool
from megatron_patch.convert.checkpoint_io import open_checkpoint
from megatron_patch.convert.flags import flags_of
from megatron_patch.convert.from_hugging_face import Import, from_hugging_face
from megatron_patch.convert.from_megatron import from_megatron
from megatron_patch.convert.to_hugging_face import default_dtype, to_hugging_face
from megatron_patch.convert.tokenizer_files import tokenizer_of
from megatron_patch.convert.verify import differing_texts, positions_to_verify, tokens_to_verify, verify_export
from megatron_patch.errors import ConfigError
from megatron_patch.model.precision import DTYPES
from megatron_patch.utils.units import parse_count


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("to-hf", help="a checkpoint as a folder for transformers, vLLM and others")
    export.add_argument("--load", required=True, help="a run's folder, or one of its step-N folders")
    export.add_argument("--output", required=True, help="a new folder")
    export.add_argument("--max-shard-size", default="5GB", help="size of a file of weights")
    export.add_argument("--dtype", choices=list(DTYPES), help="by default what the run computed in")
    export.add_argument("--verify", action="store_true", help="compare the logits of transformers and of the checkpoint afterwards")
    export.add_argument("--tokenizer-type", help="by default what the training data's side file said")
    export.add_argument("--tokenizer-model", help="its file or folder, where it is not where it was")
    export.add_argument("--verify-data", help="dataset prefix with the tokens for --verify; by default the run's data")
    back = commands.add_parser("from-hf", help="a Hugging Face folder, or weights by zero_to_fp32.py, as a checkpoint for --finetune")
    back.add_argument("--input", required=True, help="a folder, or a file of weights")
    back.add_argument("--output", required=True, help="a new folder")
    back.add_argument("--config", help="config.json, where it is not in the folder")
    back.add_argument("--like", help="a checkpoint of the same shape, instead of a config.json")
    back.add_argument("--make-vocab-size-divisible-by", type=int, default=128, help="as in the run that will use it")
    classic = commands.add_parser("from-megatron", help="Megatron-LM's classic layout (mp_rank_00/model_optim_rng.pt)")
    classic.add_argument("--input", required=True, help="the run's folder, or one of its iterations")
    classic.add_argument("--output", required=True, help="a new folder")
    return parser


def _export(args: argparse.Namespace) -> None:

    text = args.max_shard_size.strip()
    size = parse_count(text[:-1] if text[-1:] in "bB" and text[-2:-1].isalpha() else text)
    checkpoint = open_checkpoint(args.load)
    given = {name: getattr(args, name) for name in ("tokenizer_type", "tokenizer_model") if getattr(args, name)}
    if given:
        checkpoint = replace(checkpoint, tokenizer=given)
    dtype = args.dtype or default_dtype(checkpoint)
    ids = tokens_to_verify(checkpoint, args.verify_data, positions_to_verify(checkpoint.shape)) if args.verify else None
    done = to_hugging_face(checkpoint, Path(args.output), size, dtype, tell=lambda text: print(text, file=sys.stderr))
    result = {**asdict(done), "folder": str(done.folder), "checkpoint": str(checkpoint.found.folder), "step": checkpoint.found.state.step}
    if not done.tokenizer:
        print("no tokenizer files: none is known, or it is not on this machine; give --tokenizer-model, or copy them", file=sys.stderr)
    if ids is not None:
        result["verified"] = asdict(verify_export(checkpoint, done.folder, ids, DTYPES[dtype]))
        tokenizer = tokenizer_of(checkpoint.data_metadata)
        if tokenizer is not None:
            result["tokenizer_differs_on"] = differing_texts(done.folder, tokenizer)
            for text in result["tokenizer_differs_on"]:
                print(f"transformers makes other ids than the training data's tokenizer of {text!r}", file=sys.stderr)
    print(json.dumps(result))


def _import(args: argparse.Namespace) -> None:

    if args.make_vocab_size_divisible_by < 1:
        raise ConfigError(f"--make-vocab-size-divisible-by {args.make_vocab_size_divisible_by}", "whole numbers from 1")
    if args.config and args.like:
        raise ConfigError("--config and --like", "one of them", "remove one")
    shape = open_checkpoint(args.like).shape if args.like else None
    config = Path(args.config) if args.config else None
    done = from_hugging_face(Path(args.input), Path(args.output), config, shape, args.make_vocab_size_divisible_by)
    _report(done, args.output)


def _import_classic(args: argparse.Namespace) -> None:

    _report(from_megatron(Path(args.input), Path(args.output)), args.output)


def _report(done: Import, output: str) -> None:
    """Says how to train on, and what was made as JSON."""
    flags = flags_of(done.shape)
    if flags is None:
        print("no flags of the program make this shape (biases in the attention alone): evaluate, generate, export", file=sys.stderr)
    else:
        print(f"train on with: --load {output} --finetune --save FOLDER {' '.join(flags)}", file=sys.stderr)
    tokenizer = str(done.tokenizer) if done.tokenizer else None
    print(
        json.dumps(
            {
                "folder": str(done.folder),
                "tensors": done.tensors,
                "tokenizer": tokenizer,
                "tokenizer_type": done.tokenizer_type,
                "flags": flags,
            }
        )
    )


def main(argv: list[str]) -> None:
    """Runs the tool."""
    args = _parser().parse_args(argv)
    {"to-hf": _export, "from-hf": _import, "from-megatron": _import_classic}[args.command](args)


if __name__ == "__main__":
    sys.exit(run_tool(main))
