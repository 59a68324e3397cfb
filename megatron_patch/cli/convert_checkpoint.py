"""The command line of the conversions: what tools/convert_checkpoint.py runs, and scripts that register further architectures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from megatron_patch.cli.command_line import ArgumentParser
from megatron_patch.convert.checkpoint_io import open_checkpoint
from megatron_patch.convert.flags import training_flags
from megatron_patch.convert.from_hugging_face import ImportResult, from_hugging_face
from megatron_patch.convert.from_megatron import from_megatron
from megatron_patch.convert.to_hugging_face import default_dtype, to_hugging_face
from megatron_patch.convert.tokenizer_files import tokenizer_of
from megatron_patch.convert.verify import differing_texts, positions_to_verify, tokens_to_verify, verify_export
from megatron_patch.errors import ConfigError
from megatron_patch.model.precision import DTYPES
from megatron_patch.utils.console import print_line
from megatron_patch.utils.units import parse_count

_DESCRIPTION = """\
Converts checkpoints to and from other formats.

python tools/convert_checkpoint.py to-hf --load CKPT --output DIR [--verify]
python tools/convert_checkpoint.py from-hf --input DIR --output CKPT
python tools/convert_checkpoint.py from-megatron --input DIR --output CKPT
"""


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=_DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("to-hf", help="export a checkpoint as a Hugging Face folder for transformers, vLLM and others")
    export.add_argument("--load", required=True, help="a run's folder, or one of its step-N folders")
    export.add_argument("--output", required=True, help="a new folder")
    export.add_argument("--max-shard-size", default="5GB", help="largest size of one file of weights; 5GB by default")
    export.add_argument("--dtype", choices=list(DTYPES), help="dtype of the exported weights; by default the run's precision")
    export.add_argument(
        "--verify", action="store_true", help="load the export with transformers and compare its logits with the checkpoint's"
    )
    export.add_argument("--tokenizer-type", help="type of the tokenizer; by default the one in the training data's metadata file")
    export.add_argument("--tokenizer-model", help="the tokenizer's file or folder, if it has moved")
    export.add_argument("--verify-data", help="dataset prefix whose tokens --verify reads; by default the run's training data")
    back = commands.add_parser(
        "from-hf", help="import a Hugging Face folder, or weights merged by zero_to_fp32.py, for --load with --finetune"
    )
    back.add_argument("--input", required=True, help="a folder, or one file of weights")
    back.add_argument("--output", required=True, help="a new folder")
    back.add_argument("--config", help="the model's config.json, if it is not in the folder")
    back.add_argument("--like", help="a checkpoint of the same shape, in place of a config.json")
    back.add_argument(
        "--make-vocab-size-divisible-by", type=int, default=128, help="as in the run that will train the model; 128 by default"
    )
    classic = commands.add_parser("from-megatron", help="import Megatron-LM's classic layout (mp_rank_00/model_optim_rng.pt)")
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
    done = to_hugging_face(checkpoint, Path(args.output), size, dtype, on_file=lambda text: print_line(text, stderr=True))
    result = {**asdict(done), "folder": str(done.folder), "checkpoint": str(checkpoint.found.folder), "step": checkpoint.found.state.step}
    if not done.tokenizer:
        print_line(
            "No tokenizer was exported: the checkpoint names none, or its files are not on this machine. "
            "Give --tokenizer-model, or copy its files into the folder.",
            stderr=True,
        )
    if ids is not None:
        result["verified"] = asdict(verify_export(checkpoint, done.folder, ids, DTYPES[dtype]))
        tokenizer = tokenizer_of(checkpoint.data_metadata)
        if tokenizer is not None:
            result["tokenizer_differs_on"] = differing_texts(done.folder, tokenizer)
            for text in result["tokenizer_differs_on"]:
                print_line(
                    f"The exported tokenizer in transformers and the training data's tokenizer give different ids for {text!r}",
                    stderr=True,
                )
    print(json.dumps(result))


def _import(args: argparse.Namespace) -> None:
    if args.make_vocab_size_divisible_by < 1:
        raise ConfigError(f"--make-vocab-size-divisible-by {args.make_vocab_size_divisible_by}", "whole numbers from 1", "give another")
    if args.config and args.like:
        raise ConfigError("both --config and --like are given", "one of them", "remove one")
    like = open_checkpoint(args.like) if args.like else None
    done = from_hugging_face(
        Path(args.input),
        Path(args.output),
        Path(args.config) if args.config else None,
        like.shape if like else None,
        args.make_vocab_size_divisible_by,
        like.family if like else None,
    )
    _report(done, args.output)


def _import_classic(args: argparse.Namespace) -> None:
    _report(from_megatron(Path(args.input), Path(args.output)), args.output)


def _report(done: ImportResult, output: str) -> None:
    """Prints the flags to train on with, and the result as one line of JSON."""
    flags = training_flags(done.shape, done.family)
    if flags is None:
        print_line(
            "No combination of training flags gives this shape (biases only in the attention layers). The checkpoint can be "
            "evaluated, exported and used for generation.",
            stderr=True,
        )
    else:
        print_line(f"Train on with: --load {output} --finetune --save FOLDER {' '.join(flags)}", stderr=True)
    if done.tokenizer_problem is not None:
        print_line(
            f"The tokenizer was not imported: {done.tokenizer_problem}. Repair or remove its files, and import again.",
            stderr=True,
        )
    tokenizer = str(done.tokenizer) if done.tokenizer else None
    print(
        json.dumps(
            {
                "folder": str(done.folder),
                "tensors": done.tensors,
                "tokenizer": tokenizer,
                "tokenizer_type": done.tokenizer_type,
                "tokenizer_problem": done.tokenizer_problem,
                "flags": flags,
            }
        )
    )


def main(argv: Sequence[str]) -> None:
    """Runs a conversion.

    Args:
        argv: the command and its flags, as `to-hf --load CKPT --output DIR`.

    Raises:
        MegatronPatchError: flags, files or a model that cannot be converted.
    """
    args = _parser().parse_args(list(argv))
    {"to-hf": _export, "from-hf": _import, "from-megatron": _import_classic}[args.command](args)
