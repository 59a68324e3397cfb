"""What a study would run, and on a GPU for how long (**estimated**). In: arms, seeds, settings, a device. Out: a table on the console."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from megatron_patch.config.resolve import load_config
from megatron_patch.planning.hardware import Hardware, load_hardware
from megatron_patch.planning.layout import layout_of
from megatron_patch.planning.plan import make_plan
from megatron_patch.replication.arms import Arm
from megatron_patch.training.pretrain import make_engine_config
from megatron_patch.utils.units import format_count, format_duration, plural


def print_plan(console: Console, arms: Sequence[Arm], seeds: int, budget: int, settings: Mapping[str, Any], gpu: str | None) -> None:
    """Prints the arms, the number of runs, and the estimated time of their steps.

    Args:
        console: where to print.
        arms: in the order of their runs.
        seeds: runs per arm.
        budget: cost tokens per arm.
        settings: `config`, the options of all runs, and `vocab_size`.
        gpu: name of the device; None leaves the times out.

    Raises:
        ConfigError: there is no such device, or an arm's options are wrong.
    """
    device = None if gpu is None else load_hardware(gpu)
    times = ("min", "sum of min") if device else ()
    table = Table(title=f"Budget: {format_count(budget)} cost tokens per arm", title_justify="left", header_style="bold")
    for name in ("arm", "tokens", "cost", *times, "description"):
        table.add_column(name, justify="left" if name in ("arm", "description") else "right")
    total = 0.0
    for arm in arms:
        minutes: tuple[str, ...] = ()
        if device:
            seconds = planned_seconds(arm, budget, settings, device)
            total += seconds
            minutes = (f"{seconds / 60:.1f}", f"{total / 60:.1f}")
        table.add_row(arm.name, format_count(arm.train_tokens(budget)), f"{arm.cost / 2:g}", *minutes, arm.description)
    console.print(table)
    console.print(f"{plural(len(arms), 'arm')} x {plural(seeds, 'seed')} = {plural(len(arms) * seeds, 'run')}")
    if device:
        console.print(
            f"estimated on one {device.name}, run by run: {format_duration(total * seeds)} for the steps of all runs, without starts, "
            "evaluations and saves. Small models do not fill a GPU: they take longer than this, and several at a time (--parallel) little "
            "longer than one",
            soft_wrap=True,
        )


def planned_seconds(arm: Arm, budget: int, settings: Mapping[str, Any], device: Hardware) -> float:
    """Returns the estimated seconds of an arm's steps on one device."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(yaml.safe_dump(settings["config"]), encoding="utf-8")
        flags = [*arm.flags, "--train-tokens", str(arm.train_tokens(budget)), "--vocab-size", str(settings["vocab_size"])]
        run = load_config(["--config", str(config), *flags, "--dry-run"], 1)
    plan = make_plan(run.shape, run.plan, layout_of(run, make_engine_config(run)), device, run.options.stages.seq_length)
    return plan.run.seconds
