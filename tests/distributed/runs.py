"""Tiny but complete training runs for tests: a corpus, a command line, and the run's folder afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_patch.data.corpus import TokenCorpus
from megatron_patch.data.indexed_dataset_writer import IndexedDatasetWriter
from tests.distributed.ranks import run_ranks

ROOT = Path(__file__).parent.parent.parent
VOCAB = 64
EOD = 63
MODEL = [
    "--num-layers",
    "2",
    "--hidden-size",
    "32",
    "--num-attention-heads",
    "4",
    "--num-query-groups",
    "2",
    "--ffn-hidden-size",
    "64",
    "--vocab-size",
    "64",
]
DATA = ["--split", "90,10,0", "--eval-tokens", "512", "--seed", "7", "--shuffle-window-blocks", "16", "--num-workers", "1"]


def make_corpus(prefix: Path, documents: int = 300, seed: int = 0) -> str:
    """Writes a learnable corpus of short documents (each a noisy walk over ids, ended by EOD) and returns its prefix."""
    draw = np.random.default_rng(seed)
    with IndexedDatasetWriter(str(prefix), np.dtype(np.uint16)) as writer:
        for _ in range(documents):
            tokens = np.cumsum(draw.integers(0, 3, int(draw.integers(4, 150)))) % 60
            tokens[-1] = EOD
            writer.append(tokens.astype(np.uint16), np.array([tokens.size]))
        writer.finish()
    return str(prefix)


def command(*parts: str | Sequence[str]) -> list[str]:
    """Joins pieces of a command line; strings are split at spaces."""
    words: list[str] = []
    for part in parts:
        words += part.split() if isinstance(part, str) else list(part)
    return words


def start_program(argv: list[str]) -> int:
    """Runs the program on one rank."""
    from megatron_patch.training.pretrain import main

    return main(argv)


@dataclass(frozen=True)
class Run:
    """A finished run's folder."""

    folder: Path

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Returns the run's metrics records of one type."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["type"] == kind]

    def values(self, name: str) -> list[float]:
        """Returns one value of each step, in order; each step must be recorded exactly once."""
        steps = self.records("step")
        assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
        return [record[name] for record in steps]

    @property
    def losses(self) -> list[float]:
        """The training loss of each step."""
        return self.values("loss")


def train(folder: Path, ranks: int, *parts: str | Sequence[str], expect: int = 0, main: Callable[[list[str]], int] = start_program) -> Run:
    """Trains on real ranks, saving into `folder`, and checks the exit codes; each rank runs `main` with the command line."""
    argv = command(MODEL, DATA, *parts, ["--save", str(folder)])
    codes = run_ranks(main, ranks, folder.parent / f"{folder.name}-logs", argv)
    logs = "\n".join(path.read_text() for path in sorted((folder.parent / f"{folder.name}-logs").glob("*.log")))
    assert codes == [expect] * ranks, f"exit codes {codes}\n{logs}"
    return Run(folder)


def printed(folder: Path) -> str:
    """Returns what the ranks of `train` printed."""
    return "\n".join(path.read_text() for path in sorted((folder.parent / f"{folder.name}-logs").glob("*.log")))


def ledger(run: Run, corpus: str) -> np.ndarray:
    """Returns how often each token of the corpus was an input, from the span logs of all ranks."""
    counts = np.zeros(TokenCorpus([corpus]).num_tokens, dtype=int)
    steps: dict[int, int] = {}
    for path in sorted((run.folder / "spans").glob("rank-*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            steps[record["step"]] = steps.get(record["step"], 0) + 1
            for micro_batch in record["spans"]:
                for _, start, length in micro_batch:
                    counts[start : start + length] += 1
    assert sorted(steps) == list(range(1, len(run.losses) + 1))
    return counts


def start_process(*parts: str | Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts the program as a separate process, as a user would on one rank."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"}
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "pretrain_gpt_patch.py"), *command(MODEL, DATA, *parts)], env=environment, stdout=file, stderr=file
        )
