#!/usr/bin/env python
"""Compares patch training with token-level training at equal cost on real text.

    python benchmarks/text_run.py --text books.jsonl.zst --output /tmp/text \\
        --prepare-only        makes only tokenizer and dataset
    python benchmarks/text_run.py --text books.jsonl.zst --output /tmp/text \\
        --parallel 2 --seconds 90
    python benchmarks/text_run.py --tiny    a tiny model, in seconds

Without --text the text is the source of Python's standard library. Every run is
a process of pretrain_gpt_patch.py with checkpoints at the end of each stage and
evaluations on held-out text; --parallel 2 trains two small models at a time on
one GPU. Figures and the plot are written when a run ends. At the end of
--seconds, and after Ctrl-C or SIGTERM, unfinished runs save and stop, and their
results so far are recorded; a second signal ends them at once. A run that fails
does not stop the others.
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
GRACE_SECONDS = 20.0
"""Seconds in which a run can save before it is killed."""
RUNNING: list[subprocess.Popen[bytes]] = []
STOP_SIGNALS: list[tuple[int, float]] = []
"""Signals that stopped this program, with their time."""
TINY = {"layers": 2, "hidden": 64, "heads": 4, "ffn": 192, "vocab": 512, "seq_length": 64, "micro_batch_size": 4, "batch_tokens": "2k"}
TINY |= {"budget_tokens": "24k", "max_text": "400k", "lr": 5e-3}


def text_file(word: str) -> str:
    """Checks that a text file or glob exists, as the type of an argument.

    Raises:
        argparse.ArgumentTypeError: no such file exists.
    """
    if not Path(word).is_file() and not glob.glob(word):
        raise argparse.ArgumentTypeError(f"{word!r}: no such file (allowed: .txt or .jsonl, also compressed)")
    return word


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; the default sizes depend on whether there is a GPU."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text",
        type=text_file,
        nargs="+",
        default=[],
        help=".txt or .jsonl files, also compressed (default: the source of the standard library)",
    )
    parser.add_argument("--output", type=Path, default=None, help="folder for data and runs (default: a temporary one)")
    parser.add_argument(
        "--prepare-only", action="store_true", help="only make tokenizer and dataset, for a later call with the same --output"
    )
    parser.add_argument("--layers", type=count_from_one, default=8 if cuda else 4, help="blocks of the model")
    parser.add_argument("--hidden", type=count_from_one, default=384 if cuda else 192, help="hidden size")
    parser.add_argument("--heads", type=count_from_one, default=6, help="attention heads (default: 6)")
    parser.add_argument("--ffn", type=count_from_one, default=1024 if cuda else 512, help="width of the feed-forward layers")
    parser.add_argument(
        "--vocab", type=count_from_one, default=8192, help="vocabulary of the tokenizer that is trained on the text (default: 8192)"
    )
    parser.add_argument("--seq-length", type=count_from_one, default=512 if cuda else 128, help="positions per sample")
    parser.add_argument("--micro-batch-size", type=count_from_one, default=16 if cuda else 8, help="samples per micro-batch")
    parser.add_argument("--batch-tokens", default="32Ki" if cuda else "8Ki", help="tokens per step of token-level training")
    parser.add_argument(
        "--budget-tokens", default="12M" if cuda else "1M", help="tokens that token-level training reads; the other runs cost the same"
    )
    parser.add_argument(
        "--patch-sizes", type=count_from_one, nargs="+", default=[4], help="K of each run with patches and then tokens (default: 4)"
    )
    parser.add_argument(
        "--patch-fraction", type=Fraction, default=Fraction(2, 3), help="share of the tokens that patch stages read (default: 2/3)"
    )
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate, which decays to a tenth (default: 0.002)")
    parser.add_argument("--seed", type=int, default=1234, help="seed of weights and data order (default: 1234)")
    parser.add_argument("--evaluations", type=count_from_one, default=12, help="evaluations per run (default: 12)")
    parser.add_argument("--max-text", default="16M", help="bytes of text for training the tokenizer (default: 16M)")
    parser.add_argument("--workers", type=count_from_one, default=min(16, len(os.sched_getaffinity(0))), help="processes that tokenize")
    parser.add_argument("--parallel", type=count_from_one, default=1, help="runs at a time on the device (default: 1)")
    parser.add_argument("--seconds", type=float, default=0.0, help="time limit for all runs; 0 sets none (default: 0)")
    parser.add_argument("--flags", default="", help="further flags of pretrain_gpt_patch.py, such as --flags=--compile")
    parser.add_argument("--tiny", action="store_true", help="use a tiny model and little text in place of all sizes above")
    args = parser.parse_args(argv)
    if args.tiny:
        vars(args).update(TINY)
    args.budget = parse_count(args.budget_tokens)
    args.cuda = cuda
    return args


def environment(args: argparse.Namespace) -> dict[str, str]:
    """Returns the environment of a run: one rank with a free port, and on CPUs its share of the cores."""
    names = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in names}
    kept["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    if not args.cuda:
        cores = max(1, len(os.sched_getaffinity(0)) // args.parallel)
        kept |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(cores)}
    return kept


def run_tool(args: argparse.Namespace, *command: str) -> None:
    """Runs one of the tools.

    Raises:
        SystemExit: the tool failed.
    """
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment(args), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed with exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    print(f"{command[0]}: {time.perf_counter() - began:.1f} s", flush=True)


def prepare(args: argparse.Namespace, home: Path) -> Path:
    """Makes tokenizer and dataset unless they exist; returns the dataset prefix."""
    text = [str(Path(name).resolve()) for name in args.text]
    if not text:
        corpus = home / "data" / "train.jsonl"
        if not corpus.is_file():
            run_tool(args, "examples/quickstart/gather_corpus.py", "--output", str(home / "data"))
        text = [str(corpus)]
    tokenizer, prefix = home / "tokenizer", home / "data" / "text"
    if not (tokenizer / "tokenizer.json").is_file():
        options = ("--vocab-size", str(args.vocab), "--output", str(tokenizer), "--max-bytes", args.max_text)
        run_tool(args, "tools/train_tokenizer.py", "--input", *text, *options)
    dataset = Path(f"{prefix}_text_document")
    if not Path(f"{dataset}.json").is_file():
        kind = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer), "--append-eod", "--overwrite")
        workers = ("--workers", str(args.workers))
        run_tool(args, "tools/preprocess_data.py", "--input", *text, "--output-prefix", str(prefix), *kind, *workers)
    return dataset


def arms(args: argparse.Namespace) -> dict[str, tuple[int, list[str]]]:
    """Returns (tokens to read, flags of the recipe) of each run by name."""
    share = args.patch_fraction
    runs = {}
    for size in args.patch_sizes:
        recipe = ["--recipe", "patch-train", "--patch-size", str(size), "--patch-fraction", str(float(share))]
        runs[f"patches of {size}, then tokens"] = round(args.budget / (share / size + 1 - share)), recipe
    return {**runs, "token level": (args.budget, ["--recipe", "token-level"])}


def flags(args: argparse.Namespace, dataset: Path, tokens: int, recipe: list[str], save: Path) -> list[str]:
    """Returns the flags of a run."""
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


def run_outcome(save: Path) -> dict[str, Any] | None:
    """Returns the results of a run so far, or None before its first step.

    `held_out_loss` is None before the first evaluation; `loss` is that of the last step at its K; `cost` is in tokens at token level;
    `curve` has [tokens, cost, held-out loss at K = 1] of each evaluation; `ended` is the reason for the end of the run, or None.
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
    """Draws the loss curves of runs, if there are any; an error is printed, because figures also record the curves."""
    if not runs:
        return
    try:
        plot_runs(list(runs.values()), output, list(runs))
    except (MegatronPatchError, ImportError) as error:
        print(f"cannot draw the plot: {error}", file=sys.stderr)


def run_arm(args: argparse.Namespace, arguments: list[str], log: Path, seconds: float | None) -> int | None:
    """Runs the program; returns its exit code, -9 if it had to be killed, or None if it did not start because of a signal."""
    if STOP_SIGNALS:
        return None
    if seconds is not None:
        arguments = [*arguments, "--exit-duration", f"{max(1, int(seconds))}s"]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        command = [sys.executable, "-u", "pretrain_gpt_patch.py", *arguments]
        process = subprocess.Popen(command, cwd=ROOT, env=environment(args), stdout=file, stderr=subprocess.STDOUT)
        RUNNING.append(process)
        began = time.monotonic()
        try:
            if STOP_SIGNALS:
                # The signal came before this process was in the list.
                process.terminate()
            while (code := process.poll()) is None:
                limits = [STOP_SIGNALS[0][1] + GRACE_SECONDS] if STOP_SIGNALS else []
                limits += [began + seconds + GRACE_SECONDS] if seconds is not None else []
                if len(STOP_SIGNALS) > 1 or time.monotonic() > min(limits, default=math.inf):
                    return -9
                time.sleep(0.05)
            return code
        finally:
            process.kill()
            process.wait()


def exit_on_signal(number: int, frame: FrameType | None) -> None:
    """Signal handler while tools run, which end with this program.

    Raises:
        SystemExit: always.
    """
    raise SystemExit(128 + number)


def stop_runs(number: int, frame: FrameType | None) -> None:
    """Signal handler during runs: makes them save and stop."""
    STOP_SIGNALS.append((number, time.monotonic()))
    for process in RUNNING:
        process.terminate()


def on_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Installs a handler for the signals that stop this program."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def main(argv: list[str] | None = None) -> int:
    """Trains all arms; returns 1 if one failed or has a loss that is not finite, 143 or 130 after a signal."""
    args = parse(argv)
    on_signals(exit_on_signal)
    with tempfile.TemporaryDirectory() as temporary:
        home = (args.output or Path(temporary)).resolve()
        dataset = prepare(args, home)
        if args.prepare_only:
            return 0
        return train_arms(args, home, dataset)


def train_arms(args: argparse.Namespace, home: Path, dataset: Path) -> int:
    """Runs every arm, `--parallel` at a time, and returns the exit code."""
    # After a signal the runs save and stop, and their figures are still recorded.
    on_signals(stop_runs)
    results = Path(os.environ.get("RESULTS", home))
    metadata = json.loads(Path(f"{dataset}.json").read_text(encoding="utf-8"))
    began, deadline = time.monotonic(), args.seconds or None
    folders = {name: home / "runs" / name.replace(", ", "-").replace(" ", "-") for name in arms(args)}
    first = flags(args, dataset, args.budget, ["--recipe", "token-level"], home)
    shape = load_config([*first, "--vocab-size", str(metadata["vocab_size"]), "--dry-run"], 1).shape
    model = {"num_layers": args.layers, "hidden_size": args.hidden, "heads": args.heads, "ffn_hidden_size": args.ffn}
    model |= {"vocab_size": shape.vocab_size, "seq_length": args.seq_length}
    rounds = -(-len(folders) // args.parallel)
    done: dict[str, Path] = {}
    failures, rows, writing = 0, [], threading.Lock()

    def one(number: int, name: str) -> int | None:
        tokens, recipe = arms(args)[name]
        round_number = number // args.parallel
        left = None if deadline is None else (began + deadline - time.monotonic()) / (rounds - round_number)
        return run_arm(args, flags(args, dataset, tokens, recipe, folders[name]), home / "logs" / f"{folders[name].name}.log", left)

    with ThreadPoolExecutor(args.parallel) as pool:
        futures = {pool.submit(one, number, name): name for number, name in enumerate(folders)}
        for future in as_completed(futures):
            name = futures[future]
            code, reached = future.result(), run_outcome(folders[name])
            if code is None:
                print(f"{name}: not started", flush=True)
                continue
            log = home / "logs" / f"{folders[name].name}.log"
            (results / log.name).write_bytes(log.read_bytes()[-1_000_000:]) if results != home else None
            if not STOP_SIGNALS and (code not in (ExitCode.DONE, ExitCode.PREEMPTED) or reached is None):
                failures += 1
                print(f"{name} failed with exit code {code}\n{log.read_text(errors='replace')[-3000:]}", file=sys.stderr, flush=True)
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
                    data={"tokens": metadata["tokens"], "text": [Path(text).name for text in args.text] or ["Python's standard library"]},
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
    print_table(f"{format_count(parameter_count(shape).total)} parameters, runs of equal cost", heads, rows)
    return 128 + STOP_SIGNALS[0][0] if STOP_SIGNALS else 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
