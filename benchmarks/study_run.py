#!/usr/bin/env python
"""A study (examples/replicate/study.py) on one device in a time that is given: each run's figures are recorded when it ends.

    python benchmarks/study_run.py --text books.jsonl.zst --output /tmp/text --parallel 4 --seconds 120
    python benchmarks/study_run.py --tiny

--output may be the folder of benchmarks/text_run.py, whose tokenizer and dataset then serve. Tables, plots and JSON of the study are copied
to the folder that RESULTS names whenever they change. Runs that are not done by the end of --seconds save and stop; what they have reached
is recorded, too; so it is where this program is told to stop (Ctrl-C, SIGTERM), which it does when all runs have ended. Whatever becomes of
one run, the others begin.
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
        help=".txt or .jsonl, also compressed; by default the standard library's source",
    )
    parser.add_argument("--output", type=Path, default=None, help="a folder for data and runs; by default one that is removed at the end")
    parser.add_argument("--config", default="examples/replicate/study_gpu_minutes.yaml", help="model, batch and learning rate")
    parser.add_argument("--budget", default=None, help="cost tokens of an arm; by default the configuration's train-tokens")
    parser.add_argument("--vocab", type=count_from_one, default=8192, help="ids of the tokenizer that is trained on the text")
    parser.add_argument("--arms", nargs="+", default=ARMS, help="with the baselines that they need")
    parser.add_argument("--seeds", type=count_from_one, default=3, help="runs of each arm")
    parser.add_argument("--parallel", type=count_from_one, default=4, help="runs at a time, on the same device")
    parser.add_argument("--seconds", type=float, default=120.0, help="for everything: runs that are not done by then save and stop")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and two runs in place of all settings above")
    args = parser.parse_args(argv)
    if args.tiny:
        args.config, args.budget, args.vocab, args.arms = "examples/replicate/study_minutes.yaml", "20k", 512, ["patch-k4"]
        args.seeds, args.parallel = 1, 2
    return args


def guard_of(leader: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    """A process that kills a group where this one is killed: it waits at a pipe, which closes then."""
    return subprocess.Popen(["bash", "-c", f"read -r; kill -9 -- -{leader.pid}"], stdin=subprocess.PIPE, start_new_session=True)


def main(argv: list[str] | None = None) -> int:
    """Runs the study; returns its exit code, 1 where a loss is not finite or no run was recorded, 143 or 130 after a signal."""
    args = parse(argv)
    text_run.on_signals(text_run.leave)
    with tempfile.TemporaryDirectory() as temporary:
        return run(args, (args.output or Path(temporary)).resolve())


def run(args: argparse.Namespace, home: Path) -> int:
    """The study in its folder."""
    began = time.monotonic()
    data = ["--output", str(home), "--vocab", str(args.vocab), "--prepare-only"]
    if args.tiny:
        data.append("--tiny")
    text_run.main([*data, *(["--text", *args.text] if args.text else [])])
    text = [str(Path(name).resolve()) for name in args.text] or [str(home / "data" / "train.jsonl")]
    words = ["--text", *text, "--output", str(home), "--config", args.config, "--vocab-size", str(args.vocab)]
    words += ["--arms", *args.arms, "--seeds", str(args.seeds), "--parallel", str(args.parallel), "--saves", "1", "--keep-going"]
    words += ["--seconds", f"{max(1.0, args.seconds - (time.monotonic() - began)):.0f}"]
    words += ["--budget", args.budget] if args.budget else []
    environment = text_run.environment(text_run.parse(["--parallel", str(args.parallel)]))
    environment.pop("OMP_NUM_THREADS", None)
    if torch.cuda.is_available():
        # The study asks nvidia-smi, which need not be there.
        environment["DS_ACCELERATOR"] = "cuda"
    results = Path(os.environ.get("RESULTS", home))
    recorded: set[str] = set()
    sick = False

    def look(ended: bool) -> None:
        nonlocal sick
        for folder in sorted((home / "runs").glob("*-seed*")):
            reached = text_run.outcome(folder)
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

    # Ended before its time, it still records what the runs have reached, and leaves none behind.
    told: list[int] = []
    text_run.on_signals(lambda number, frame: told.append(number))
    command = [sys.executable, "-u", "examples/replicate/study.py", *words]
    study = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    guard = guard_of(study)
    try:
        while study.poll() is None and not told:
            time.sleep(0.2)
            look(ended=False)
    finally:
        end_group(study, text_run.GRACE, lambda: len(told) > 1)
        guard.kill()
        guard.communicate()
        look(ended=True)
    print(f"{len(recorded)} run{'' if len(recorded) == 1 else 's'} recorded after {time.monotonic() - began:.0f} s")
    return 128 + told[0] if told else study.returncode or int(sick or not recorded)


if __name__ == "__main__":
    sys.exit(main())
