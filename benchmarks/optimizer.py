#!/usr/bin/env python
"""Measures the step of the optimizers on one rank.

    python benchmarks/optimizer.py          blocks of the 1.3B shape on a GPU,
                                            smaller ones on a CPU
    python benchmarks/optimizer.py --tiny   a tiny shape, on any machine

Peers step the same matrices: AdamW and Muon of this program, and torch's own
Muon, which always computes in bfloat16. So ours is measured in bfloat16, too,
and in float32. On one rank nothing is sent.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile

import torch
import torch.distributed as dist
from _measure import Timer, machine, print_table, record, write_results

from megatron_patch.config.options import ScheduleOptions
from megatron_patch.optimizers.adamw import make_adamw
from megatron_patch.optimizers.groups import HIDDEN
from megatron_patch.optimizers.muon import make_muon
from megatron_patch.optimizers.ownership import MatrixSpan, orthogonalization_flops


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, help="H (default: 2048 on a GPU, 512 on a CPU)")
    parser.add_argument("--ffn-hidden-size", type=int, help="width of the feed-forward layer (default: 8/3 H)")
    parser.add_argument("--blocks", type=int, default=4, help="number of blocks (default: 4)")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each peer (default: 7)")
    parser.add_argument("--tiny", action="store_true", help="use a tiny shape in place of all sizes above")
    args = parser.parse_args(argv)
    if args.tiny:
        args.hidden_size, args.ffn_hidden_size, args.blocks, args.rounds = 32, 64, 1, 3
    args.hidden_size = args.hidden_size or (2048 if torch.cuda.is_available() else 512)
    args.ffn_hidden_size = args.ffn_hidden_size or args.hidden_size * 8 // 3
    return args


def matrices(args: argparse.Namespace, device: torch.device) -> list[torch.Tensor]:
    """Returns the float32 matrices of all blocks, with gradients."""
    hidden, inner = args.hidden_size, args.ffn_hidden_size
    shapes = args.blocks * [*4 * [(hidden, hidden)], (inner, hidden), (inner, hidden), (hidden, inner)]
    weights = [torch.randn(shape, device=device) * 0.02 for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    return weights


def main(argv: list[str] | None = None) -> int:
    """Measures each optimizer."""
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = ScheduleOptions(optimizer="muon", lr=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(os.path.join(folder, "store"), 1)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
        steps = {}
        adamw = make_adamw([{"params": matrices(args, device), "weight_decay": 0.1}], options, offloaded=False)
        steps["AdamW"] = adamw.step
        for dtype in (torch.float32, torch.bfloat16):
            weights = matrices(args, device)
            groups = [
                {"params": weights, "weight_decay": 0.1, HIDDEN: True},
                {"params": [torch.zeros(1, device=device)], "weight_decay": 0.0},
            ]
            groups[1]["params"][0].grad = torch.zeros(1, device=device)
            muon = make_muon(groups, options, offloaded=False)
            spans = [MatrixSpan(f"blocks.{n}", tuple(w.shape), None, 0, w.numel(), n) for n, w in enumerate(weights)]
            muon.attach([(weights, spans)], None, device, dtype)
            steps[f"Muon, {str(dtype).removeprefix('torch.')}"] = muon.step
        weights = matrices(args, device)
        peer = torch.optim.Muon(weights, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        steps["torch.optim.Muon"] = peer.step
        times = Timer(device, args.rounds).medians(steps)
        dist.destroy_process_group()
    flops = sum(orthogonalization_flops(tuple(weight.shape)) for weight in weights)
    numel = sum(weight.numel() for weight in weights)
    rows, results = [], {}
    for name, seconds in times.items():
        rate = None if name == "AdamW" else flops / seconds / 1e12
        results[name] = {"seconds": seconds, "ratio_to_torch": seconds / times["torch.optim.Muon"], "tflop_per_second": rate}
        record("optimizer", optimizer=name, parameters=numel, hidden_size=args.hidden_size, **results[name])
        rows.append([name, f"{1e3 * seconds:.3g}", f"{results[name]['ratio_to_torch']:.2f}", "-" if rate is None else f"{rate:.3g}"])
    print_table(
        f"A step of {numel / 1e6:.3g}M parameters, H = {args.hidden_size}, on {device.type}",
        ["optimizer", "ms", "time / torch's Muon", "TFLOP/s of Newton-Schulz"],
        rows,
    )
    if not args.tiny:
        write_results(
            "optimizer", device, {"parameters": numel, "hidden_size": args.hidden_size, "optimizers": results}, info=machine(device)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
