#!/usr/bin/env python
"""Continues a text with a checkpoint: python tools/generate.py --load CKPT --prompt "def main(" --max-new-tokens 100"""

from __future__ import annotations

import json
import sys

import torch

from megatron_patch.command_line import ArgumentParser, run_tool
from megatron_patch.engine.inference import default_device, load_model
from megatron_patch.errors import ConfigError
from megatron_patch.model.generate import generate
from megatron_patch.tokenizer import encode, load_tokenizer


def main(argv: list[str]) -> None:
    """Runs the tool."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--load", required=True, help="a run's folder, or one of its step-N folders")
    parser.add_argument("--prompt", action="append", help="may be given several times; without it the model starts from an end of document")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--tokenizer-type", help="by default what the training data's side file said")
    parser.add_argument("--tokenizer-model")
    parser.add_argument("--json", action="store_true", help="one JSON line a prompt")
    args = parser.parse_args(argv)
    device = default_device()
    loaded = load_model(args.load, device)
    info = loaded.data_info or {}
    kind, model = args.tokenizer_type or info.get("tokenizer_type"), args.tokenizer_model or info.get("tokenizer_model")
    if kind is None:
        raise ConfigError("the checkpoint does not know its tokenizer", "--tokenizer-type and --tokenizer-model", "give them")
    tokenizer = load_tokenizer(kind, model)
    if tokenizer.vocab_size > loaded.model.shape.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {loaded.model.shape.vocab_size}", "the tokenizer of the training data"
        )
    for prompt in args.prompt or [""]:
        ids = encode(tokenizer, prompt) or ([tokenizer.eod_id] if tokenizer.eod_id is not None else [])
        out = generate(
            loaded.model,
            torch.tensor([ids], dtype=torch.int64, device=device),
            args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            eod_id=tokenizer.eod_id,
            seed=args.seed,
        )
        new = out[0, len(ids) :].tolist()
        text = tokenizer.decode(new[:-1] if new and new[-1] == tokenizer.eod_id else new)
        print(json.dumps({"prompt": prompt, "text": text, "tokens": len(new)}) if args.json else prompt + text)


if __name__ == "__main__":
    sys.exit(run_tool(main))
