#!/usr/bin/env python
"""The most memory that preprocessing takes, all its processes together, on corpora that are hard for memory.

python benchmarks/preprocess_memory.py prints a table and writes benchmarks/results/preprocess_memory-*.json. The corpora: one line of
500 MB, plain and packed; millions of documents of a few words; gigabytes of ordinary text. Memory is the sum of the resident sets of all
processes, looked at every few milliseconds: pages that processes share count once for each, so the true figure is lower.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
_WORDS = [
    "the",
    "model",
    "reads",
    "patches",
    "of",
    "tokens",
    "first",
    "and",
    "single",
    "tokens",
    "last,",
    "so",
    "that",
    "3/4",
    "of",
    "the",
    "data",
    "costs",
    "a",
    "quarter;",
    "don't",
    "ask",
    "why",
    "(yet)",
]


def text_of(characters: int, seed: int) -> str:
    """Words in random order."""
    draw = random.Random(seed)
    page = " ".join(draw.choices(_WORDS, k=20_000))
    return (page * (characters // len(page) + 1))[:characters]


def long_line(megabytes: float) -> Iterator[bytes]:
    """Ordinary documents, one of so many megabytes, and ordinary documents again."""
    yield from (json.dumps({"text": text_of(3000, number)}).encode() + b"\n" for number in range(200))
    yield json.dumps({"text": text_of(int(megabytes * 1e6), 1)}).encode() + b"\n"
    yield from (json.dumps({"text": text_of(3000, number)}).encode() + b"\n" for number in range(200))


def short_documents(megabytes: float) -> Iterator[bytes]:
    """Some words each."""
    lines = b"".join(json.dumps({"text": " ".join(_WORDS[i % 20 : i % 20 + 3])}).encode() + b"\n" for i in range(20_000))
    yield from (lines for _ in range(max(1, int(megabytes * 1e6 / len(lines)))))


def ordinary(megabytes: float) -> Iterator[bytes]:
    """Documents of 3 kB."""
    lines = b"".join(json.dumps({"text": text_of(3000, number)}).encode() + b"\n" for number in range(1000))
    yield from (lines for _ in range(max(1, int(megabytes * 1e6 / len(lines)))))


CORPORA: dict[str, tuple[str, Callable[[float], Iterator[bytes]], float]] = {
    "a line of 500 MB": ("long.jsonl", long_line, 500),
    "a line of 500 MB, packed": ("long.jsonl.gz", long_line, 500),
    "documents of three words": ("short.jsonl", short_documents, 500),
    "gigabytes of text": ("ordinary.jsonl", ordinary, 2000),
}


def write_corpus(path: Path, lines: Iterator[bytes]) -> None:
    """Plain, or packed where the name says so."""
    with gzip.open(path, "wb", compresslevel=1) if path.suffix == ".gz" else path.open("wb") as file:
        file.writelines(lines)


def _family(pid: int) -> Iterator[int]:
    """A process and all that descend from it."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from _family(int(child))


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    except (OSError, IndexError):
        return 0


def peak_megabytes(command: Sequence[str]) -> tuple[float, float]:
    """(megabytes, seconds) of a command: the most that all its processes held at one time.

    Raises:
        RuntimeError: the command failed.
    """
    began, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors, env={**os.environ, "PYTHONPATH": str(ROOT)}
        ) as process:
            while process.poll() is None:
                peak = max(peak, sum(map(_resident, _family(process.pid))))
                time.sleep(0.02)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(errors.read()[-2000:])
    return peak / 1e6, time.perf_counter() - began


def measure(
    name: str, tokenizer: Path, folder: Path, workers: int, megabytes: float | None = None, more: Sequence[str] = ()
) -> dict[str, object]:
    """One corpus, made, preprocessed and removed."""
    file, lines, size = CORPORA[name]
    path = folder / file
    write_corpus(path, lines(megabytes or size))
    command = [sys.executable, "tools/preprocess_data.py", "--input", str(path), "--output-prefix", str(folder / "out"), "--append-eod"]
    command += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer), "--workers", str(workers), *more]
    peak, seconds = peak_megabytes(command)
    tokens = (folder / "out_text_document.bin").stat().st_size // 2
    for made in (path, *folder.glob("out_*")):
        made.unlink()
    found = {"corpus": name, "workers": workers, "flags": " ".join(more), "megabytes": megabytes or size, "tokens": tokens}
    return {**found, "seconds": round(seconds, 1), "peak_megabytes": round(peak)}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", choices=CORPORA)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import torch

    from benchmarks._measure import print_table, write_results
    from benchmarks.preprocess import train_byte_level

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_corpus(folder / "train.jsonl", ordinary(3))
        train_byte_level(folder / "train.jsonl", folder / "tokenizer")
        chosen = [args.only] if args.only else list(CORPORA)
        rows = [measure(name, folder / "tokenizer", folder, args.workers) for name in chosen]
        if not args.only:
            more = ("--dedup", "--shuffle-documents", "1")
            rows.append(measure("documents of three words", folder / "tokenizer", folder, args.workers, more=more))
    shown = [[f"{value:,}" if isinstance(value, int | float) else str(value) for value in row.values()] for row in rows]
    print_table("The most memory of all processes", list(rows[0]), shown)
    write_results("preprocess_memory", torch.device("cpu"), {"rows": rows})


if __name__ == "__main__":
    main()
