#!/usr/bin/env python
"""Evaluates a checkpoint on held-out tokens: python tools/evaluate.py --load CKPT --data-path PREFIX [--patch-size K]"""

from __future__ import annotations

import json
import math
import sys

import torch

from megatron_patch.command_line import ArgumentParser, run_tool
from megatron_patch.data.corpus import check_vocabulary, open_corpus
from megatron_patch.data.evaluation_data import evaluation_batches, held_out_starts
from megatron_patch.data.patch_dataset import DocumentMasking
from megatron_patch.engine.inference import default_device, load_model
from megatron_patch.errors import ConfigError, DataError
from megatron_patch.stages import LOOKAHEAD_TOKENS
from megatron_patch.units import parse_count


def main(argv: list[str]) -> None:
    """Runs the tool."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--load", required=True, help="a run's folder, or one of its step-N folders")
    parser.add_argument("--data-path", required=True, help="a dataset prefix")
    parser.add_argument("--patch-size", type=int, default=1, help="K; 1 is the token-level loss")
    parser.add_argument("--seq-length", type=int, help="positions; by default the run's")
    parser.add_argument("--eval-tokens", default="all", help="how many tokens to read")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--bf16", action="store_true", help="evaluate in bfloat16")
    args = parser.parse_args(argv)
    if args.patch_size < 1 or args.micro_batch_size < 1:
        raise ConfigError(f"--patch-size {args.patch_size} --micro-batch-size {args.micro_batch_size}", "whole numbers from 1")
    device = default_device()
    loaded = load_model(args.load, device, torch.bfloat16 if args.bf16 else torch.float32)
    positions = args.seq_length or int(loaded.options["seq_length"])
    if positions < 1 or (loaded.model.shape.position_embedding == "learned" and positions > loaded.model.shape.max_positions):
        raise ConfigError(f"--seq-length {positions}", f"1 to {loaded.model.shape.max_positions}, the model's learned positions")
    corpus = open_corpus(args.data_path)
    check_vocabulary(corpus, loaded.model.shape.vocab_size)
    unit = positions * args.patch_size
    tokens = corpus.num_tokens if args.eval_tokens == "all" else parse_count(args.eval_tokens)
    lookahead = min(LOOKAHEAD_TOKENS, args.patch_size)
    starts = held_out_starts((0, corpus.num_tokens), unit, lookahead, tokens)
    if len(starts) == 0:
        raise DataError(
            f"{args.data_path} has {corpus.num_tokens} tokens, less than one sample of {unit} and {lookahead} more",
            "at least one sample",
            "lower --seq-length or --patch-size",
        )
    totals = torch.zeros(2, dtype=torch.float64)
    masking = DocumentMasking()
    with torch.no_grad():
        size = loaded.model.shape.vocab_size
        for batch in evaluation_batches(corpus, starts, unit, positions, args.patch_size, args.micro_batch_size, 0, 1, masking, size):
            sums = loaded.model(batch.input_ids.to(device), batch.labels.to(device))
            totals += torch.stack([part.double().cpu() for part in sums])
    loss_sum, labels = totals.tolist()
    loss = loss_sum / labels
    name = "token_loss" if args.patch_size == 1 else "patch_loss"
    result = {
        "checkpoint": str(loaded.found.folder),
        "step": loaded.found.state.step,
        "data_path": args.data_path,
        "patch_size": args.patch_size,
        name: loss,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "tokens": int(labels),
        "seq_length": positions,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(run_tool(main))
