#!/usr/bin/env python
"""How long a rank takes from opening a corpus to its first micro-batch, and how much memory, on corpora that are only pretended.

python benchmarks/stream_start.py prints a table and writes benchmarks/results/stream_start-*.json. The corpora are sparse files, whose
sizes and ends are real and whose tokens are all 0. Each start is a process of its own, which does what a training run does: open, check
the vocabulary, cut the stages, take the fingerprint, make the first micro-batch of a patch stage. Importing Python's packages comes
before and is told by itself.
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


def pretend(prefix: Path, tokens: int, documents: int) -> str:
    """Writes a dataset of uint16 tokens that holds nothing but its size: the files are as sparse as the file system can make them.

    Args:
        prefix: path without .bin and .idx.
        tokens: all 0.
        documents: of equal length, but for the last; only the index' ends are written.
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
    """One rank's start in this process: seconds, CPU seconds and megabytes up to its first micro-batch."""
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
    """The same in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--start", word, str(rank), str(ranks), str(step)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    found: dict[str, float] = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    return found


def main(argv: Sequence[str]) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="for the pretended corpora; on a file system with sparse files of 2 TB")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    import torch

    from benchmarks._measure import print_table, write_results

    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for tokens, documents, shards in ((10**9, 10**6, 1), (10**12, 10**9, 1), (10**12, 10**9, 1000)):
            for shard in range(shards):
                pretend(Path(folder) / f"{tokens}-{shards}-{shard:04d}", tokens // shards, documents // shards)
            for rank, step in ((0, 0), (1023, 9_999)):
                found = start_alone(f"{folder}/{tokens}-{shards}-*", rank, 1024, step)
                rows.append({"tokens": tokens, "documents": documents, "shards": shards, "rank": rank, "step": step, **found})
    names = ("tokens", "documents", "shards", "rank", "step", "seconds", "cpu_seconds", "megabytes", "import_seconds", "import_megabytes")
    shown = [[f"{row[name]:.3g}" if isinstance(row[name], float) else f"{row[name]:,}" for name in names] for row in rows]
    print_table("From opening to the first micro-batch", [name.replace("_", " ") for name in names], shown)
    write_results("stream_start", torch.device("cpu"), {"rows": rows})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--start"]:
        print(json.dumps(start(sys.argv[2], *map(int, sys.argv[3:6]))))
    else:
        main(sys.argv[1:])
