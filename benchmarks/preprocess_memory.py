#!/usr/bin/env python
"""Peak memory of preprocessing, summed over all its processes, on corpora that need much memory.

python benchmarks/preprocess_memory.py prints a table and writes benchmarks/results/preprocess_memory-*.json. The corpora: one text file of
500 MB; millions of documents of a few words; gigabytes of ordinary text. Memory is the sum of the resident sets of all processes, sampled
every few milliseconds: pages that processes share are counted once for each, so the true figure is lower.

With --large-text it compares two ways to read a text file that is one document, piece by piece and as one string, in alternating runs of
one worker, and writes benchmarks/results/preprocess_large-*.json:

python benchmarks/preprocess_memory.py --large-text novels.txt --tokenizers HuggingFaceTokenizer=llama3/tokenizer.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
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
    """Returns words in random order."""
    draw = random.Random(seed)
    page = " ".join(draw.choices(_WORDS, k=20_000))
    return (page * (characters // len(page) + 1))[:characters]


def large_text(megabytes: float) -> Iterator[bytes]:
    """One text of the given size."""
    yield text_of(int(megabytes * 1e6), 1).encode()


def short_documents(megabytes: float) -> Iterator[bytes]:
    """Documents of a few words each."""
    lines = b"".join(json.dumps({"text": " ".join(_WORDS[i % 20 : i % 20 + 3])}).encode() + b"\n" for i in range(20_000))
    yield from (lines for _ in range(max(1, int(megabytes * 1e6 / len(lines)))))


def ordinary(megabytes: float) -> Iterator[bytes]:
    """Documents of 3 kB."""
    lines = b"".join(json.dumps({"text": text_of(3000, number)}).encode() + b"\n" for number in range(1000))
    yield from (lines for _ in range(max(1, int(megabytes * 1e6 / len(lines)))))


CORPORA: dict[str, tuple[str, Callable[[float], Iterator[bytes]], float]] = {
    "a text file of 500 MB": ("large.txt", large_text, 500),
    "documents of three words": ("short.jsonl", short_documents, 500),
    "gigabytes of text": ("ordinary.jsonl", ordinary, 2000),
}


def write_corpus(path: Path, lines: Iterator[bytes]) -> None:
    """Writes the lines of a corpus to a file."""
    with path.open("wb") as file:
        file.writelines(lines)


def _family(pid: int) -> Iterator[int]:
    """Yields a process and all its descendants."""
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
    """Runs a command, and returns the peak memory of all its processes in megabytes, and its seconds.

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
    """Makes, preprocesses and removes one corpus."""
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


READ_AS_ONE_STRING = """
import sys
from megatron_patch.raw_text import readers
readers.LARGE_BYTES = sys.maxsize
from megatron_patch.cli.command_line import run_tool
from megatron_patch.cli.preprocess_data import main
sys.exit(run_tool(main))
"""


def cpu_seconds_of_children() -> float:
    """Returns the user and system time of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def compare_large_text(text: Path, tokenizers: Sequence[str], repeat: int) -> list[dict[str, object]]:
    """Preprocesses a text file that is one document, piece by piece and as one string.

    Args:
        text: the file.
        tokenizers: TYPE=MODEL of each tokenizer.
        repeat: alternating runs of both ways.

    Returns:
        One row for each tokenizer and way, with the medians of CPU seconds and of peak megabytes.
    """
    from megatron_patch.utils.files import checksum

    ways = {"piece by piece": ["tools/preprocess_data.py"], "as one string": ["-c", READ_AS_ONE_STRING]}
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for word in tokenizers:
            kind, _, model = word.partition("=")
            flags = ["--input", str(text.resolve()), "--output-prefix", f"{folder}/out", "--append-eod", "--overwrite"]
            flags += ["--tokenizer-type", kind, "--tokenizer-model", str(Path(model).resolve())]
            found: dict[str, list[tuple[float, float, str]]] = {way: [] for way in ways}
            for _ in range(repeat):
                for way, program in ways.items():
                    command = [sys.executable, *program, *flags]
                    before = cpu_seconds_of_children()
                    peak = peak_megabytes(command)[0]
                    found[way].append((cpu_seconds_of_children() - before, peak, checksum(Path(folder) / "out_text_document.bin")))
            for way, runs in found.items():
                rows.append(
                    {
                        "tokenizer": "/".join(Path(model).parts[-2:]),
                        "read": way,
                        "megabytes": round(text.stat().st_size / 1e6),
                        "runs": repeat,
                        "cpu_seconds": round(statistics.median(run[0] for run in runs), 2),
                        "peak_megabytes": round(statistics.median(run[1] for run in runs)),
                        "identical": len({run[2] for way in ways for run in found[way]}) == 1,
                    }
                )
    return rows


def main() -> None:
    """Measures, prints a table and writes a result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", choices=CORPORA)
    parser.add_argument("--large-text", type=Path, help="a text file that is one document: compare two ways to read it")
    parser.add_argument("--tokenizers", nargs="+", default=[], metavar="TYPE=MODEL", help="for --large-text")
    parser.add_argument("--repeat", type=int, default=3, help="runs for --large-text")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import torch

    from benchmarks._measure import print_table, write_results
    from benchmarks.preprocess import train_byte_level

    if args.large_text:
        rows = compare_large_text(args.large_text, args.tokenizers, args.repeat)
        print_table("Reading a text file that is one document", list(rows[0]), [list(map(str, row.values())) for row in rows])
        write_results("preprocess_large", torch.device("cpu"), {"rows": rows})
        return
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
    print_table("Peak memory of all processes", list(rows[0]), shown)
    write_results("preprocess_memory", torch.device("cpu"), {"rows": rows})


if __name__ == "__main__":
    main()
