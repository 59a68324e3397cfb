"""Soak test: a tiny run is killed, resized, and its newest checkpoint damaged again and again; it must end like an undisturbed run.

    python -m tests.faults.soak --minutes 10 --seed 1 [--faults 200] [--resize] [--async-save]

Every start of the run is ended by kill -9 of one rank, and then of the others, at a random moment: while starting, training or saving.
Between starts, files are corrupted, truncated or removed, also `latest`. On one layout the losses of the full run, and its last weights and
moments, must be bit for bit those of an undisturbed run; with --resize (1 or 2 ranks) they must agree within rounding. When a run is done,
another one begins in a new folder, until the time is over.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from megatron_patch.checkpoint import commit as commit
from tests.distributed.ranks import run_ranks, start_ranks
from tests.distributed.runs import DATA, MODEL, Run, command, make_corpus, start_program

PLAN = command(
    "--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --patch-size 3 --lr 3e-3 --lr-warmup-fraction 0.2 --zero-stage 1",
    "--save-interval 2 --keep-last 3 --log-interval 1000 --num-workers 0",
)
_ROUNDING = 1e-4


@dataclass
class Tally:
    """Counts of faults, starts, finished runs and skipped checkpoints."""

    faults: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    runs: int = 0
    skipped: int = 0

    @property
    def total(self) -> int:
        """Number of faults of all kinds."""
        return sum(self.faults.values())


def flip(path: Path, draw: random.Random) -> None:
    """Flips one bit of a file."""
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, draw: random.Random) -> None:
    """Truncates a file at a random byte."""
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def damage(save: Path, draw: random.Random) -> str | None:
    """Damages the newest valid checkpoint in one of the ways of disks and users; returns what it did, or None without a checkpoint.

    At least one valid checkpoint is left, because no program can survive the loss of all.
    """
    valid = [folder for folder in commit.list_checkpoints(save) if not commit.verify(folder)]
    latest = save / "latest"
    kinds = (["flip", "truncate", "remove", "manifest"] * 2 if len(valid) > 1 else []) + (["latest"] if latest.exists() else [])
    if not kinds:
        return None
    kind = draw.choice(kinds)
    if kind == "latest":
        draw.choice([latest.unlink, lambda: latest.write_text("step-"), lambda: latest.write_bytes(b"\xff\x00")])()
        return "latest damaged"
    files = [path for path in valid[0].rglob("*") if path.is_file()]
    file = draw.choice(files)
    if kind == "manifest":
        (valid[0] / commit.MANIFEST).unlink()
        return "manifest removed"
    {"flip": lambda: flip(file, draw), "truncate": lambda: truncate(file, draw), "remove": file.unlink}[kind]()
    return {"flip": "bit flipped", "truncate": "file truncated", "remove": "file removed"}[kind]


def start_once(argv: list[str], ranks: int, save: Path, logs: Path, draw: random.Random, kill: bool) -> tuple[bool, str]:
    """Starts the run, which is killed at a random moment unless it ends before; returns whether it ended by itself, and what it printed.

    One start in six is killed early, half of the others in the middle of saving.
    """
    processes, results = start_ranks(start_program, ranks, logs, argv)
    starting, saving = draw.random() < 1 / 6, draw.random() < 0.5
    metrics = save / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.exists() else 0
    end = time.monotonic() + draw.random() * 4 if starting else None
    codes: dict[int, object] = {}
    while len(codes) < ranks and not (kill and end is not None and time.monotonic() >= end):
        with contextlib.suppress(Exception):
            rank, ok, value = results.get(timeout=0.002)
            codes[rank] = value if ok else f"rank {rank}: {value}"
        if end is None and metrics.exists() and metrics.stat().st_size > size + 4000:
            if not saving:
                end = time.monotonic() + draw.random() * 1.5
            elif list(save.glob(f"{commit.PARTIAL}*")):
                end = time.monotonic() + draw.random() * 0.05
    ended = len(codes) == ranks
    victims = list(processes)
    draw.shuffle(victims)
    for number, process in enumerate(victims):
        if ended:
            process.join(20)
        if process.is_alive():
            process.kill()
            # The others run on for a moment, as they do until a launcher notices.
            time.sleep(draw.random() * 0.2 if number == 0 else 0)
    for process in processes:
        process.join()
    text = "\n".join(path.read_text(errors="replace") for path in sorted(logs.glob("*.log")))
    # A rank whose peer was killed may exit with a connection error; if all ranks exit by themselves, none may fail.
    if ended and any(code != 0 for code in codes.values()):
        raise AssertionError(f"exit codes {codes}\n{text}")
    return ended, text


def states(save: Path) -> dict[str, bytes]:
    """Returns the files of weights and moments in a run's newest checkpoint."""
    return {path.name: path.read_bytes() for path in commit.list_checkpoints(save)[0].glob("state-*")}


def soak(
    folder: Path, minutes: float, seed: int, faults: int = 0, resize: bool = False, asynchronous: bool = False, tokens: int = 30_000
) -> Tally:
    """Disturbs runs until the time is over or the number of faults is reached; the last run is always completed.

    Args:
        folder: where to write.
        minutes: how long.
        seed: seed of all random choices.
        faults: number of faults to stop at; 0: only the time counts.
        resize: whether starts use 1 or 2 ranks at random.
        asynchronous: whether runs save with --async-save.
        tokens: tokens of a run.

    Raises:
        AssertionError: a run ended differently from the undisturbed one.
    """
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    corpus = make_corpus(folder / "corpus", documents=900)
    plan = command(PLAN, f"--train-tokens {tokens} --data-path", [corpus])
    argv = command(MODEL, DATA, plan, ["--save", str(folder / "whole")])
    assert run_ranks(start_program, 2, folder / "whole-logs", argv, timeout=1800) == [0, 0]
    whole = Run(folder / "whole").losses
    began = time.monotonic()
    tally = Tally()

    def over() -> bool:
        return time.monotonic() - began > 60 * minutes or 0 < faults <= tally.total

    while tally.runs == 0 or not over():
        save = folder / f"run-{tally.runs}"
        argv = command(MODEL, DATA, plan, ["--async-save"] if asynchronous else [], ["--save", str(save)])
        newest = 0
        while True:
            # When the time is over, the run ends on the layout that it began with.
            ranks = draw.choice([1, 2]) if resize and not over() else 2
            tally.starts += 1
            ended, text = start_once(argv, ranks, save, folder / "logs", draw, kill=not over())
            tally.skipped += text.count("skipped the checkpoint")
            if ended:
                break
            tally.faults["kill -9"] += 1
            found = commit.find_newest_valid(save) if save.exists() else None
            step = found.state.step if found else 0
            assert step >= newest, f"step {newest} was committed, but the newest valid checkpoint is of step {step}\n{text}"
            while draw.random() < 0.6 and (done := damage(save, draw)):
                tally.faults[done] += 1
            found = commit.find_newest_valid(save) if save.exists() else None
            newest = found.state.step if found else 0
        losses = Run(save).losses
        if resize:
            worst = max(abs(a - b) / abs(b) for a, b in zip(losses, whole, strict=True))
            assert worst < _ROUNDING, f"losses differ by {worst}"
        else:
            assert losses == whole, "losses differ from those of the undisturbed run"
            assert states(save) == states(folder / "whole"), "weights or moments differ from those of the undisturbed run"
        assert not commit.verify(commit.list_checkpoints(save)[0]), "the last checkpoint is not valid"
        tally.runs += 1
        shutil.rmtree(save)
    return tally


def main() -> int:
    """Runs the command line and prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=0, help="stop after this number of faults")
    parser.add_argument("--resize", action="store_true", help="start on 1 or 2 ranks at random")
    parser.add_argument("--async-save", action="store_true")
    parser.add_argument("--tokens", type=int, default=30_000)
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tally = soak(Path(folder), args.minutes, args.seed, args.faults, args.resize, args.async_save, args.tokens)
    seconds = round(time.monotonic() - began)
    print(json.dumps({"seed": args.seed, "seconds": seconds, "total": tally.total, **vars(tally)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
