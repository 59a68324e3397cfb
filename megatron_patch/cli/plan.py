"""Predicts memory, time and cost of a run.

python tools/plan.py --config CONFIG.yaml --gpu H100 --world-size 64

Accepts every flag of pretrain_gpt_patch.py; a flag overrides the file. Prints
the memory of each rank, the time of a step, the cost relative to token-level
training and the best checkpoint interval. If the dataset exists, it also
prints how often each stage reads each corpus.

Ends with code 7 if a rank needs more memory than a device has; the plan is
printed nevertheless.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_patch.cli.command_line import ArgumentParser
from megatron_patch.config.parsing import parse
from megatron_patch.config.resolve import resolve
from megatron_patch.errors import ConfigError
from megatron_patch.planning.hardware import DEVICES, load_hardware
from megatron_patch.planning.layout import layout_of
from megatron_patch.planning.plan import make_plan
from megatron_patch.planning.published import published_table
from megatron_patch.planning.reliability import LLAMA3_DEVICE_HOURS, Interruptions, simulate
from megatron_patch.planning.search import search
from megatron_patch.planning.sensitivity import plot_sensitivity
from megatron_patch.planning.tables import print_search, print_simulation, print_tables
from megatron_patch.training.dry_run import print_megatron
from megatron_patch.training.pretrain import make_engine_config
from megatron_patch.training.stream import corpus_usage_json, corpus_usage_table, open_stream_if_present
from megatron_patch.utils.console import labeled, make_console, print_lines


def arguments() -> ArgumentParser:
    """Returns the parser of the tool's own flags; all other flags belong to the run."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", default="H100", help=f"{', '.join(DEVICES)}, or any name with --ceilings (default: H100)")
    parser.add_argument("--ceilings", type=Path, help="JSON file of your own measurements: matmul_efficiency, dollars_per_hour, …")
    parser.add_argument("--world-size", type=int, default=8, help="number of devices (default: 8)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of tables")
    parser.add_argument("--search", action="store_true", help="rank the layouts that fit, fastest first")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="write a plot of cost and device hours over K and λ")
    parser.add_argument("--published", action="store_true", help="print what the plan says about published runs, as Markdown, and end")
    parser.add_argument("--simulate", action="store_true", help="simulate the run with failures and preemptions")
    parser.add_argument(
        "--device-hours-per-failure",
        type=float,
        default=LLAMA3_DEVICE_HOURS,
        help=f"mean hours between failures of one device (default: {LLAMA3_DEVICE_HOURS:,.0f}, from arXiv 2407.21783, table 5)",
    )
    parser.add_argument("--preemptions-per-day", type=float, default=0.0, help="mean preemptions of the job per day (default: 0)")
    parser.add_argument("--save-seconds", type=float, default=60.0, help="seconds that a checkpoint pauses training (default: 60)")
    parser.add_argument("--restart-seconds", type=float, default=600.0, help="seconds from a failure to the next step (default: 600)")
    parser.add_argument("--simulation-seed", type=int, default=0, help="seed of the simulated interruptions (default: 0)")
    return parser


def main(argv: list[str]) -> None:
    """Runs the tool.

    Raises:
        ConfigError: a flag is wrong, or the run cannot be planned.
        DoesNotFitError: the plan, or every layout of a search, needs more memory than a device has; it was printed before.
    """
    args, rest = arguments().parse_known_args(argv)
    if args.published:
        if argv != ["--published"]:
            raise ConfigError("--published together with other flags", "--published alone", "remove the other flags")
        print_lines("\n".join(published_table()))
        return
    if args.world_size < 1:
        raise ConfigError(f"--world-size {args.world_size}", "whole numbers from 1", "give the number of devices")
    parsed = parse([*rest, "--dry-run"], "tools/plan.py")
    device = load_hardware(args.gpu, args.ceilings)
    console = make_console()
    if parsed.megatron is not None:
        print_megatron(parsed.megatron, make_console(stderr=True) if args.json else console)
    if args.search and (args.simulate or args.plot is not None):
        raise ConfigError(
            f"--search with {'--simulate' if args.simulate else '--plot'}",
            "one of these flags at a time",
            "run --search first, then plan one of its layouts",
        )
    if args.search:
        found = search(parsed, args.world_size, device)
        if args.json:
            print(json.dumps([{"flags": one.flags, **one.plan.to_json()} for one in found.candidates]))
        else:
            print_search(found, device, args.world_size, console)
        found.check(device)
        return
    interruptions = Interruptions(
        device_hours=args.device_hours_per_failure,
        preemptions_per_day=args.preemptions_per_day,
        save_seconds=args.save_seconds,
        restart_seconds=args.restart_seconds,
    )
    run = resolve(parsed, args.world_size)
    plan = make_plan(run.shape, run.plan, layout_of(run, make_engine_config(run)), device, run.options.stages.seq_length, interruptions)
    stream, notes = open_stream_if_present(run)
    result: dict[str, Any] = plan.to_json()
    if stream is not None:
        result["data"] = corpus_usage_json(stream)
    simulation = None
    if args.simulate:
        simulation = simulate(plan.work(), args.world_size, interruptions, plan.checkpoints.daly_seconds, args.simulation_seed)
        result["simulated"] = {**dataclasses.asdict(simulation), "goodput": simulation.goodput}
    if args.plot is not None:
        plot_sensitivity(plan, args.plot)
    if args.json:
        print(json.dumps(result))
    else:
        print_tables(plan, console)
        if stream is not None:
            console.print(corpus_usage_table(stream))
        for note in (*run.notes, *notes):
            console.print(labeled("Note", note, "yellow"))
        if simulation is not None:
            print_simulation(simulation, args.world_size, plan.checkpoints.daly_seconds, console)
        if args.plot is not None:
            console.print(f"wrote {args.plot}")
    plan.check_memory()
