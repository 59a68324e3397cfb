#!/usr/bin/env python
"""Runs examples/replicate/study.py on one device within a time limit.

    python benchmarks/study_run.py --text books.jsonl.zst --output /tmp/text \\
        --parallel 4 --seconds 120
    python benchmarks/study_run.py --tiny

Records the results of each run when it ends. --output may be the folder of
benchmarks/text_run.py, whose tokenizer and dataset are then reused. Tables,
plots and JSON of the study are copied to the folder named by RESULTS when they
change. At the end of --seconds, and after Ctrl-C or SIGTERM, unfinished runs
save and stop, and their results so far are recorded. A run that fails does not
stop the others.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import text_run
import torch
from _measure import record
from _schedule import end_group

from megatron_patch.cli.command_line import count_from_one

ROOT = Path(__file__).parent.parent
FILES = ("study.md", "study.json", "loss.png", "switch.png")
ARMS = ["patch-k4", "patch-k2", "superposition-k2", "superposition-k2-long"]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text",
        type=text_run.text_file,
        nargs="+",
        default=[],
        help=".txt or .jsonl files, also compressed (default: the source of the standard library)",
    )
    parser.add_argument("--output", type=Path, default=None, help="folder for data and runs (default: a temporary one)")
    parser.add_argument(
        "--config",
        default="examples/replicate/study_gpu_minutes.yaml",
        help="YAML file with model, batch and learning rate (default: examples/replicate/study_gpu_minutes.yaml)",
    )
    parser.add_argument("--budget", default=None, help="cost tokens per arm (default: train-tokens of the configuration)")
    parser.add_argument(
        "--vocab", type=count_from_one, default=8192, help="vocabulary of the tokenizer that is trained on the text (default: 8192)"
    )
    parser.add_argument("--arms", nargs="+", default=ARMS, help="arms to run, in addition to their baselines")
    parser.add_argument("--seeds", type=count_from_one, default=3, help="runs per arm (default: 3)")
    parser.add_argument("--parallel", type=count_from_one, default=4, help="runs at a time on the device (default: 4)")
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="time limit for everything: unfinished runs then save and stop (default: 120)"
    )
    parser.add_argument("--tiny", action="store_true", help="use a tiny model and two runs in place of all settings above")
    args = parser.parse_args(argv)
    if args.tiny:
        args.config, args.budget, args.vocab, args.arms = "examples/replicate/study_minutes.yaml", "20k", 512, ["patch-k4"]
        args.seeds, args.parallel = 1, 2
    return args


def start_guard(leader: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    """Starts a process that kills a group when this process is killed: it waits for its input pipe to close."""
    return subprocess.Popen(["bash", "-c", f"read -r; kill -9 -- -{leader.pid}"], stdin=subprocess.PIPE, start_new_session=True)


def main(argv: list[str] | None = None) -> int:
    """Runs the study; returns its exit code, 1 if a loss is not finite or no run was recorded, 143 or 130 after a signal."""
    args = parse(argv)
    text_run.on_signals(text_run.exit_on_signal)
    with tempfile.TemporaryDirectory() as temporary:
        return run(args, (args.output or Path(temporary)).resolve())


def run(args: argparse.Namespace, home: Path) -> int:
    """Runs the study in a folder."""
    began = time.monotonic()
    data = ["--output", str(home), "--vocab", str(args.vocab), "--prepare-only"]
    if args.tiny:
        data.append("--tiny")
    text_run.main([*data, *(["--text", *args.text] if args.text else [])])
    text = [str(Path(name).resolve()) for name in args.text] or [str(home / "data" / "train.jsonl")]
    flags = ["--text", *text, "--output", str(home), "--config", args.config, "--vocab-size", str(args.vocab)]
    flags += ["--arms", *args.arms, "--seeds", str(args.seeds), "--parallel", str(args.parallel), "--saves", "1", "--keep-going"]
    flags += ["--seconds", f"{max(1.0, args.seconds - (time.monotonic() - began)):.0f}"]
    flags += ["--budget", args.budget] if args.budget else []
    environment = text_run.environment(text_run.parse(["--parallel", str(args.parallel)]))
    environment.pop("OMP_NUM_THREADS", None)
    if torch.cuda.is_available():
        # The study detects GPUs with nvidia-smi, which may be missing.
        environment["DS_ACCELERATOR"] = "cuda"
    results = Path(os.environ.get("RESULTS", home))
    recorded: set[str] = set()
    sick = False

    def record_runs(ended: bool) -> None:
        nonlocal sick
        for folder in sorted((home / "runs").glob("*-seed*")):
            reached = text_run.run_outcome(folder)
            if folder.name in recorded or reached is None or not (ended or reached["ended"]):
                continue
            recorded.add(folder.name)
            sick = sick or bool(reached["steps_not_finite"])
            arm, seed = folder.name.rsplit("-seed", 1)
            record("run", name=arm, seed=int(seed), **reached, config=args.config, at_a_time=args.parallel, study=True)
            loss = reached["held_out_loss"]
            held_out = "no held-out loss yet" if loss is None else f"held-out loss {loss:.4f}"
            print(f"{folder.name}: {held_out} at {reached['tokens']:,} tokens", flush=True)
        for name in FILES:
            source, target = home / name, results / name
            if results != home and source.is_file() and (not target.is_file() or target.stat().st_mtime < source.stat().st_mtime):
                shutil.copy(source, target)

    # After a signal it still records the results so far, and ends all runs.
    signals: list[int] = []
    text_run.on_signals(lambda number, frame: signals.append(number))
    command = [sys.executable, "-u", "examples/replicate/study.py", *flags]
    study = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    guard = start_guard(study)
    try:
        while study.poll() is None and not signals:
            time.sleep(0.2)
            record_runs(ended=False)
    finally:
        end_group(study, text_run.GRACE_SECONDS, lambda: len(signals) > 1)
        guard.kill()
        guard.communicate()
        record_runs(ended=True)
    print(f"{len(recorded)} run{'' if len(recorded) == 1 else 's'} recorded after {time.monotonic() - began:.0f} s")
    return 128 + signals[0] if signals else study.returncode or int(sick or not recorded)


if __name__ == "__main__":
    sys.exit(main())
