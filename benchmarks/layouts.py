#!/usr/bin/env python
"""Measures both stages of a run under parallel layouts: tokens/s, TFLOP/s, MFU.

    python benchmarks/layouts.py                                           one rank, and layouts of two
    python benchmarks/layouts.py --ranks 8 --layouts "TP8 SP" "TP4 SP PP2" "DP8 ZeRO3" --config my.yaml
    python benchmarks/layouts.py --ranks 1 --layouts DP1 "DP1 compiled"    eager and compiled blocks
    python benchmarks/layouts.py --profile                                 one rank under torch's profiler

Each layout is one run by the deepspeed launcher over random tokens, with data
loading and without checkpoints: a patch stage and a token stage with the same
positions per step. TFLOP/s and MFU are per rank. Results are medians over the
steps of a stage after its first three.

"gain / K": tokens/s of the patch stage over those of the token stage, divided
  by K; 1 means that a patch costs no more than a token.
"bubble": (p - 1) / (m + p - 1) for p pipeline ranks and m micro-batches, the
  smallest idle share of the pipeline.
"switch, s": excess time of the token stage's first step.
"planned": time of a patch step and of a token step by tools/plan.py, relative
  to the measured time. The plan uses the speed of products, attention and
  copies measured here, and its own table for links between GPUs. It has no
  figures for links between CPU ranks.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from _measure import Timer, print_table, write_results
from _training import ROOT, measured_hardware, planned_seconds, resolved, stage_flags, train
from training import SKIPPED_STEPS, Row

from megatron_patch.engine.environment import free_port
from megatron_patch.model.flops import peak_flops
from megatron_patch.planning.hardware import Hardware
from megatron_patch.training.callbacks.base import Callback, StepRecord
from megatron_patch.training.callbacks.metrics import read_metrics

LAYOUTS = ["DP2 ZeRO0", "DP2 ZeRO1", "DP2 ZeRO3", "TP2", "TP2 SP", "PP2"]
FLAGS = {
    "TP": "--tensor-model-parallel-size {}",
    "PP": "--pipeline-model-parallel-size {}",
    "SP": "--sequence-parallel",
    "ZeRO": "--zero-stage {}",
    "DP": "",
    "compiled": "--compile",
}


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() if cuda else 2, help="ranks (default: GPUs, else 2)")
    parser.add_argument("--layouts", nargs="+", default=None, help='layouts such as "TP4 SP PP2 ZeRO1"; DP takes the remaining ranks')
    parser.add_argument("--config", default=None, help="YAML file of the model, in place of --model")
    small = "--num-layers 6 --hidden-size 256 --num-attention-heads 4 --ffn-hidden-size 1024"
    large = "--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --ffn-hidden-size 5504 --bf16"
    parser.add_argument("--model", default=large if cuda else small, help="flags of the model (default: one whose blocks dominate)")
    parser.add_argument("--seq-length", type=int, default=2048 if cuda else 128, help="positions per sample")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="samples per micro-batch (default: 4)")
    parser.add_argument("--micro-batches", type=int, default=8, help="micro-batches per step and rank (default: 8)")
    parser.add_argument("--patch-size", type=int, default=4, help="K (default: 4)")
    parser.add_argument("--steps", type=int, default=12, help="steps of each stage (default: 12)")
    parser.add_argument("--vocab-size", type=int, default=32_000 if cuda else 1024, help="vocabulary")
    parser.add_argument("--flags", default="", help="further flags of pretrain_gpt_patch.py, for every layout")
    parser.add_argument("--profile", action="store_true", help="profile one rank: print operators by time and write a trace for each stage")
    return parser.parse_args()


def layout_flags(layout: str) -> list[str]:
    """Returns the flags of a layout such as "TP2 SP PP2 ZeRO1".

    Raises:
        SystemExit: a part of the layout is unknown.
    """
    flags = []
    for part in layout.split():
        name, number = re.fullmatch(r"([A-Za-z]+?)(\d*)", part).groups()  # type: ignore[union-attr]
        if name not in FLAGS:
            raise SystemExit(f"--layouts {layout!r}: {part} is unknown; allowed: {', '.join(FLAGS)}, TP, PP, ZeRO and DP with a number")
        flags += FLAGS[name].format(number).split()
    return flags


def plan_flags(args: argparse.Namespace, data_parallel: int, folder: Path) -> list[str]:
    """Writes random data and returns the flags of the run; both stages have the same positions per step."""
    samples = args.micro_batch_size * args.micro_batches * data_parallel
    model = ["--config", args.config] if args.config else args.model.split()
    stages = stage_flags(folder / "x", args.vocab_size, (args.patch_size, 1), args.steps, samples, args.seq_length)
    return [*model, *stages, "--micro-batch-size", str(args.micro_batch_size), *args.flags.split()]


def this_machine(args: argparse.Namespace) -> Hardware:
    """Measures this machine's device; links come from the plan's table."""
    timer = Timer(torch.device("cuda" if torch.cuda.is_available() else "cpu"), 7)
    with tempfile.TemporaryDirectory() as folder:
        return measured_hardware(timer, *resolved(plan_flags(args, 1, Path(folder))))[0]


def measure(args: argparse.Namespace, layout: str, ranks: int, device: Hardware) -> Row:
    """Runs one layout and returns its results by stage."""
    flags = layout_flags(layout)
    sizes = dict(re.findall(r"(TP|PP)(\d+)", layout))
    pipeline = int(sizes.get("PP", 1))
    data_parallel = ranks // (int(sizes.get("TP", 1)) * pipeline)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(free_port())]
        flags = [*plan_flags(args, data_parallel, folder), *flags]
        command = [*launcher, str(ROOT / "benchmarks" / "_metrics_run.py"), *flags]
        environment["METRICS"] = str(folder / "metrics.jsonl")
        planned = planned_seconds(*resolved(flags, ranks), device) if ranks == 1 or torch.cuda.is_available() else {}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
        records = list(read_metrics(folder / "metrics.jsonl"))
    row: Row = {"layout": layout or "one rank", "ranks": ranks, "bubble": (pipeline - 1) / (args.micro_batches + pipeline - 1)}
    for stage in ("patch", "token"):
        steps = [record for record in records if record["type"] == "step" and record["stage"] == stage][SKIPPED_STEPS:]
        seconds = statistics.median(record["step_seconds"] for record in steps)
        tokens = (steps[-1]["tokens"] - steps[0]["tokens"]) / (len(steps) - 1)
        positions = tokens / steps[-1]["patch_size"]
        row[stage] = {
            "tokens_per_second": tokens / seconds,
            "positions_per_second": positions / seconds,
            "tflops": positions / seconds * records[0]["token_flops"] / 1e12 / ranks,
            "data_share": statistics.median(record["data_seconds"] for record in steps) / seconds,
            "memory_gib": steps[-1]["memory_gib"],
            "step_seconds": seconds,
            "planned_seconds": planned.get(stage),
        }
    token_steps = [record["step_seconds"] for record in records if record["type"] == "step" and record["stage"] == "token"]
    row["switch_seconds"] = token_steps[0] - statistics.median(token_steps)
    row["of_k"] = row["patch"]["tokens_per_second"] / row["token"]["tokens_per_second"] / args.patch_size
    return row


def profile(args: argparse.Namespace) -> None:
    """Profiles two steps of each stage."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]

    class Window(Callback):
        """Starts the profiler after the first steps of a stage and stops it two steps later."""

        def __init__(self) -> None:
            self.seen: dict[str, int] = {}
            self.profiler: torch.profiler.profile | None = None

        def on_step(self, record: StepRecord) -> None:
            """Counts the steps of the stage."""
            count = self.seen[record.stage] = self.seen.get(record.stage, 0) + 1
            if count == SKIPPED_STEPS:
                self.profiler = torch.profiler.profile(activities=activities)
                self.profiler.start()
            if count == SKIPPED_STEPS + 2 and self.profiler is not None:
                self.profiler.stop()
                order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
                print(f"\n{record.stage}, two steps\n{self.profiler.key_averages().table(sort_by=order, row_limit=25)}")
                trace = f"trace-{record.stage}.json"
                self.profiler.export_chrome_trace(trace)
                print(f"wrote {trace}; open it in https://ui.perfetto.dev")

    with tempfile.TemporaryDirectory() as folder:
        train(*resolved(plan_flags(args, 1, Path(folder))), lambda trainer: [Window()])


def main() -> None:
    """Measures and prints."""
    args = parse()
    if args.profile:
        profile(args)
        return
    here = this_machine(args)
    rows = [] if args.layouts else [measure(args, "", 1, here)]
    rows += [
        measure(args, layout, args.ranks, here) for layout in args.layouts or (LAYOUTS if args.ranks == 2 else [f"DP{args.ranks} ZeRO1"])
    ]
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    lines = []
    for row in rows:
        rates = [f"{row['patch'][name]:,.0f}" for name in ("tokens_per_second", "positions_per_second")]
        rates.append(f"{row['token']['tokens_per_second']:,.0f}")
        flops = [f"{row[stage]['tflops']:.3g}" for stage in ("patch", "token")]
        mfu = [f"{row[stage]['tflops'] * 1e12 / peak:.1%}" if peak else "-" for stage in ("patch", "token")]
        planned = [
            f"{row[stage]['planned_seconds'] / row[stage]['step_seconds']:.2f}" if row[stage]["planned_seconds"] else "-"
            for stage in ("patch", "token")
        ]
        lines.append(
            [
                row["layout"],
                str(row["ranks"]),
                *rates,
                f"{row['of_k']:.2f}",
                *flops,
                *mfu,
                ", ".join(planned),
                f"{row['bubble']:.0%}",
                f"{row['switch_seconds']:.2f}",
            ]
        )
    title = f"Stages, K = {args.patch_size} and 1, T = {args.seq_length}, {args.micro_batches} micro-batches of {args.micro_batch_size}"
    heads = [
        "layout",
        "ranks",
        "patch tokens/s",
        "positions/s",
        "token tokens/s",
        "gain / K",
        "patch TFLOP/s",
        "token TFLOP/s",
        "patch MFU",
        "token MFU",
        "planned",
    ]
    print_table(title, [*heads, "bubble", "switch, s"], lines)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_results("layouts", device, {"settings": vars(args), "hardware": dataclasses.asdict(here), "rows": rows})


if __name__ == "__main__":
    main()
