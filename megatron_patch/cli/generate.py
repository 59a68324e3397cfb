"""Generates continuations of prompts with a checkpoint.

python tools/generate.py --load CKPT --prompt "def main(" [--interactive]

On several GPUs, for a checkpoint of any layout:
deepspeed tools/generate.py --tensor-model-parallel-size 8 …
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

from megatron_patch.cli.command_line import ArgumentParser, add_layout, count, count_from_one
from megatron_patch.engine.distributed import broadcast_object
from megatron_patch.engine.environment import is_first_rank, ranks_from_environment
from megatron_patch.engine.inference import LoadedModel, open_model
from megatron_patch.errors import ConfigError
from megatron_patch.model.generate import Sampling, generate
from megatron_patch.model.inference_model import InferenceModel
from megatron_patch.tokenizers.base import Tokenizer, prompt_ids, tokenizer_of_checkpoint, without_eod
from megatron_patch.utils.console import for_terminal
from megatron_patch.utils.units import plural


def main(argv: list[str]) -> None:
    """Runs the tool."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--load", required=True, help="a run's folder, or one of its step-N folders")
    parser.add_argument("--prompt", action="append", help="a prompt; can be given several times; by default the start of a document")
    parser.add_argument("--interactive", action="store_true", help="read one prompt from each line of the input, and continue it")
    parser.add_argument("--max-new-tokens", type=count_from_one, default=128, help="largest number of tokens to generate; 128 by default")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="divisor of the logits; 0 chooses the most likely token; 0.8 by default"
    )
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="sample from the smallest set of tokens with this probability mass; 0.95 by default"
    )
    parser.add_argument("--top-k", type=count, default=0, help="sample from this number of most likely tokens; 0, the default, from all")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the sampling; prompt i of a batch uses SEED + i")
    parser.add_argument("--micro-batch-size", type=count_from_one, default=16, help="number of prompts continued together; 16 by default")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--tokenizer-type", help="type of the tokenizer; by default the one in the training data's metadata file")
    parser.add_argument("--tokenizer-model", help="the tokenizer's file or folder, if it has moved")
    parser.add_argument("--json", action="store_true", help="print one JSON line for each prompt")
    add_layout(parser)
    args = parser.parse_args(argv)
    sampling = Sampling(args.temperature, args.top_p, args.top_k, args.seed)
    sampling.check()
    if args.interactive and args.prompt:
        raise ConfigError("both --interactive and --prompt are given", "one of them", "remove one")
    _check_ranks(args)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    with open_model(args.load, dtype, args.tensor_model_parallel_size, args.pipeline_model_parallel_size) as loaded:
        vocab_size = loaded.model.shape.vocab_size
        tokenizer = tokenizer_of_checkpoint(loaded.data_metadata or {}, args.tokenizer_type, args.tokenizer_model, vocab_size)
        (_interact if args.interactive else _continue)(loaded, tokenizer, sampling, args)


def _check_ranks(args: argparse.Namespace) -> None:
    """Checks that the ranks hold exactly one replica of the model, because generation does not split the prompts."""
    _, size, _ = ranks_from_environment()
    needed = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    if size != needed:
        raise ConfigError(
            f"{plural(size, 'rank')} for --tensor-model-parallel-size {args.tensor_model_parallel_size} "
            f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size}",
            f"the product of the two sizes, {plural(needed, 'rank')}",
            f"start {needed} with deepspeed --num_gpus, or change the sizes",
        )


def _continue(loaded: LoadedModel[InferenceModel], tokenizer: Tokenizer, sampling: Sampling, args: argparse.Namespace) -> None:
    """Prints the continuation of each prompt."""
    prompts = args.prompt or [""]
    for start in range(0, len(prompts), args.micro_batch_size):
        batch = prompts[start : start + args.micro_batch_size]
        ids = [prompt_ids(tokenizer, prompt) for prompt in batch]
        for prompt, new in zip(batch, generate(loaded.model, ids, args.max_new_tokens, sampling, tokenizer.eod_id), strict=True):
            text = tokenizer.decode(without_eod(tokenizer, new))
            if is_first_rank():
                print(json.dumps({"prompt": prompt, "text": text, "tokens": len(new)}) if args.json else for_terminal(prompt + text))


def _interact(loaded: LoadedModel[InferenceModel], tokenizer: Tokenizer, sampling: Sampling, args: argparse.Namespace) -> None:
    """Continues each line of the input, printing tokens as they are generated."""
    while True:
        if is_first_rank() and sys.stdin.isatty():
            print("> ", end="", flush=True)
        # Rank 0 reads the terminal and broadcasts the prompt.
        line = str(broadcast_object(sys.stdin.readline() if is_first_rank() else None))
        if not line:
            return
        _continue_line(loaded, tokenizer, sampling, args.max_new_tokens, line.rstrip("\n"))


def _continue_line(loaded: LoadedModel[InferenceModel], tokenizer: Tokenizer, sampling: Sampling, new_tokens: int, prompt: str) -> None:
    """Prints one continuation while it is generated."""
    new: list[int] = []
    shown = ""

    def show(ids: list[int]) -> None:
        nonlocal shown
        new.append(ids[0])
        text = tokenizer.decode(without_eod(tokenizer, new))
        # Bytes that do not form a complete character yet are printed with the next token.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            if is_first_rank():
                print(for_terminal(text[len(shown) :]), end="", flush=True)
            shown = text

    generate(loaded.model, [prompt_ids(tokenizer, prompt)], new_tokens, sampling, tokenizer.eod_id, show)
    if is_first_rank():
        print(for_terminal(tokenizer.decode(without_eod(tokenizer, new))[len(shown) :]), flush=True)
