#!/usr/bin/env python
"""Measures how long training waits for synchronous and asynchronous checkpoints.

python benchmarks/saving.py [--hidden 512] [--steps 16]

Trains a model of about 50 million parameters in both modes and reads the
metrics of the runs: the stall, the duration of a save, and the time of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _measure as measure
import numpy as np
import torch

from megatron_patch.data.indexed_dataset_writer import IndexedDatasetWriter

ROOT = Path(__file__).parent.parent


def make_corpus(prefix: Path) -> str:
    """Writes random tokens, enough for any run here, and returns the prefix."""
    with IndexedDatasetWriter(str(prefix), np.dtype(np.uint16)) as writer:
        tokens = np.random.default_rng(0).integers(0, 32000, 2_000_000).astype(np.uint16)
        writer.append(tokens, np.full(2000, 1000))
        writer.finish()
    return str(prefix)


def run(folder: Path, corpus: str, args: argparse.Namespace, flags: list[str]) -> list[dict[str, Any]]:
    """Trains one run and returns its metrics records.

    Raises:
        SystemExit: the run failed.
    """
    hidden = args.hidden
    tokens = args.steps * 2 * 32
    model = f"""--num-layers {args.layers} --hidden-size {hidden} --num-attention-heads 8 --ffn-hidden-size {hidden * 8 // 3 // 64 * 64}
        --vocab-size 32000 --seq-length 32 --micro-batch-size 2 --global-batch-size 2 --train-tokens {tokens} --split 100,0,0 --lr 1e-4
        --save-interval {args.interval} --keep-last 1 --log-interval 1000 --zero-stage 1""".split()
    command = [sys.executable, str(ROOT / "pretrain_gpt_patch.py"), *model, "--data-path", corpus, "--save", str(folder), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    """Measures and prints a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="hidden size (default: 512)")
    parser.add_argument("--layers", type=int, default=6, help="blocks (default: 6)")
    parser.add_argument("--steps", type=int, default=16, help="steps per run (default: 16)")
    parser.add_argument("--interval", type=int, default=8, help="steps between checkpoints (default: 8)")
    parser.add_argument("--rounds", type=int, default=2, help="runs per mode (default: 2)")
    args = parser.parse_args()
    modes: dict[str, list[str]] = {"synchronous": [], "asynchronous": ["--async-save"]}
    records_by_mode: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
    with tempfile.TemporaryDirectory() as temporary:
        corpus = make_corpus(Path(temporary) / "corpus")
        for number in range(args.rounds):
            for mode, flags in modes.items():
                records_by_mode[mode] += run(Path(temporary) / f"{mode}-{number}", corpus, args, flags)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {**measure.machine(device), "options": vars(args)}
    for mode, records in records_by_mode.items():
        # No step overlaps the last save.
        saves = [record for record in records if record["type"] == "save" and record["step"] < args.steps]
        steps = [record["step_seconds"] for record in records if record["type"] == "step" and record["step"] > 2]
        result[mode] = {
            "mib": round(saves[0]["bytes"] / 2**20),
            "stall_seconds": round(statistics.median(record["stall_seconds"] for record in saves), 3),
            "whole_seconds": round(statistics.median(record["seconds"] for record in saves), 3),
            "step_seconds": round(statistics.median(steps), 3),
            "longest_step_seconds": round(max(steps), 3),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
