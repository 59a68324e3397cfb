#!/usr/bin/env python
"""The quick start: from text to a pretrained model and a report.

`make quickstart` calls this script. It gathers a corpus from Python's
standard library, trains a tokenizer, preprocesses the corpus, pretrains both
stages with the `deepspeed` launcher, evaluates, generates, plots and writes a
report. It prints each command before it runs. Finished steps are skipped, and
a stopped run resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_patch.training.callbacks.metrics import read_metrics
from megatron_patch.utils.console import labeled, make_console
from megatron_patch.utils.tables import FittingTable
from megatron_patch.utils.units import format_count, format_duration

ROOT = Path(__file__).parent.parent.parent
CONFIG = "examples/configs/quickstart.yaml"
PROMPT = "def main(args):\n"


@dataclass(frozen=True)
class Folders:
    """Paths of the quick start, below one folder."""

    home: Path

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer."""
        return self.home / "tokenizer"

    def text(self, part: str) -> Path:
        """Returns the file with the documents of a part of the corpus, "train" or "held_out"."""
        return self.home / "data" / f"{part}.jsonl"

    def dataset(self, part: str) -> str:
        """Returns the dataset prefix of a part of the corpus."""
        return str(self.home / "data" / f"{part}_text_document")


class Steps:
    """Runs commands, prints each of them, and stops at the first that fails."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def run(self, title: str, *arguments: str | Path, capture: bool = False) -> str:
        """Runs one command and returns its output if `capture` is set.

        Raises:
            SystemExit: the command failed.
        """
        command = [str(word) for word in arguments]
        self.console.print(f"\n{title}", style="bold")
        self.console.print(f"$ {shlex.join(_short(word) for word in command)}", soft_wrap=True)
        result = subprocess.run(command, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE if capture else None, text=True, check=False)
        if result.returncode:
            self.console.print(f"{title}: the command failed with exit code {result.returncode}; see its last lines above", style="red")
            raise SystemExit(result.returncode)
        return result.stdout or ""


def _short(word: str) -> str:
    """Returns a path inside the repository relative to its root."""
    return os.path.relpath(word, ROOT) if word.startswith(str(ROOT)) else word


def _environment() -> dict[str, str]:
    """Returns the environment of the commands: the virtual environment's programs first, and DeepSpeed on the CPU without a GPU."""
    bin_folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "TOKENIZERS_PARALLELISM": "true"}
    if devices() == 0:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def devices() -> int:
    """Returns the number of GPUs of this machine."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except OSError:
        return 0
    return listed.stdout.count("GPU ") if listed.returncode == 0 else 0


def prepare(steps: Steps, folders: Folders) -> None:
    """Makes the corpus, the tokenizer and the datasets that do not exist yet."""
    python = sys.executable
    if not folders.text("train").is_file():
        steps.run(
            "1. Gather a corpus: the source of the standard library",
            python,
            "examples/quickstart/gather_corpus.py",
            "--output",
            folders.home / "data",
        )
    if not (folders.tokenizer / "tokenizer.json").is_file():
        steps.run(
            "2. Train a tokenizer",
            python,
            "tools/train_tokenizer.py",
            "--input",
            folders.text("train"),
            "--vocab-size",
            "4096",
            "--output",
            folders.tokenizer,
        )
    for part in ("train", "held_out"):
        if not Path(folders.dataset(part) + ".json").is_file():
            steps.run(
                f"3. Preprocess the {part} documents",
                *(python, "tools/preprocess_data.py", "--input", folders.text(part), "--output-prefix", folders.home / "data" / part),
                *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folders.tokenizer, "--append-eod"),
                *("--workers", "2", "--overwrite"),
            )


def pretrain(steps: Steps, folders: Folders, name: str, title: str, *flags: str) -> Path:
    """Trains or resumes a run with the deepspeed launcher, and returns its folder."""
    save = folders.home / name
    ranks = devices() or min(2, len(os.sched_getaffinity(0)))
    data = ("--data-path", folders.dataset("train"), "--valid-data-path", folders.dataset("held_out"), "--save", str(save))
    steps.run(title, "deepspeed", "--num_gpus", str(ranks), "pretrain_gpt_patch.py", "--config", CONFIG, *data, *flags)
    return save


def records(save: Path, kind: str) -> list[dict[str, Any]]:
    """Returns the metrics records of one type of a run."""
    path = save / "metrics.jsonl"
    return [record for record in read_metrics(path) if record["type"] == kind] if path.is_file() else []


def finished(save: Path) -> bool:
    """Returns whether a run has trained to its end."""
    ends = records(save, "end")
    return bool(ends) and ends[-1]["reason"] == "done"


def stage_rows(save: Path) -> list[tuple[str, ...]]:
    """Returns the cells of `COLUMNS` for each stage, and for the run in the last row."""
    rows: list[tuple[str, ...]] = []
    steps_seen = records(save, "step")
    evaluations = records(save, "evaluation")
    for index in sorted({record["stage_index"] for record in steps_seen}):
        mine = [record for record in steps_seen if record["stage_index"] == index]
        before = [record for record in steps_seen if record["stage_index"] < index]
        tokens = mine[-1]["tokens"] - (before[-1]["tokens"] if before else 0)
        cost_tokens = mine[-1]["cost_tokens"] - (before[-1]["cost_tokens"] if before else 0.0)
        seconds = sum(record["step_seconds"] for record in mine)
        held_out = [record["token_loss"] for record in evaluations if record["stage_index"] == index]
        rows.append(
            (
                mine[0]["stage"],
                str(mine[0]["patch_size"]),
                format_count(tokens),
                f"{len(mine):,}",
                f"{mine[-1]['loss']:.3f}",
                f"{held_out[-1]:.3f}" if held_out else "",
                format_count(tokens / seconds),
                f"{cost_tokens / tokens:.3f}",
                format_duration(seconds),
            )
        )
    last = steps_seen[-1]
    total = sum(record["step_seconds"] for record in steps_seen)
    rows.append(
        (
            "total",
            "",
            format_count(last["tokens"]),
            f"{len(steps_seen):,}",
            "",
            f"{evaluations[-1]['token_loss']:.3f}",
            format_count(last["tokens"] / total),
            f"{last['cost']:.3f}",
            format_duration(total),
        )
    )
    return rows


COLUMNS = ("stage", "K", "tokens", "steps", "training loss at K", "held-out loss at K = 1", "tokens/s", "cost", "time")


def report(console: Console, runs: Sequence[tuple[str, Path]], evaluation: dict[str, Any], sample: str, plot: Path, page: Path) -> None:
    """Prints the results and what to do next."""
    console.print("\nResults", style="bold")
    for label, save in runs:
        table = FittingTable(label, COLUMNS, left=("stage",))
        rows = stage_rows(save)
        for row in rows[:-1]:
            table.add_row(*row)
        table.add_section()
        table.add_row(*rows[-1])
        console.print(table)
    last = records(runs[0][1], "evaluation")[-1]
    console.print(
        f"The final model has two held-out losses, both in nats per token at K = 1. During training, it was {last['token_loss']:.3f} on "
        f"{last['eval_tokens']:,} tokens, a part of the held-out text that is small enough to be evaluated often: that is the loss of the "
        f"table and the plot. The evaluation after training read all of it: loss {evaluation['loss']:.4f}, perplexity "
        f"{evaluation['perplexity']:.2f}, on {evaluation['tokens']:,} tokens. Report this one."
    )
    if len(runs) > 1:
        console.print(compare(runs))
    console.print()
    console.print(labeled("Sample", f"after {PROMPT!r}:"))
    console.print(sample.rstrip("\n"))
    save = runs[0][1]
    newest = f"{_short(str(save))}/{(save / 'latest').read_text().strip()}"
    console.print(
        f"\nreport      {_short(str(page))} (open it in a browser)\nplot        {_short(str(plot))}\ncheckpoint  {newest}\n"
        f"metrics     {_short(str(save / 'metrics.jsonl'))}\n"
    )
    console.print("Next", style="bold")
    console.print(
        "  make compare                                  train at token level for equal cost, on the same plot\n"
        f"  python tools/generate.py --load {_short(str(save))} --prompt 'import os'\n"
        "  python pretrain_gpt_patch.py --help           list every flag; --dry-run prints a plan without data or GPUs\n"
        "  README.md, docs/method.md                     use your own data; what patches do\n"
    )


def compare(runs: Sequence[tuple[str, Path]]) -> str:
    """Returns a sentence that compares the final losses of the two runs."""
    patch, token = (records(save, "evaluation")[-1] for _, save in runs[:2])
    difference = patch["token_loss"] - token["token_loss"]
    direction = "lower" if difference < 0 else "higher"
    compute = format_count(token["cost_tokens"])
    return (
        f"At equal cost (the compute of {compute} tokens at token level), patches then tokens ends {abs(difference):.3f} nats {direction} "
        f"than token-level training ({patch['token_loss']:.3f} against {token['token_loss']:.3f}), with one seed each. The method gains "
        "least with small models and corpora; see docs/method.md."
    )


def main() -> int:
    """Runs the quick start; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="also train at token level for equal cost")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "runs" / "quickstart", help="folder for data, runs and plot (default: runs/quickstart)"
    )
    args = parser.parse_args()
    console = make_console(width=150)
    folders, steps = Folders(args.output.resolve()), Steps(console)
    started = time.monotonic()
    prepare(steps, folders)
    patch = folders.home / "patch"
    if finished(patch):
        console.print(f"\n{_short(str(patch))} is finished; remove the folder to train again")
    else:
        pretrain(steps, folders, "patch", "4. Pretrain: patches of 4, then tokens")
    runs = [("patches, then tokens", patch)]
    if args.compare:
        spent = records(patch, "step")[-1]["cost_tokens"]
        token = folders.home / "token_level"
        if not finished(token):
            pretrain(
                steps,
                folders,
                "token_level",
                "5. Pretrain the baseline: token level at equal cost",
                *("--recipe", "token-level", "--patch-size", "1", "--patch-fraction", "None", "--train-tokens", str(round(spent))),
            )
        runs.append(("token level, equal cost", token))
    evaluated = steps.run(
        "Evaluate", sys.executable, "tools/evaluate.py", "--load", patch, "--data-path", folders.dataset("held_out"), capture=True
    )
    sample = steps.run(
        "Generate", sys.executable, "tools/generate.py", "--load", patch, "--prompt", PROMPT, "--max-new-tokens", "120", capture=True
    )
    plot = folders.home / "loss.png"
    labels = [label for label, _ in runs]
    steps.run("Plot", sys.executable, "tools/plot.py", *(save for _, save in runs), "--labels", *labels, "--output", plot)
    page = folders.home / "report.html"
    steps.run("Report", sys.executable, "tools/report.py", *(save for _, save in runs), "--labels", *labels, "--output", page)
    report(console, runs, json.loads(evaluated.strip().splitlines()[-1]), sample, plot, page)
    console.print(f"finished in {format_duration(time.monotonic() - started)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
