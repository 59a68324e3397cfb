#!/usr/bin/env python
"""Patches then tokens, and token level at equal cost, on real text on one device: runs of the program, their curves and a plot.

    python benchmarks/text_run.py --text books.jsonl.zst --output /tmp/text --prepare-only       tokenizer and dataset alone, by the CPUs
    python benchmarks/text_run.py --text books.jsonl.zst --output /tmp/text --parallel 2 --seconds 90
    python benchmarks/text_run.py --tiny                                                         the same course in seconds

Without --text the text is the source of Python's own standard library. Every run is a process of pretrain_gpt_patch.py with checkpoints at
the ends of its stages and held-out losses on the way; --parallel 2 trains two at a time on one GPU, which small models do not fill. Figures
and the plot are written when a run ends. At --seconds a run saves and stops, and what it has reached counts; what fails costs itself alone.
So it is where this program is told to stop (Ctrl-C, SIGTERM); it ends when all runs have. A second time ends them at once.
"""

from __future__ import annotations

import argparse
import glob
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from _measure import print_table, record

from megatron_patch.cli.command_line import count_from_one
from megatron_patch.config.resolve import load_config
from megatron_patch.errors import MegatronPatchError
from megatron_patch.exit_codes import ExitCode
from megatron_patch.model.flops import parameter_count
from megatron_patch.reporting.plotting import plot_runs
from megatron_patch.training.callbacks.metrics import read_metrics
from megatron_patch.utils.units import format_count, parse_count

ROOT = Path(__file__).parent.parent
GRACE = 20.0
"""Seconds for a run that was to stop, before it is ended."""
UNDER_WAY: list[subprocess.Popen[bytes]] = []
TOLD: list[tuple[int, float]] = []
"""Signals that told this program to stop, and when."""
TINY = {"layers": 2, "hidden": 64, "heads": 4, "ffn": 192, "vocab": 512, "seq_length": 64, "micro_batch_size": 4, "batch_tokens": "2k"}
TINY |= {"budget_tokens": "24k", "max_text": "400k", "lr": 5e-3}


def text_file(word: str) -> str:
    """A file of text, or a glob, as the type of an argument.

    Raises:
        argparse.ArgumentTypeError: there is none.
    """
    if not Path(word).is_file() and not glob.glob(word):
        raise argparse.ArgumentTypeError(f"{word!r}: no such file (allowed: .txt or .jsonl, also compressed)")
    return word


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; sizes by default are those of a GPU or of a CPU."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text", type=text_file, nargs="+", default=[], help=".txt or .jsonl, also compressed; by default the standard library's source"
    )
    parser.add_argument("--output", type=Path, default=None, help="a folder for data and runs; by default one that is removed at the end")
    parser.add_argument("--prepare-only", action="store_true", help="tokenizer and dataset alone, for a later call with the same --output")
    parser.add_argument("--layers", type=count_from_one, default=8 if cuda else 4, help="blocks of the model")
    parser.add_argument("--hidden", type=count_from_one, default=384 if cuda else 192, help="width of the model")
    parser.add_argument("--heads", type=count_from_one, default=6, help="attention heads of a block")
    parser.add_argument("--ffn", type=count_from_one, default=1024 if cuda else 512, help="width inside the feed-forward layers")
    parser.add_argument("--vocab", type=count_from_one, default=8192, help="ids of the tokenizer that is trained on the text")
    parser.add_argument("--seq-length", type=count_from_one, default=512 if cuda else 128, help="positions of a sample, patches or tokens")
    parser.add_argument("--micro-batch-size", type=count_from_one, default=16 if cuda else 8, help="samples of a micro-batch")
    parser.add_argument("--batch-tokens", default="32Ki" if cuda else "8Ki", help="tokens of a step at token level")
    parser.add_argument(
        "--budget-tokens", default="12M" if cuda else "1M", help="tokens that token level reads; the other run costs as much"
    )
    parser.add_argument("--patch-sizes", type=count_from_one, nargs="+", default=[4], help="a run of patches and then tokens for each")
    parser.add_argument("--patch-fraction", type=Fraction, default=Fraction(2, 3), help="share of the tokens that are read in patches")
    parser.add_argument("--lr", type=float, default=2e-3, help="the highest learning rate; it falls to a tenth")
    parser.add_argument("--seed", type=int, default=1234, help="of weights and the order of samples")
    parser.add_argument("--evaluations", type=count_from_one, default=12, help="held-out losses of each run")
    parser.add_argument("--max-text", default="16M", help="bytes that the tokenizer is trained on")
    parser.add_argument("--workers", type=count_from_one, default=min(16, len(os.sched_getaffinity(0))), help="processes that tokenize")
    parser.add_argument("--parallel", type=count_from_one, default=1, help="runs at a time, on the same device")
    parser.add_argument("--seconds", type=float, default=0.0, help="for all runs together; 0: no limit")
    parser.add_argument("--flags", default="", help="more flags of pretrain_gpt_patch.py, such as --flags=--compile")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and little text in place of all sizes above")
    args = parser.parse_args(argv)
    if args.tiny:
        vars(args).update(TINY)
    args.budget = parse_count(args.budget_tokens)
    args.cuda = cuda
    return args


def environment(args: argparse.Namespace) -> dict[str, str]:
    """One rank, at a port that it finds itself; on CPUs with its share of the cores."""
    names = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in names}
    kept["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    if not args.cuda:
        cores = max(1, len(os.sched_getaffinity(0)) // args.parallel)
        kept |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(cores)}
    return kept


def run_tool(args: argparse.Namespace, *words: str) -> None:
    """One of the program's tools.

    Raises:
        SystemExit: it failed.
    """
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment(args), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{words[0]} ended with code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    print(f"{words[0]}: {time.perf_counter() - began:.1f} s", flush=True)


def prepare(args: argparse.Namespace, home: Path) -> Path:
    """Tokenizer and dataset, where they are not there yet; returns the dataset's prefix."""
    text = [str(Path(name).resolve()) for name in args.text]
    if not text:
        corpus = home / "data" / "train.jsonl"
        if not corpus.is_file():
            run_tool(args, "examples/quickstart/gather_corpus.py", "--output", str(home / "data"))
        text = [str(corpus)]
    tokenizer, prefix = home / "tokenizer", home / "data" / "text"
    if not (tokenizer / "tokenizer.json").is_file():
        words = ("--vocab-size", str(args.vocab), "--output", str(tokenizer), "--max-bytes", args.max_text)
        run_tool(args, "tools/train_tokenizer.py", "--input", *text, *words)
    dataset = Path(f"{prefix}_text_document")
    if not Path(f"{dataset}.json").is_file():
        kind = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer), "--append-eod", "--overwrite")
        workers = ("--workers", str(args.workers))
        run_tool(args, "tools/preprocess_data.py", "--input", *text, "--output-prefix", str(prefix), *kind, *workers)
    return dataset


def arms(args: argparse.Namespace) -> dict[str, tuple[int, list[str]]]:
    """Runs by name: (tokens to read, flags of its recipe)."""
    share = args.patch_fraction
    runs = {}
    for size in args.patch_sizes:
        recipe = ["--recipe", "patch-train", "--patch-size", str(size), "--patch-fraction", str(float(share))]
        runs[f"patches of {size}, then tokens"] = round(args.budget / (share / size + 1 - share)), recipe
    return {**runs, "token level": (args.budget, ["--recipe", "token-level"])}


def flags(args: argparse.Namespace, dataset: Path, tokens: int, recipe: list[str], save: Path) -> list[str]:
    """A run as flags of pretrain_gpt_patch.py."""
    sizes = {"num-layers": args.layers, "hidden-size": args.hidden, "num-attention-heads": args.heads, "ffn-hidden-size": args.ffn}
    sizes |= {"seq-length": args.seq_length, "micro-batch-size": args.micro_batch_size, "global-batch-tokens": args.batch_tokens}
    sizes |= {"train-tokens": tokens, "seed": args.seed, "lr": args.lr, "min-lr": args.lr / 10, "lr-warmup-fraction": 0.05}
    sizes |= {"eval-interval-tokens": max(1, tokens // args.evaluations), "eval-tokens": max(8192, args.budget // 32)}
    return [
        *(word for name, value in sizes.items() for word in (f"--{name}", str(value))),
        *recipe,
        *("--data-path", str(dataset), "--split", "95,5,0", "--save", str(save), "--keep-last", "1", "--log-interval", "20"),
        *(["--bf16"] if args.cuda else []),
        *args.flags.split(),
    ]


def outcome(save: Path) -> dict[str, Any] | None:
    """What a run has reached, or None where it has taken no step.

    `held_out_loss` is None before the first evaluation, `loss` is the last step's, at its own K; `cost` is in tokens at token level,
    `curve` has [tokens, cost, held-out loss at K = 1] of each evaluation, and `ended` says why the run ended, None where it did not say.
    """
    path = save / "metrics.jsonl"
    records = list(read_metrics(path)) if path.is_file() else []
    steps = [line for line in records if line["type"] == "step"]
    curve = [[line["tokens"], line["cost_tokens"], line["token_loss"]] for line in records if line["type"] == "evaluation"]
    if not steps:
        return None
    numbers = {"step": ("loss", "grad_norm"), "evaluation": ("token_loss", "patch_loss")}
    sick = [line["step"] for line in records if any(line[name] is None for name in numbers.get(line["type"], ()))]
    return {
        "patch_sizes": [size for size, _ in itertools.groupby(line["patch_size"] for line in steps)],
        "tokens": steps[-1]["tokens"],
        "cost": steps[-1]["cost_tokens"],
        "steps": len(steps),
        "seconds": sum(line["step_seconds"] for line in steps),
        "held_out_loss": curve[-1][2] if curve else None,
        "loss": steps[-1]["loss"],
        "curve": curve,
        "ended": next((line.get("reason") for line in reversed(records) if line["type"] in ("end", "start")), None),
        "steps_not_finite": sick,
        "tokens_per_second": steps[-1]["tokens_per_second"],
    }


def draw(runs: dict[str, Path], output: Path) -> None:
    """Draws the curves of runs, where there are any; without a plot the figures still have them."""
    if not runs:
        return
    try:
        plot_runs(list(runs.values()), output, list(runs))
    except (MegatronPatchError, ImportError) as error:
        print(f"no plot: {error}", file=sys.stderr)


def run_arm(args: argparse.Namespace, words: list[str], log: Path, seconds: float | None) -> int | None:
    """Runs the program; returns its exit code, -9 where it had to be ended, None where it was not begun, as all is to stop."""
    if TOLD:
        return None
    if seconds is not None:
        words = [*words, "--exit-duration", f"{max(1, int(seconds))}s"]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        command = [sys.executable, "-u", "pretrain_gpt_patch.py", *words]
        process = subprocess.Popen(command, cwd=ROOT, env=environment(args), stdout=file, stderr=subprocess.STDOUT)
        UNDER_WAY.append(process)
        began = time.monotonic()
        try:
            if TOLD:
                # It was not in the list yet when the others were told.
                process.terminate()
            while (code := process.poll()) is None:
                limits = [TOLD[0][1] + GRACE] if TOLD else []
                limits += [began + seconds + GRACE] if seconds is not None else []
                if len(TOLD) > 1 or time.monotonic() > min(limits, default=math.inf):
                    return -9
                time.sleep(0.05)
            return code
        finally:
            process.kill()
            process.wait()


def leave(number: int, frame: FrameType | None) -> None:
    """A handler of signals while tools run, which end with this program.

    Raises:
        SystemExit: always.
    """
    raise SystemExit(128 + number)


def tell_runs(number: int, frame: FrameType | None) -> None:
    """A handler of signals while runs are under way: they save and stop."""
    TOLD.append((number, time.monotonic()))
    for process in UNDER_WAY:
        process.terminate()


def on_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Handles what tells this program to stop."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def main(argv: list[str] | None = None) -> int:
    """Trains all arms and returns 1 where one failed, or has a loss that is not finite; 143 or 130 where a signal has ended it."""
    args = parse(argv)
    on_signals(leave)
    with tempfile.TemporaryDirectory() as temporary:
        home = (args.output or Path(temporary)).resolve()
        dataset = prepare(args, home)
        if args.prepare_only:
            return 0
        return train_arms(args, home, dataset)


def train_arms(args: argparse.Namespace, home: Path, dataset: Path) -> int:
    """Runs every arm, `--parallel` at a time."""
    # Whoever ends this process before its time has the runs save and stop, and still finds their figures.
    on_signals(tell_runs)
    results = Path(os.environ.get("RESULTS", home))
    side = json.loads(Path(f"{dataset}.json").read_text(encoding="utf-8"))
    began, deadline = time.monotonic(), args.seconds or None
    folders = {name: home / "runs" / name.replace(", ", "-").replace(" ", "-") for name in arms(args)}
    first = flags(args, dataset, args.budget, ["--recipe", "token-level"], home)
    shape = load_config([*first, "--vocab-size", str(side["vocab_size"]), "--dry-run"], 1).shape
    model = {"num_layers": args.layers, "hidden_size": args.hidden, "heads": args.heads, "ffn_hidden_size": args.ffn}
    model |= {"vocab_size": shape.vocab_size, "seq_length": args.seq_length}
    turns = -(-len(folders) // args.parallel)
    done: dict[str, Path] = {}
    failures, rows, writing = 0, [], threading.Lock()

    def one(number: int, name: str) -> int | None:
        tokens, recipe = arms(args)[name]
        turn = number // args.parallel
        left = None if deadline is None else (began + deadline - time.monotonic()) / (turns - turn)
        return run_arm(args, flags(args, dataset, tokens, recipe, folders[name]), home / "logs" / f"{folders[name].name}.log", left)

    with ThreadPoolExecutor(args.parallel) as pool:
        futures = {pool.submit(one, number, name): name for number, name in enumerate(folders)}
        for future in as_completed(futures):
            name = futures[future]
            code, reached = future.result(), outcome(folders[name])
            if code is None:
                print(f"{name}: not begun", flush=True)
                continue
            log = home / "logs" / f"{folders[name].name}.log"
            (results / log.name).write_bytes(log.read_bytes()[-1_000_000:]) if results != home else None
            if not TOLD and (code not in (ExitCode.DONE, ExitCode.PREEMPTED) or reached is None):
                failures += 1
                print(f"{name} ended with code {code}\n{log.read_text(errors='replace')[-3000:]}", file=sys.stderr, flush=True)
            if reached is None:
                continue
            failures += bool(reached["steps_not_finite"])
            with writing:
                record(
                    "run",
                    name=name,
                    **reached,
                    exit_code=code,
                    model=model,
                    parameters=parameter_count(shape).total,
                    data={"tokens": side["tokens"], "text": [Path(text).name for text in args.text] or ["Python's standard library"]},
                    at_a_time=args.parallel,
                )
                if reached["curve"]:
                    done[name] = folders[name]
                rows.append(
                    [
                        name,
                        format_count(reached["tokens"]),
                        format_count(reached["cost"]),
                        f"{reached['steps']:,}",
                        f"{reached['seconds']:.1f}",
                        f"{reached['held_out_loss']:.4f}" if reached["held_out_loss"] is not None else "-",
                        str(reached["ended"]),
                    ]
                )
                draw(done, results / "text_run.png")
    heads = ["run", "tokens", "cost", "steps", "seconds", "held-out loss", "ended"]
    print_table(f"{format_count(parameter_count(shape).total)} parameters, equal cost", heads, rows)
    return 128 + TOLD[0][0] if TOLD else 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
