#!/usr/bin/env python
"""Measures time and memory from opening a corpus to the first micro-batch.

python benchmarks/stream_start.py prints a table and writes
benchmarks/results/stream_start-*.json. The corpora are sparse files of real
size whose tokens are all 0. Each start is a separate process that does what a
training run does: open the corpus, check the vocabulary, divide it among the
stages, compute the fingerprint, make the first micro-batch of a patch stage.
The import of Python packages is measured separately.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def write_sparse_dataset(prefix: Path, tokens: int, documents: int) -> str:
    """Writes a dataset of uint16 tokens as sparse files, and returns its prefix.

    Args:
        prefix: path without .bin and .idx.
        tokens: number of tokens, all 0.
        documents: number of documents of equal length except the last; only the ends of the index arrays are written.
    """
    length = tokens // documents
    last = tokens - length * (documents - 1)
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * tokens)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, documents, documents + 1))
        for end, layout, value in (
            (4 * documents, "<i", last),
            (12 * documents, "<q", 2 * (tokens - last)),
            (20 * documents + 8, "<q", documents),
        ):
            file.seek(34 + end - struct.calcsize(layout))
            file.write(struct.pack(layout, value))
    return str(prefix)


def _resident_megabytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def start(word: str, rank: int, ranks: int, step: int) -> dict[str, float]:
    """Starts one rank in this process; returns seconds, CPU seconds and megabytes up to its first micro-batch."""
    began = time.perf_counter()
    from megatron_patch.data.collate import DocumentMasking
    from megatron_patch.data.corpus import check_vocabulary, open_corpus
    from megatron_patch.data.loader import PatchLoader
    from megatron_patch.data.token_stream import TrainStream
    from megatron_patch.stages import Stage, StagePlan

    imported, memory, worked = time.perf_counter(), _resident_megabytes(), time.process_time()
    corpus = open_corpus(word)
    check_vocabulary(corpus, 32_000)
    plan = StagePlan((Stage("patch", 4, 2048, 4, 8 * ranks, 1 << 14), Stage("token", 1, 2048, 4, 8 * ranks, 1 << 14)), 8192)
    stream = TrainStream(plan, {word: corpus}, ((word, 1.0),), "969,30,1", 1234)
    stream.fingerprint()
    loader = PatchLoader(stream, 0, rank, ranks, DocumentMasking(), start_step=step, prefetch=0, vocab_size=32_000)
    (batch, *_) = loader.next_step()
    assert batch.input_ids.shape == (4, 2048, 4)
    return {
        "seconds": time.perf_counter() - imported,
        "cpu_seconds": time.process_time() - worked,
        "megabytes": _resident_megabytes() - memory,
        "import_seconds": imported - began,
        "import_megabytes": memory,
    }


def start_alone(word: str, rank: int, ranks: int, step: int = 0) -> dict[str, float]:
    """Runs `start` in a separate process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--start", word, str(rank), str(ranks), str(step)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    measured: dict[str, float] = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    return measured


def main(argv: Sequence[str]) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", help="folder for the corpora, on a file system that allows sparse files of 2 TB (default: a temporary one)"
    )
    args = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    import torch

    from benchmarks._measure import print_table, write_results

    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for tokens, documents, shards in ((10**9, 10**6, 1), (10**12, 10**9, 1), (10**12, 10**9, 1000)):
            for shard in range(shards):
                write_sparse_dataset(Path(folder) / f"{tokens}-{shards}-{shard:04d}", tokens // shards, documents // shards)
            for rank, step in ((0, 0), (1023, 9_999)):
                measured = start_alone(f"{folder}/{tokens}-{shards}-*", rank, 1024, step)
                rows.append({"tokens": tokens, "documents": documents, "shards": shards, "rank": rank, "step": step, **measured})
    names = ("tokens", "documents", "shards", "rank", "step", "seconds", "cpu_seconds", "megabytes", "import_seconds", "import_megabytes")
    shown = [[f"{row[name]:.3g}" if isinstance(row[name], float) else f"{row[name]:,}" for name in names] for row in rows]
    print_table("From opening to the first micro-batch", [name.replace("_", " ") for name in names], shown)
    write_results("stream_start", torch.device("cpu"), {"rows": rows})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--start"]:
        print(json.dumps(start(sys.argv[2], *map(int, sys.argv[3:6]))))
    else:
        main(sys.argv[1:])
