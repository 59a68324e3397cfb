#!/usr/bin/env python
"""Continues texts with a checkpoint.

python tools/generate.py --load CKPT --prompt "def main(" --max-new-tokens 100 [--interactive]
deepspeed tools/generate.py --tensor-model-parallel-size 8 …                 on several GPUs, whatever layout wrote the checkpoint
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import package_check  # noqa: F401 - before the package itself
import torch

from megatron_patch.cli.command_line import ArgumentParser, add_layout, count, count_from_one, run_tool
from megatron_patch.engine.distributed import broadcast_object
from megatron_patch.engine.environment import ranks_from_environment
from megatron_patch.engine.inference import LoadedModel, open_model
from megatron_patch.errors import ConfigError
from megatron_patch.model.generate import Sampling, generate
from megatron_patch.model.inference_model import InferenceModel
from megatron_patch.tokenizers.base import Tokenizer, encode, tokenizer_of_checkpoint


def main(argv: list[str]) -> None:
    """Runs the tool."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, help="a run's folder, or one of its step-N folders")
    parser.add_argument("--prompt", action="append", help="may be given several times; without it the model starts from an end of document")
    parser.add_argument("--interactive", action="store_true", help="read a prompt a line and answer each, to the end of the input")
    parser.add_argument("--max-new-tokens", type=count_from_one, default=128)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.95, help="draw from the smallest set of tokens with this mass")
    parser.add_argument("--top-k", type=count, default=0, help="draw from so many likeliest tokens; 0: from all")
    parser.add_argument("--seed", type=int, default=1234, help="of the draws; each prompt of a batch has its own")
    parser.add_argument("--micro-batch-size", type=count_from_one, default=16, help="prompts continued together")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--tokenizer-type", help="by default what the training data's side file said")
    parser.add_argument("--tokenizer-model")
    parser.add_argument("--json", action="store_true", help="one JSON line a prompt")
    add_layout(parser)
    args = parser.parse_args(argv)
    sampling = Sampling(args.temperature, args.top_p, args.top_k, args.seed)
    sampling.check()
    if args.interactive and args.prompt:
        raise ConfigError("--interactive and --prompt", "one of them", "remove one")
    _check_ranks(args)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    with open_model(args.load, dtype, args.tensor_model_parallel_size, args.pipeline_model_parallel_size) as loaded:
        vocab_size = loaded.model.shape.vocab_size
        tokenizer = tokenizer_of_checkpoint(loaded.data_metadata or {}, args.tokenizer_type, args.tokenizer_model, vocab_size)
        (_converse if args.interactive else _continue)(loaded, tokenizer, sampling, args)


def _check_ranks(args: argparse.Namespace) -> None:
    """One copy of the model: there is nothing to share out."""
    _, size, _ = ranks_from_environment()
    needed = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    if size != needed:
        raise ConfigError(
            f"{size} ranks for --tensor-model-parallel-size {args.tensor_model_parallel_size} "
            f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size}",
            f"as many ranks as their product, {needed}",
            "start as many with deepspeed --num_gpus, or change the sizes",
        )


def _is_first() -> bool:
    return ranks_from_environment()[0] == 0


def _continue(loaded: LoadedModel[InferenceModel], tokenizer: Tokenizer, sampling: Sampling, args: argparse.Namespace) -> None:
    """Prints a continuation of each prompt."""
    prompts = args.prompt or [""]
    for start in range(0, len(prompts), args.micro_batch_size):
        batch = prompts[start : start + args.micro_batch_size]
        ids = [_start(tokenizer, prompt) for prompt in batch]
        for prompt, new in zip(batch, generate(loaded.model, ids, args.max_new_tokens, sampling, tokenizer.eod_id), strict=True):
            text = tokenizer.decode(_text_ids(tokenizer, new))
            if _is_first():
                print(json.dumps({"prompt": prompt, "text": text, "tokens": len(new)}) if args.json else prompt + text)


def _start(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt's ids; where it is empty, the end of the document before."""
    return encode(tokenizer, prompt) or ([tokenizer.eod_id] if tokenizer.eod_id is not None else [])


def _text_ids(tokenizer: Tokenizer, ids: Sequence[int]) -> Sequence[int]:
    return ids[:-1] if ids and ids[-1] == tokenizer.eod_id else ids


def _converse(loaded: LoadedModel[InferenceModel], tokenizer: Tokenizer, sampling: Sampling, args: argparse.Namespace) -> None:
    """Answers each line of the input, token by token as they come."""
    while True:
        if _is_first() and sys.stdin.isatty():
            print("> ", end="", flush=True)
        # Whoever has the terminal tells the other ranks what is asked.
        line = str(broadcast_object(sys.stdin.readline() if _is_first() else None))
        if not line:
            return
        _answer(loaded, tokenizer, sampling, args.max_new_tokens, line.rstrip("\n"))


def _answer(loaded: LoadedModel[InferenceModel], tokenizer: Tokenizer, sampling: Sampling, new_tokens: int, prompt: str) -> None:
    """Prints one continuation while it grows."""
    new: list[int] = []
    shown = ""

    def show(ids: list[int]) -> None:
        nonlocal shown
        new.append(ids[0])
        text = tokenizer.decode(_text_ids(tokenizer, new))
        # Bytes that are no whole character yet wait for the next token.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            if _is_first():
                print(text[len(shown) :], end="", flush=True)
            shown = text

    generate(loaded.model, [_start(tokenizer, prompt)], new_tokens, sampling, tokenizer.eod_id, show)
    if _is_first():
        print(tokenizer.decode(_text_ids(tokenizer, new))[len(shown) :], flush=True)


if __name__ == "__main__":
    sys.exit(run_tool(main))
