"""A study: trains every arm with every seed at equal cost, and writes a table and a plot.

In: the parsed command line of `cli/study.py`. Out: OUTPUT/study.md, study.json and loss.png, and the records of the runs. All arms run with
the first seed, then with the next one, so that arms can be compared early. A study that has stopped resumes by the same command. A record
stands for its run, whose folder may be missing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import queue
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from megatron_patch.config.parsing import read_yaml
from megatron_patch.config.resolve import load_config
from megatron_patch.errors import ConfigError, DataError
from megatron_patch.exit_codes import ExitCode
from megatron_patch.model.flops import parameter_count
from megatron_patch.optimizers.registry import OPTIMIZERS
from megatron_patch.programs import HOME, as_called, in_checkout, shipped
from megatron_patch.replication.arms import Arm, all_arms, is_learning_rate, select_arms
from megatron_patch.replication.dry_plan import print_plan
from megatron_patch.replication.origin import note_origin, read_origin
from megatron_patch.replication.processes import Processes
from megatron_patch.replication.publish import publish
from megatron_patch.replication.records import (
    RunRecord,
    StudyHeader,
    StudyText,
    check_same_arm,
    check_same_study,
    read_records,
    write_records,
)
from megatron_patch.replication.results import (
    COLORS,
    MAIN_ARMS,
    Row,
    end_date,
    markdown,
    plot_study,
    read_outcome,
    significance,
    summarize,
    summarize_switches,
    write_json,
)
from megatron_patch.replication.routing import routing_markdown
from megatron_patch.replication.section import study_section
from megatron_patch.replication.switches import SwitchRow, plot_switches, switch_markdown
from megatron_patch.utils.files import write_durably
from megatron_patch.utils.units import format_count, format_duration, parse_count, plural

EVALUATIONS = 16
"""Evaluations per run."""
VOCAB_SIZE = "1024"
"""Default of --vocab-size."""


class Study:
    """A study and its folder.

    Args:
        args: the parsed command line.
        console: where progress is printed.
        more_arms: arms in addition to those of arms.py.

    Raises:
        ConfigError: a flag is wrong, or the folder holds another study.
    """

    def __init__(self, args: argparse.Namespace, console: Console, more_arms: Sequence[Arm] = ()) -> None:
        self.console, self.output, self.args = console, args.output.resolve(), args
        self.processes = Processes(console, args.parallel)
        values = {name.replace("_", "-"): value for name, value in read_yaml(args.config).items()}
        self.config_as_given = "study" not in values
        section = study_section(args.config, values.pop("study", None))
        needed = ("train-tokens", "lr", "global-batch-tokens")
        missing = [name for name in needed if name not in values]
        if missing:
            raise ConfigError(
                f"{args.config} does not set {' and '.join(missing)}",
                f"a file that sets {', '.join(needed)}",
                f"add them, as in {shipped('examples/replicate/study_cpu.yaml')}",
            )
        self.budget = parse_count(args.budget or values["train-tokens"])
        self.more_arms = more_arms
        _check_rates(args.config, values)
        lr = float(values["lr"])
        self.min_lr_share = float(values["min-lr"]) / lr if "min-lr" in values else None
        given = section.get("optimizers", {"adamw": {}})
        optimizers = {**given, **{name: {} for name in OPTIMIZERS if name not in given}}
        self.all_arms = all_arms(lr, parse_count(values["global-batch-tokens"]), more_arms, optimizers, self.min_lr_share)
        names = args.arms or section.get("arms") or [arm.name for arm in self.all_arms if arm.optimizer in given]
        self.arms = select_arms(names, self.all_arms, self.min_lr_share)
        self.seeds = list(range(1, args.seeds + 1))
        self.settings: dict[str, Any] = {
            "config": values,
            "budget": self.budget,
            "vocab_size": parse_count(args.vocab_size or section.get("vocab-size", VOCAB_SIZE)),
            "text": sorted(args.text),
        }
        self.recorded: tuple[StudyHeader, list[RunRecord]] | None = None
        if args.records and args.records.is_file():
            self.recorded = read_records(args.records)
            shared = {name: self.settings[name] for name in ("config", "budget", "vocab_size")}
            check_same_study(args.records, asdict(self.recorded[0]), shared)
        if not args.plan:  # a plan reads and writes no folder
            self._check_folder()
        self._check_records()

    def _check_records(self) -> None:
        """Adds the arms of runs whose names have options, and compares the options of every record with those of its arm."""
        runs = (self.output / "runs").glob("*-seed*")
        named = {folder.name.rpartition("-seed")[0] for folder in runs} | {record.run[0] for record in self.records()}
        named |= {arm.name for arm in self.arms}
        known = {arm.name for arm in self.all_arms}
        added = sorted(name for name in named if "+" in name and name.partition("+")[0] in known)
        self.all_arms += tuple(arm for name in added for arm in select_arms([name], self.all_arms, self.min_lr_share) if arm.name == name)
        by_name = {arm.name: arm for arm in self.all_arms}
        for record in self.records():
            if record.run[0] in by_name:
                check_same_arm(self.args.records, record, by_name[record.run[0]].options)

    def records(self) -> list[RunRecord]:
        """Returns the records that the study began with."""
        return [] if self.recorded is None else self.recorded[1]

    def _check_folder(self) -> None:
        path = self.output / "settings.json"
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            if not self.args.text:
                self.settings["text"] = before["text"]
            changed = [name for name, value in self.settings.items() if json.loads(json.dumps(value, default=str)) != before.get(name)]
            if changed:
                raise ConfigError(
                    f"{self.output} holds a study with another {' and '.join(changed)}",
                    "the settings that the study began with; only arms and seeds may be added",
                    "repeat those settings, or choose another --output",
                )
        elif not self.args.text and not (self.args.status and self.recorded):
            raise ConfigError(
                "--text is missing", "text files (.txt or .jsonl, also compressed) or quoted globs", "name the files to train on"
            )

    @property
    def dataset(self) -> Path:
        """Prefix of the tokenized text."""
        return self.output / "data" / "text_text_document"

    def run_folder(self, arm: Arm, seed: int) -> Path:
        """Returns the folder of a run."""
        return self.output / "runs" / f"{arm.name}-seed{seed}"

    def run_command(self, arm: Arm, seed: int) -> list[str]:
        """Returns the command line of a run, without `python`."""
        tokens = arm.train_tokens(self.budget)
        return [
            *(("-m", "megatron_patch.pretrain") if arm.program is None else (arm.program,)),
            *("--config", str(self.run_config), *arm.flags, "--train-tokens", str(tokens), "--seed", str(seed)),
            *("--data-path", str(self.dataset), "--split", "95,5,0", "--eval-interval-tokens", str(max(1, tokens // EVALUATIONS))),
            *(() if "eval-tokens" in self.settings["config"] else ("--eval-tokens", str(min(400_000, max(16_384, self.budget // 32))))),
            *("--log-interval", "50"),
            *(
                "--save-interval-tokens",
                str(max(1, tokens // self.args.saves)),
                "--keep-last",
                "1",
                "--save",
                str(self.run_folder(arm, seed)),
            ),
        ]

    @property
    def run_config(self) -> Path:
        """The configuration of the training program: the study's file, or its copy without the section `study`."""
        return self.args.config if self.config_as_given else self.output / "config.yaml"

    def write_run_config(self) -> None:
        """Writes `run_config`, unless it is the study's file."""
        if not self.config_as_given:
            self.output.mkdir(parents=True, exist_ok=True)
            write_durably(self.run_config, yaml.safe_dump(self.settings["config"], sort_keys=False))

    def prepare(self) -> None:
        """Trains the tokenizer and tokenizes the text, unless both exist."""
        self.output.mkdir(parents=True, exist_ok=True)
        self.write_run_config()
        write_durably(self.output / "settings.json", json.dumps(self.settings, indent=1, default=str) + "\n")
        text, tokenizer = [str(path) for path in self.settings["text"]], self.output / "tokenizer"
        if not (tokenizer / "tokenizer.json").is_file():
            self.processes.run(
                [
                    "-m",
                    "megatron_patch",
                    "train-tokenizer",
                    "--input",
                    *text,
                    "--vocab-size",
                    str(self.settings["vocab_size"]),
                    "--output",
                    str(tokenizer),
                ]
            )
        if not self.dataset.with_suffix(".json").is_file():
            kind = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer), "--append-eod", "--overwrite")
            workers = ("--workers", str(min(16, len(os.sched_getaffinity(0)))))
            self.processes.run(
                [
                    "-m",
                    "megatron_patch",
                    "preprocess",
                    "--input",
                    *text,
                    "--output-prefix",
                    str(self.output / "data" / "text"),
                    *kind,
                    *workers,
                ]
            )

    def finished(self) -> list[RunRecord]:
        """Returns the record of every finished run, including seeds beyond --seeds: those given first, then those of run folders."""
        arms = {arm.name: arm for arm in self.all_arms}
        found = [record for record in self.records() if record.run[0] in arms]
        done = {record.run for record in found}
        for arm, seed in self._run_folders():
            if (arm.name, seed) not in done and (outcome := read_outcome(folder := self.run_folder(arm, seed), arm.name, seed)) is not None:
                found.append(RunRecord(outcome, arm.options, *read_origin(folder), end_date(folder)))
        return found

    def _run_folders(self) -> Iterator[tuple[Arm, int]]:
        """Yields arm and seed of every folder of a run, finished or not, in the order of the arms."""
        for arm in self.all_arms:
            seeds = [folder.name.removeprefix(f"{arm.name}-seed") for folder in (self.output / "runs").glob(f"{arm.name}-seed*")]
            for seed in sorted(int(seed) for seed in seeds if seed.isdigit()):
                yield arm, seed

    @functools.cached_property
    def header(self) -> StudyHeader:
        """What all runs share, from the records if there are any."""
        if self.recorded is not None:
            return self.recorded[0]
        config = json.loads(json.dumps(self.settings["config"], default=str))
        return StudyHeader(config, self.budget, self.settings["vocab_size"], self.count_parameters(), self.text())

    def text(self) -> StudyText:
        """Returns the tokenized text, which must exist."""
        known = json.loads(self.dataset.with_suffix(".json").read_text(encoding="utf-8"))
        return StudyText(known["documents"], known["tokens"], known["vocab_size"], known["bin_xxh64"])

    def count_parameters(self) -> int:
        """Returns the number of parameters of the model, for the vocabulary of the tokenized text."""
        self.write_run_config()
        flags = ["--config", str(self.run_config), "--vocab-size", str(self.text().vocab_size), "--dry-run"]
        return parameter_count(load_config(flags, 1).shape).total

    def write(self) -> None:
        """Writes the report, the plots and study.json from all finished runs, and prints the table."""
        self.output.mkdir(parents=True, exist_ok=True)
        records, arms = self.finished(), self.all_arms
        if not records:
            self.console.print("no run has finished yet")
            return
        if self.args.records:
            others = [record for record in self.records() if record.run[0] not in {arm.name for arm in arms}]
            write_records(self.args.records, self.header, [*records, *others])
            if others:
                names = ", ".join(sorted({record.run[0] for record in others}))
                self.console.print(f"left out of the tables, as this study has no such arm: {names}", soft_wrap=True)
        outcomes = [record.outcome for record in records]
        rows = summarize(arms, outcomes, self.budget)
        switches = summarize_switches(arms, outcomes, self.budget)
        settings = json.loads(json.dumps(self.settings, default=str))
        write_json(self.output / "study.json", rows, switches, outcomes, settings, self.header.parameters)
        main_arms = (*MAIN_ARMS, *(arm.name for arm in self.more_arms))
        plot_study(self.output / "loss.png", arms, outcomes, self.budget, self.title(), main_arms)
        if switches:
            plot_switches(self.output / "switch.png", switches, COLORS, "Loss gap to the baseline at equal cost, after the switch")
        write_durably(self.output / "study.md", self.report(rows, switches, "loss.png", "switch.png", records))
        if self.args.docs:
            name = self.args.docs_name or self.args.config.stem
            plot_names = f"{name}.png", f"{name}_switch.png"
            plots = dict(zip(plot_names, (self.output / "loss.png", self.output / "switch.png"), strict=True))
            publish(self.args.docs, name, self.report(rows, switches, *plot_names, records), plots)
        table = Table(title=f"{plural(len(outcomes), 'run')} finished", title_justify="left", header_style="bold")
        for name in ("arm", "seeds", "tokens", "cost", "steps", "held-out token loss", "difference to its baseline", ""):
            table.add_column(name, justify="left" if name in ("arm", "") else "right")
        for row in rows:
            spread = "" if row.spread is None else f" ± {row.spread:.3f}"
            error = "" if row.error is None else f" ± {row.error:.3f}"
            difference = "" if row.difference is None else f"{row.difference:+.3f}{error}"
            cells = (row.arm, str(row.seeds), format_count(row.tokens), f"{row.cost:.3f}", f"{row.steps:,}", f"{row.loss:.3f}{spread}")
            table.add_row(*cells, difference, significance(row))
        self.console.print(table)

    def report(self, rows: Sequence[Row], switches: Sequence[SwitchRow], plot: str, switch_plot: str, records: Sequence[RunRecord]) -> str:
        """Returns the study as Markdown that shows the plots at these paths."""
        seeds = max(record.run[1] for record in records)
        text = markdown(rows, self.all_arms, self.description(records), self.command(seeds), plot)
        text = f"{text}\n{switch_markdown(switches, switch_plot)}" if switches else text
        routings = {arm.name: [r.outcome.routing for r in records if r.run[0] == arm.name and r.outcome.routing] for arm in self.all_arms}
        routings = {arm: runs for arm, runs in routings.items() if runs}
        return f"{text}\n{routing_markdown(routings)}" if routings else text

    def title(self) -> str:
        """Returns the title of the plot."""
        return f"Equal cost: every arm but token-full costs as much as token-level training on {format_count(self.budget)} tokens"

    def description(self, records: Sequence[RunRecord]) -> str:
        """Returns model, data, budget, machines and dates in one paragraph, to be read with the numbers."""
        config, text, parameters = self.settings["config"], self.header.text, self.header.parameters
        where = sorted({(record.machine, record.date) for record in records})
        return (
            f"{format_count(parameters)} parameters, {format_count(self.budget / parameters)} tokens per parameter at token level: "
            f"{config['num-layers']} layers x {config['hidden-size']}, vocabulary {text.vocab_size:,}, {config['seq-length']} "
            f"positions per sample, on {format_count(text.tokens)} tokens of text, 5 % held out; budget: the cost of token-level "
            f"training on {format_count(self.budget)} tokens. {'; '.join(f'{machine}, {day}' for machine, day in where)}."
        )

    def command(self, seeds: int) -> str:
        """Returns the command that reproduces the numbers of this many seeds; the reader inserts the location of the text."""
        path = self.args.config.resolve()
        config = path.relative_to(HOME) if path.is_relative_to(HOME) and in_checkout() else path.name
        extra = f" --budget {self.args.budget}" if self.args.budget else ""
        extra += f" --vocab-size {self.args.vocab_size}" if self.args.vocab_size else ""
        arms = f" --arms {' '.join(self.args.arms)}" if self.args.arms else ""
        script = f"python {Path(sys.argv[0]).name}" if self.more_arms else as_called("python examples/replicate/study.py")
        output = f"--text 'books/*.txt' --output runs/{self.output.name}"
        return f"{script} {output} --config {config}{extra}{arms} --seeds {seeds}"

    def print_plan(self) -> None:
        """Prints the arms and the number of runs, with --gpu also the estimated time of their steps."""
        print_plan(self.console, self.arms, len(self.seeds), self.budget, self.settings, self.args.gpu)

    def train_all(self) -> None:
        """Trains every unfinished run, `--parallel` at a time, and writes the results after each.

        Raises:
            DataError: a run failed. Without --keep-going no other run starts; those under way finish first.
            SystemExit: a signal stopped the study, after every process that was under way has ended.
        """
        with self.processes.stopped_by_signals():
            self._train_all()

    def _train_all(self) -> None:
        start, total = time.monotonic(), len(self.arms) * len(self.seeds)
        todo = self.unfinished()
        if todo:
            self.prepare()
            if self.recorded is not None:
                check_same_study(self.args.records, {"text": asdict(self.header.text)}, {"text": asdict(self.text())})
        slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(self.args.parallel):
            slots.put(slot)

        def train(number: int, arm: Arm, seed: int) -> bool:
            slot = slots.get()
            try:
                command = self.run_command(arm, seed)
                if self.processes.stop_signal:
                    return False
                if self.args.seconds is not None:
                    seconds = int(start + self.args.seconds - time.monotonic())
                    if seconds < 1:
                        return False
                    command += ["--exit-duration", f"{seconds}s"]
                self.console.print(f"\nrun {number} of {total}: {arm.name}, seed {seed}", style="bold")
                note_origin(self.run_folder(arm, seed))
                return self.processes.run(command, self.output / "logs" / f"{arm.name}-seed{seed}.log", slot)
            finally:
                slots.put(slot)

        failures: list[BaseException] = []
        stopped = 0
        with ThreadPoolExecutor(self.args.parallel) as pool:
            runs = [pool.submit(train, number, *run) for number, run in enumerate(todo, 1 + total - len(todo))]
            for ended, run in enumerate(as_completed(runs), 1):
                if (error := run.exception()) is not None:
                    if not (self.args.keep_going and isinstance(error, DataError)):
                        pool.shutdown(cancel_futures=True)
                        raise error
                    failures.append(error)
                    self.console.print(str(error), style="red")
                    continue
                if not run.result():
                    stopped += 1
                    continue
                self.write()
                remaining = (time.monotonic() - start) / ended * (len(todo) - ended)
                self.console.print(f"about {format_duration(remaining)} remaining")
        if not todo:
            self.write()
        if stopped:
            reason = (
                f"stopped by {signal.Signals(self.processes.stop_signal).name}" if self.processes.stop_signal else "--seconds has passed"
            )
            self.console.print(f"{plural(stopped, 'run')} not finished ({reason}); run the same command again to resume")
        if self.processes.stop_signal:
            raise SystemExit(ExitCode.PREEMPTED)
        if failures:
            raise failures[0]

    def unfinished(self) -> list[tuple[Arm, int]]:
        """Returns the runs to train, in order: those without a record and without the folder of a finished run."""
        done = {record.run for record in self.records()}
        return [
            (arm, seed)
            for seed in self.seeds
            for arm in self.arms
            if (arm.name, seed) not in done and read_outcome(self.run_folder(arm, seed), arm.name, seed) is None
        ]


def _check_rates(path: Path, values: Mapping[str, Any]) -> None:
    """Raises ConfigError if `lr` or `min-lr` of the configuration is not a learning rate."""
    rates = {name: values[name] for name in ("lr", "min-lr") if name in values}
    wrong = [name for name, rate in rates.items() if not is_learning_rate(rate) and not (name == "min-lr" and rate in (0, "0"))]
    if wrong:
        raise ConfigError(
            f"{path}: {' and '.join(f'{name} is {rates[name]!r}' for name in wrong)}",
            "lr: a number above 0; min-lr: a number from 0",
            "correct the file",
        )
