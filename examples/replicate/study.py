#!/usr/bin/env python
"""A study of the method on any text: arms of equal cost times seeds, one table, one plot. Stopped at any moment, the same command goes on.

python examples/replicate/study.py --text 'books/*.txt' --output runs/study --config examples/replicate/study_cpu.yaml --seeds 3

Seeds are the outer loop: after the first, every arm can be compared. After each run OUTPUT/study.md, study.json and loss.png are written
again from the metrics of all runs that are done. `--status` only does that; `--plan` prints what would run, and what it reads.
With --seconds the study ends in time: runs under way save and stop, and the same command goes on with them; so it does where the study is
told to stop (Ctrl-C, SIGTERM), with exit code 75. On GPUs --parallel above
their number has several runs share one, which small models do not fill:

python examples/replicate/study.py --text 'books/*.txt' --output runs/study --config examples/replicate/study_gpu_minutes.yaml \
    --vocab-size 8192 --arms patch-k2 patch-k4 superposition-k2-long --seeds 1 --parallel 4 --seconds 120 --keep-going
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from pathlib import Path
from types import FrameType
from typing import Any, cast

from arms import Arm, select_arms
from publish import publish
from results import (
    COLOURS,
    Outcome,
    Row,
    markdown,
    plot_study,
    read_outcome,
    summarise,
    summarise_switches,
    verdict,
    write_json,
)
from rich.console import Console
from rich.table import Table
from switches import SwitchRow, plot_switches, switch_markdown

from megatron_patch.cli.command_line import ArgumentParser, run_tool
from megatron_patch.config.parsing import read_yaml
from megatron_patch.config.resolve import load_config
from megatron_patch.errors import ConfigError, DataError
from megatron_patch.exit_codes import ExitCode
from megatron_patch.model.flops import parameter_count
from megatron_patch.utils.files import write_durably
from megatron_patch.utils.units import format_count, format_duration, parse_count

ROOT = Path(__file__).resolve().parent.parent.parent
EVALUATIONS = 16
VOCAB_SIZE = "1024"


class Study:
    """A study in its folder.

    Args:
        args: of the command line.
        console: for people.

    Raises:
        ConfigError: wrong flags, or a folder that holds another study.
    """

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self.console, self.home, self.args = console, args.output.resolve(), args
        self.under_way: set[subprocess.Popen[bytes]] = set()
        self.told = 0
        values = read_yaml(args.config)
        values = {name.replace("_", "-"): value for name, value in values.items()}
        needed = ("train-tokens", "lr", "global-batch-tokens")
        missing = [name for name in needed if name not in values]
        if missing:
            raise ConfigError(
                f"{args.config} gives no {' and no '.join(missing)}",
                f"a file with {', '.join(needed)}",
                "see examples/replicate/study_cpu.yaml",
            )
        self.budget = parse_count(args.budget or values["train-tokens"])
        scale = float(values["lr"]), parse_count(values["global-batch-tokens"])
        self.arms, self.all_arms = select_arms(args.arms, *scale), select_arms([], *scale)
        self.seeds = list(range(1, args.seeds + 1))
        self.settings: dict[str, Any] = {
            "config": values,
            "budget": self.budget,
            "vocab_size": parse_count(args.vocab_size),
            "text": sorted(args.text),
        }
        self._check_folder()

    def _check_folder(self) -> None:
        path = self.home / "settings.json"
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            if not self.args.text:
                self.settings["text"] = before["text"]
            unlike = [name for name, value in self.settings.items() if json.loads(json.dumps(value, default=str)) != before.get(name)]
            if unlike:
                raise ConfigError(
                    f"{self.home} holds a study with another {' and '.join(unlike)}",
                    "the settings it began with; arms and seeds may be added",
                    "repeat them, or give another --output",
                )
        elif not self.args.text:
            raise ConfigError("no --text", "files of text: .txt, .jsonl, also compressed, or globs in quotes", "name them")

    @property
    def dataset(self) -> Path:
        """Prefix of the tokenized text."""
        return self.home / "data" / "text_text_document"

    def folder(self, arm: Arm, seed: int) -> Path:
        """A run's."""
        return self.home / "runs" / f"{arm.name}-seed{seed}"

    def words(self, arm: Arm, seed: int) -> list[str]:
        """A run's command line, behind `python`."""
        tokens = arm.train_tokens(self.budget)
        return [
            "pretrain_gpt_patch.py",
            *("--config", str(self.args.config), *arm.flags, "--train-tokens", str(tokens), "--seed", str(seed)),
            *("--data-path", str(self.dataset), "--split", "95,5,0", "--eval-interval-tokens", str(max(1, tokens // EVALUATIONS))),
            *("--eval-tokens", str(min(400_000, max(16_384, self.budget // 32))), "--log-interval", "50"),
            *("--save-interval-tokens", str(max(1, tokens // self.args.saves)), "--keep-last", "1", "--save", str(self.folder(arm, seed))),
        ]

    def prepare(self) -> None:
        """Tokenizer and dataset, once."""
        self.home.mkdir(parents=True, exist_ok=True)
        write_durably(self.home / "settings.json", json.dumps(self.settings, indent=1, default=str) + "\n")
        text, tokenizer = [str(path) for path in self.settings["text"]], self.home / "tokenizer"
        if not (tokenizer / "tokenizer.json").is_file():
            self.run(
                ["tools/train_tokenizer.py", "--input", *text, "--vocab-size", str(self.settings["vocab_size"]), "--output", str(tokenizer)]
            )
        if not self.dataset.with_suffix(".json").is_file():
            kind = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer), "--append-eod", "--overwrite")
            workers = ("--workers", str(min(16, len(os.sched_getaffinity(0)))))
            self.run(["tools/preprocess_data.py", "--input", *text, "--output-prefix", str(self.home / "data" / "text"), *kind, *workers])

    def run(self, words: Sequence[str], log: Path | None = None, share: Mapping[str, str] | None = None) -> bool:
        """One command of the program; its output goes to the screen, or to a log.

        Args:
            words: behind `python`.
            log: appended to.
            share: environment variables, from `share`.

        Returns:
            Whether it came to its end; else it was stopped, in time or as the study was told to, with all saved.

        Raises:
            DataError: it failed.
        """
        self.console.print(f"$ python {shlex.join(words)}", soft_wrap=True, markup=False)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(":"),
            **(share or {}),
        }
        if not _gpus():
            environment.setdefault("DS_ACCELERATOR", "cpu")
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.nullcontext() if log is None else log.open("ab") as file:
            process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stdout=file, stderr=file)
            self.under_way.add(process)
            if self.told:
                # It was not among the others when they were told.
                process.terminate()
            code = process.wait()
            self.under_way.discard(process)
        if code and code != ExitCode.PREEMPTED and not self.told:
            raise DataError(
                f"{words[0]} ended with code {code}", "0", f"read {log or 'the lines above'}; the same command goes on from here"
            )
        return code == 0

    def outcomes(self) -> list[Outcome]:
        """Of all runs that are done, also those of seeds beyond --seeds."""
        found = []
        for arm in self.all_arms:
            for folder in sorted((self.home / "runs").glob(f"{arm.name}-seed*")):
                seed = folder.name.removeprefix(f"{arm.name}-seed")
                if seed.isdigit() and (outcome := read_outcome(folder, arm.name, int(seed))) is not None:
                    found.append(outcome)
        return found

    def write(self) -> None:
        """Table, plot and numbers of what is done."""
        outcomes, arms = self.outcomes(), self.all_arms
        if not outcomes:
            self.console.print("no run is done yet")
            return
        rows = summarise(arms, outcomes, self.budget)
        switches = summarise_switches(arms, outcomes, self.budget)
        settings = json.loads(json.dumps(self.settings, default=str))
        write_json(self.home / "study.json", rows, switches, outcomes, settings, self.parameters())
        plot_study(self.home / "loss.png", arms, outcomes, self.budget, self.title())
        if switches:
            plot_switches(self.home / "switch.png", switches, COLOURS, "After the switch: above the baseline at equal cost")
        write_durably(self.home / "study.md", self.text(rows, switches, "loss.png", "switch.png"))
        if self.args.docs:
            name = self.args.docs_name or self.args.config.stem
            names = f"{name}.png", f"{name}_switch.png"
            pictures = dict(zip(names, (self.home / "loss.png", self.home / "switch.png"), strict=True))
            publish(self.args.docs, name, self.text(rows, switches, *names), pictures)
        table = Table(title=f"{len(outcomes)} run{'s' if len(outcomes) > 1 else ''} done", title_justify="left", header_style="bold")
        for name in ("arm", "seeds", "tokens", "cost", "steps", "held-out token loss", "against its baseline", ""):
            table.add_column(name, justify="left" if name in ("arm", "") else "right")
        for row in rows:
            spread = "" if row.spread is None else f" ± {row.spread:.3f}"
            error = "" if row.error is None else f" ± {row.error:.3f}"
            difference = "" if row.difference is None else f"{row.difference:+.3f}{error}"
            cells = (row.arm, str(row.seeds), format_count(row.tokens), f"{row.cost:.3f}", f"{row.steps:,}", f"{row.loss:.3f}{spread}")
            table.add_row(*cells, difference, verdict(row))
        self.console.print(table)

    def text(self, rows: Sequence[Row], switches: Sequence[SwitchRow], plot: str, switch_plot: str) -> str:
        """The study as Markdown, with pictures at these paths."""
        text = markdown(rows, self.all_arms, self.about(), self.command(), plot)
        return f"{text}\n{switch_markdown(switches, switch_plot)}" if switches else text

    def title(self) -> str:
        """Of the plot."""
        return f"Equal cost: every arm but token-full spends what token level spends on {format_count(self.budget)} tokens"

    @functools.cached_property
    def side(self) -> dict[str, Any]:
        """The dataset's side file."""
        return cast("dict[str, Any]", json.loads(self.dataset.with_suffix(".json").read_text(encoding="utf-8")))

    def parameters(self) -> int:
        """Of the model."""
        words = ["--config", str(self.args.config), "--vocab-size", str(self.side["vocab_size"]), "--dry-run"]
        return parameter_count(load_config(words, 1).shape).total

    def about(self) -> str:
        """Model, data, machine and date: what a number needs beside it."""
        config, side, parameters = self.settings["config"], self.side, self.parameters()
        return (
            f"{format_count(parameters)} parameters, {format_count(self.budget / parameters)} tokens each at token level: "
            f"{config['num-layers']} layers x {config['hidden-size']}, vocabulary {side['vocab_size']:,}, {config['seq-length']} positions "
            f"a sample, on {format_count(side['tokens'])} tokens of text, 5 % held out; budget: what token level spends on "
            f"{format_count(self.budget)} tokens. {machine()}, {date.today().isoformat()}."
        )

    def command(self) -> str:
        """The command that makes these numbers, with the text's place left to the reader."""
        path = self.args.config.resolve()
        config = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
        extra = f" --budget {self.args.budget}" if self.args.budget else ""
        extra += f" --vocab-size {self.args.vocab_size}" if self.args.vocab_size != VOCAB_SIZE else ""
        arms = f" --arms {' '.join(self.args.arms)}" if self.args.arms else ""
        seeds = max((outcome.seed for outcome in self.outcomes()), default=self.args.seeds)
        output = f"--text 'books/*.txt' --output runs/{self.home.name}"
        return f"python examples/replicate/study.py {output} --config {config}{extra}{arms} --seeds {seeds}"

    def print_plan(self) -> None:
        """What would run."""
        table = Table(title=f"Budget: {format_count(self.budget)} cost tokens an arm", title_justify="left", header_style="bold")
        for name in ("arm", "tokens", "cost", "what"):
            table.add_column(name, justify="right" if name in ("tokens", "cost") else "left")
        for arm in self.arms:
            table.add_row(arm.name, format_count(arm.train_tokens(self.budget)), f"{arm.cost / 2:g}", arm.what)
        self.console.print(table)
        self.console.print(f"{len(self.arms)} arms x {len(self.seeds)} seeds = {len(self.arms) * len(self.seeds)} runs")

    def go(self) -> None:
        """Every run that is not done, `--parallel` at a time, and the results after each.

        Raises:
            DataError: a run failed; those that had begun are waited for, and no other begins unless --keep-going says so.
            SystemExit: a signal told the study to stop, and all that was under way has ended.
        """
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._go()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Tells all runs to save and stop; another Ctrl-C goes to them as such, and they stop at once."""
        again = number == signal.SIGINT and self.told
        self.told = number
        for process in list(self.under_way):
            process.send_signal(signal.SIGINT if again else signal.SIGTERM)

    def _go(self) -> None:
        began, whole = time.monotonic(), len(self.arms) * len(self.seeds)
        self.prepare()
        left = [(arm, seed) for seed in self.seeds for arm in self.arms if read_outcome(self.folder(arm, seed), arm.name, seed) is None]
        places: queue.SimpleQueue[int] = queue.SimpleQueue()
        for place in range(self.args.parallel):
            places.put(place)

        def train(number: int, arm: Arm, seed: int) -> bool:
            place = places.get()
            try:
                words = self.words(arm, seed)
                if self.told:
                    return False
                if self.args.seconds is not None:
                    seconds = int(began + self.args.seconds - time.monotonic())
                    if seconds < 1:
                        return False
                    words += ["--exit-duration", f"{seconds}s"]
                self.console.print(f"\n[bold]{number} of {whole}: {arm.name}, seed {seed}[/bold]")
                return self.run(words, self.home / "logs" / f"{arm.name}-seed{seed}.log", self.share(place))
            finally:
                places.put(place)

        failures: list[BaseException] = []
        stopped = 0
        with ThreadPoolExecutor(self.args.parallel) as pool:
            runs = [pool.submit(train, number, *run) for number, run in enumerate(left, 1 + whole - len(left))]
            for made, run in enumerate(as_completed(runs), 1):
                if (error := run.exception()) is not None:
                    if not (self.args.keep_going and isinstance(error, DataError)):
                        pool.shutdown(cancel_futures=True)
                        raise error
                    failures.append(error)
                    self.console.print(str(error), style="red", markup=False)
                    continue
                if not run.result():
                    stopped += 1
                    continue
                self.write()
                self.console.print(f"about {format_duration((time.monotonic() - began) / made * (len(left) - made))} to go")
        if not left:
            self.write()
        if stopped:
            why = f", as {signal.Signals(self.told).name} said to stop" if self.told else " in time"
            self.console.print(f"{stopped} run{'s' if stopped > 1 else ''} not done{why}; the same command goes on")
        if self.told:
            raise SystemExit(ExitCode.PREEMPTED)
        if failures:
            raise failures[0]

    def share(self, place: int) -> dict[str, str]:
        """The environment that gives a run its part of the machine where several run at a time: a GPU, or cores."""
        if self.args.parallel == 1:
            return {}
        if gpus := _gpus():
            return {"CUDA_VISIBLE_DEVICES": str(place % len(gpus))}
        return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // self.args.parallel))}


def machine() -> str:
    """The devices, in words."""
    if gpus := _gpus():
        return f"{len(gpus)} x {gpus[0]}"
    return f"{len(os.sched_getaffinity(0))} CPU cores"


@functools.cache
def _gpus() -> tuple[str, ...]:
    """Names of the GPUs that the driver lists."""
    words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        listed = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError:
        return ()
    return () if listed.returncode else tuple(listed.stdout.strip().splitlines())


def main(argv: list[str]) -> None:
    """Runs the study."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", default=[], help="text to train on: .txt, .jsonl, also compressed, or globs in quotes")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "study", help="where everything goes")
    parser.add_argument("--config", type=Path, default=ROOT / "examples" / "replicate" / "study_cpu.yaml", help="model, batch and lr")
    parser.add_argument("--budget", help="cost tokens of an arm; by default the configuration's train-tokens")
    parser.add_argument("--arms", nargs="+", default=[], help="some arms alone, and the baselines that they need; --plan lists all")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm")
    parser.add_argument(
        "--parallel",
        type=int,
        default=1,
        help="runs at a time, each with its part of the cores, or with a GPU, which several share where there are fewer",
    )
    parser.add_argument("--seconds", type=float, help="for the whole study: runs that are not done by then save and stop")
    parser.add_argument("--keep-going", action="store_true", help="begin the other runs although one has failed")
    parser.add_argument("--saves", type=int, default=4, help="checkpoints of a run; 1 for runs of a minute")
    parser.add_argument("--vocab-size", default=VOCAB_SIZE, help="of the tokenizer that is trained on the text")
    parser.add_argument(
        "--docs",
        type=Path,
        help="a Markdown file to put the tables into, between <!-- NAME --> and <!-- end of NAME -->",
    )
    parser.add_argument("--docs-name", help="NAME there, and of the pictures; by default the configuration's")
    parser.add_argument("--plan", action="store_true", help="print what would run")
    parser.add_argument("--status", action="store_true", help="write table and plot of what is done, and run nothing")
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.parallel < 1 or args.saves < 1:
        raise ConfigError(f"--seeds {args.seeds}, --parallel {args.parallel}, --saves {args.saves}", "whole numbers from 1")
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=150)
    if args.plan and not args.text:
        args.text = ["-"]
    study = Study(args, console)
    if args.plan:
        study.print_plan()
    elif args.status:
        study.write()
    else:
        study.go()


if __name__ == "__main__":
    sys.exit(run_tool(main))
