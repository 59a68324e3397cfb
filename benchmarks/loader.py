#!/usr/bin/env python
"""Measures how fast one core turns a dataset into micro-batches, relative to copying the same tokens to int64.

python benchmarks/loader.py prints a table and writes benchmarks/results/loader-*.json. Times are the best of several rounds. Quote the
ratio, which depends least on the machine and its load.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_patch.data.collate import DocumentMasking
from megatron_patch.data.corpus import TokenCorpus
from megatron_patch.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_patch.data.loader import PatchLoader
from megatron_patch.data.token_stream import TrainStream
from megatron_patch.stages import Stage, StagePlan

TOKENS = 40_000_000
STEPS = 40
EOD = 0
MASKS = DocumentMasking(EOD, reset_attention_mask=True, reset_position_ids=True, eod_mask_loss=True)


def write_corpus(prefix: Path) -> TokenCorpus:
    """Writes random ids in documents of about 1,000 tokens."""
    generator = np.random.default_rng(0)
    with IndexedDatasetWriter(str(prefix), np.dtype(np.uint16)) as writer:
        tokens = generator.integers(0, 32000, TOKENS).astype(np.uint16)
        tokens[::1000] = EOD
        writer.append(tokens, np.full(TOKENS // 1000, 1000))
        writer.finish()
    return TokenCorpus([str(prefix)])


def best_seconds(work: Callable[[], None], rounds: int = 5) -> float:
    """Returns the seconds of the fastest round."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def measure(corpus: TokenCorpus, patch_size: int, masking: DocumentMasking) -> dict[str, float]:
    """Returns tokens per second of the loader and of copying, for micro-batches of 4 samples of about 8,192 tokens."""
    stage = Stage("s", patch_size, 8192 // patch_size, 4, 16, STEPS)
    stream = TrainStream(StagePlan((stage,), stage.sample_tokens), {"x": corpus}, (("x", 1.0),), "1,0,0", 1)

    def load() -> None:
        loader = PatchLoader(stream, 0, 0, 1, masking, prefetch=0, vocab_size=32000)
        for _ in range(STEPS):
            loader.next_step()

    starts = stream.locate(0, np.arange(stage.samples))[1]
    length = stage.sample_tokens + patch_size

    def copy() -> None:
        for start in starts:
            corpus.read(int(start), length)

    return {"tokens_per_second": stage.tokens / best_seconds(load), "copy_tokens_per_second": stage.tokens / best_seconds(copy)}


def main() -> None:
    """Measures and prints."""
    table = Table(title="Loader, one core, micro-batches of 4 x 8,192 tokens", title_justify="left")
    for column in ("K", "documents", "M tokens/s", "copy", "share of copy"):
        table.add_column(column, justify="right")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder) / "x")
        for patch_size in (1, 4):
            for name, masking in (("one", DocumentMasking()), ("masked", MASKS)):
                row = {"patch_size": patch_size, "documents": name, **measure(corpus, patch_size, masking)}
                rows.append(row)
                speed, copy = float(row["tokens_per_second"]), float(row["copy_tokens_per_second"])
                table.add_row(str(patch_size), name, f"{speed / 1e6:.1f}", f"{copy / 1e6:.1f}", f"{speed / copy:.2f}")
    Console(width=100, markup=False).print(table)
    today = date.today().isoformat()
    output = Path(__file__).parent / "results" / f"loader-{today}.json"
    output.parent.mkdir(exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    output.write_text(
        json.dumps({"date": today, "command": "python benchmarks/loader.py", "machine": machine, "rows": rows}, indent=1) + "\n"
    )
    print(f"wrote {output.relative_to(Path.cwd()) if output.is_relative_to(Path.cwd()) else output}")


if __name__ == "__main__":
    main()
