"""Load test: in a long run of a tiny model, memory, open files, threads and step times must not grow.

    python -m tests.faults.load --steps 10000

Trains with asynchronous checkpoints, evaluations and metrics, samples the process once a second, and compares the last quarter of the run
with the second.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tests.distributed.ranks import start_ranks
from tests.distributed.runs import DATA, MODEL, Run, command, make_corpus, start_program

TOKENS_PER_STEP = 2 * 16


def sample(pid: int) -> dict[str, Any]:
    """Returns the resident memory in MiB, the open files and the threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    values = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return {"mib": int(values["VmRSS"].split()[0]) / 1024, "files": files, "threads": int(values["Threads"])}


def load(folder: Path, steps: int) -> dict[str, Any]:
    """Trains, and returns the medians of the second and of the last quarter of the run.

    Args:
        folder: where to write.
        steps: number of steps.

    Raises:
        AssertionError: the run failed, or something grew.
    """
    corpus = make_corpus(folder / "corpus", documents=400)
    save = folder / "run"
    every = max(10, steps // 100)
    plan = command(
        "--seq-length 16 --micro-batch-size 2 --global-batch-size 2 --patch-size 2 --lr 1e-4 --zero-stage 1 --async-save --keep-last 2",
        f"--train-tokens {steps * TOKENS_PER_STEP} --save-interval {every} --eval-interval {every * 5} --log-interval {every}",
        "--patch-fraction 0.25 --data-path",
        [corpus],
    )
    processes, results = start_ranks(start_program, 1, folder / "logs", command(MODEL, DATA, plan, ["--save", str(save)]))
    (process,) = processes
    seen: list[dict[str, Any]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(1.0):
            lines = (save / "metrics.jsonl").read_bytes().count(b"\n") if (save / "metrics.jsonl").exists() else 0
            try:
                seen.append({"step": lines, **sample(process.pid)})
            except (OSError, KeyError):
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, ok, value = results.get()
    over.set()
    watcher.join()
    process.join()
    assert ok and value == 0, (folder / "logs" / "rank-0.log").read_text()[-3000:]
    taken = [record["step_seconds"] for record in Run(save).records("step")]
    quarters = {"second": (0.25, 0.5), "last": (0.75, 1.0)}
    result: dict[str, Any] = {"steps": len(taken), "saves": len(Run(save).records("save"))}
    for name, (first, last) in quarters.items():
        part = [item for item in seen if first <= item["step"] / len(taken) <= last + 0.1]
        assert part, "the run was too short to be sampled"
        result[name] = {key: round(statistics.median(item[key] for item in part), 2) for key in ("mib", "files", "threads")}
        result[name]["step_ms"] = round(1000 * statistics.median(taken[int(first * len(taken)) : int(last * len(taken))]), 3)
    before, after = result["second"], result["last"]
    assert after["mib"] < before["mib"] * 1.02 + 4, f"memory grew: {result}"
    assert after["files"] <= before["files"] + 2 and after["threads"] <= before["threads"] + 2, f"handles grew: {result}"
    return result


def main() -> int:
    """Runs the command line and prints a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = load(Path(folder), args.steps)
    print(json.dumps({**result, "seconds": round(time.monotonic() - began)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
