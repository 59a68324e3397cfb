#!/usr/bin/env python
"""Measures training steps: patches and tokens, plain, fused and compiled.

    python benchmarks/training.py                one device, at the size of docs/performance.md
    python benchmarks/training.py --hidden 2048 --layers 24 --seq-length 2048 --micro-batch-size 2

Each variant is a separate run over random tokens without checkpoints. Results
are medians over the steps after the first three. The baseline is a minimal
token-level training loop over Hugging Face's Llama; "tokens / bare loop" is the
throughput in tokens/s relative to it. benchmarks/layouts.py measures both
stages of a run for a configuration and a layout.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import print_table, write_results
from _training import ROOT, write_corpus

from megatron_patch.engine.environment import free_port
from megatron_patch.model.flops import peak_flops
from megatron_patch.training.callbacks.metrics import read_metrics
from megatron_patch.training.throughput import memory_gib

SKIPPED_STEPS = 3
BARE = "bare loop, Hugging Face"
Row = dict[str, Any]


def parse() -> argparse.Namespace:
    """Reads the command line; the default sizes depend on whether there is a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu", help="device (default: cuda if there is a GPU)"
    )
    parser.add_argument("--layers", type=int, default=24 if cuda else 4, help="blocks")
    parser.add_argument("--hidden", type=int, default=1024 if cuda else 256, help="hidden size")
    parser.add_argument("--heads", type=int, default=16 if cuda else 4, help="attention heads")
    parser.add_argument("--ffn", type=int, default=2752 if cuda else 688, help="width of the feed-forward layers")
    parser.add_argument("--vocab", type=int, default=32_000 if cuda else 8192, help="vocabulary")
    parser.add_argument("--seq-length", type=int, default=2048 if cuda else 256, help="positions per sample")
    parser.add_argument("--micro-batch-size", type=int, default=8 if cuda else 4, help="samples per micro-batch")
    parser.add_argument("--steps", type=int, default=20 if cuda else 10, help="steps of each variant")
    parser.add_argument("--patch-sizes", type=int, nargs="+", default=[4], help="K of the patch variants (default: 4)")
    parser.add_argument("--bare-loop", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def model_flags(args: argparse.Namespace) -> list[str]:
    """Returns the flags of the model."""
    values = {"num-layers": args.layers, "hidden-size": args.hidden, "num-attention-heads": args.heads, "ffn-hidden-size": args.ffn}
    values |= {"vocab-size": args.vocab, "seq-length": args.seq_length, "micro-batch-size": args.micro_batch_size}
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def run_ours(args: argparse.Namespace, patch_size: int, *more: str) -> Row:
    """Runs the program at one patch size, with one micro-batch per step, and returns its results.

    Raises:
        RuntimeError: the run failed.
    """
    sample = args.micro_batch_size * args.seq_length * patch_size
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "x", args.vocab, sample * (args.steps + 2))
        command = [
            sys.executable,
            str(ROOT / "benchmarks" / "_metrics_run.py"),
            *model_flags(args),
            "--data-path",
            f"{folder}/x",
            "--split",
            "1,0,0",
        ]
        command += ["--stages", json.dumps([{"patch_size": patch_size}]), "--global-batch-tokens", str(sample)]
        command += ["--train-tokens", str(sample * args.steps), "--lr", "1e-4", "--log-interval", "1000"]
        command += ["--bf16"] if args.device == "cuda" else []
        settings = {**environment(args), "METRICS": f"{folder}/metrics.jsonl"}
        done = subprocess.run([*command, *more], env=settings, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        records = list(read_metrics(Path(folder) / "metrics.jsonl"))
    steps = [record for record in records if record["type"] == "step"][SKIPPED_STEPS:]
    seconds = statistics.median(record["step_seconds"] for record in steps)
    return {
        "tokens_per_second": sample / seconds,
        "positions_per_second": sample / patch_size / seconds,
        "tflops": sample / patch_size / seconds * records[0]["token_flops"] / 1e12,
        "memory_gib": steps[-1]["memory_gib"],
    }


def environment(args: argparse.Namespace) -> dict[str, str]:
    """Returns the environment of a single rank, as a launcher sets it."""
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        **({"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if args.device == "cpu" else {}),
    }


def bare_loop(args: argparse.Namespace) -> None:
    """Runs a minimal token-level training loop (Hugging Face's Llama, its loss, AdamW) and prints its results as JSON."""
    from transformers import LlamaConfig, LlamaForCausalLM

    device = torch.device(args.device)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=args.seq_length,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    times = []
    for _ in range(args.steps):
        ids = torch.randint(0, args.vocab, (args.micro_batch_size, args.seq_length), device=device)
        began = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    rate = args.micro_batch_size * args.seq_length / statistics.median(times[SKIPPED_STEPS:])
    memory = memory_gib(device)
    print(json.dumps({"tokens_per_second": rate, "positions_per_second": rate, "memory_gib": memory}))


def run_bare_loop(args: argparse.Namespace) -> Row:
    """Runs the bare loop in a separate process and returns its results.

    Raises:
        RuntimeError: the process failed.
    """
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--bare-loop"], env=environment(args), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-3000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    """Measures and prints; returns 1 if a variant failed."""
    args = parse()
    if args.bare_loop:
        bare_loop(args)
        return 0
    wanted: dict[str, Callable[[], Row]] = {BARE: lambda: run_bare_loop(args)}
    for patch_size in (1, *args.patch_sizes):
        kind = "tokens" if patch_size == 1 else f"patches of {patch_size}"
        for more, flags in ((", plain operators", ("--operators", "plain")), ("", ()), (", compiled", ("--compile",))):
            wanted[kind + more] = functools.partial(run_ours, args, patch_size, *flags)
    variants: dict[str, Row] = {}
    for name, work in wanted.items():
        try:
            variants[name] = work()
        except RuntimeError as error:
            print(f"{name} failed: {error}", file=sys.stderr, flush=True)
    peak = peak_flops(torch.cuda.get_device_name()) if args.device == "cuda" else None
    bare = variants[BARE]["tokens_per_second"] if BARE in variants else None
    lines = []
    for name, row in variants.items():
        row["tokens_over_bare_loop"] = row["tokens_per_second"] / bare if bare else None
        rates = [f"{row['tokens_per_second']:,.0f}", f"{row['positions_per_second']:,.0f}"]
        rates.append(f"{row['tokens_over_bare_loop']:.2f}" if bare else "-")
        if "tflops" in row:
            row["mfu"] = row["tflops"] * 1e12 / peak if peak else None
        mfu = f"{row['mfu']:.1%}" if row.get("mfu") else "-"
        lines.append([name, *rates, f"{row['tflops']:.3g}" if "tflops" in row else "-", mfu, f"{row['memory_gib']:.2f}"])
    title = f"Training steps, {args.layers} x {args.hidden}, T = {args.seq_length}, micro-batch {args.micro_batch_size}, {args.device}"
    print_table(title, ["variant", "tokens/s", "positions/s", "tokens / bare loop", "TFLOP/s", "MFU", "GiB"], lines)
    rows = [{"variant": name, **row} for name, row in variants.items()]
    settings = {name: value for name, value in vars(args).items() if name != "bare_loop"}
    write_results("training", torch.device(args.device), {"settings": settings, "rows": rows})
    return 0 if len(variants) == len(wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
