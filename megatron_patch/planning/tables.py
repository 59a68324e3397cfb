"""Tables of plans, searches and simulations on a console. Estimates are marked with ~."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from megatron_patch.model.flops import attention_flops, forward_flops_per_position
from megatron_patch.model.shape import ModelShape
from megatron_patch.planning.hardware import Hardware
from megatron_patch.planning.layout import PlannedOptimizer
from megatron_patch.planning.memory import COUNTED_PARTS
from megatron_patch.planning.plan import PipelinePart, Plan, Resources, StageEstimate
from megatron_patch.planning.published import calibration
from megatron_patch.planning.reliability import Simulation
from megatron_patch.planning.search import BATCH_TOLERANCE, Candidate, Found
from megatron_patch.utils.console import labeled
from megatron_patch.utils.tables import FittingTable
from megatron_patch.utils.units import format_count, format_duration, plural

GIB = 2**30
_PARTS = ("weights", "gradients", "optimizer", "activations", "loss", "buffers", "fragmentation")


def _table(title: str, *columns: str, left: Sequence[str] = ()) -> FittingTable:
    return FittingTable(title, columns, left=left)


def rank_table(parts: Sequence[PipelinePart], shape: ModelShape) -> FittingTable:
    """Returns layers, parameters and memory of each rank, with one row per pipeline rank."""
    # Only Muon's step allocates buffers for matrices, and mostly they are smaller than what the backward pass has freed.
    shown = _PARTS + (("matrices",) if any(part.memory.matrices for part in parts) else ())
    marks = [name if name in COUNTED_PARTS else f"~{name}" for name in shown]
    title = "Per rank: parameters (exact) and memory in GiB (~ is estimated)"
    table = _table(title, "pipeline rank", "ranks", "layers", "parameters", *marks, "~total", left=("layers",))
    for part in parts:
        memory = part.memory.to_json()
        table.add_row(
            str(part.pipeline_rank),
            f"{part.ranks:,}",
            part.describe(shape.num_layers),
            f"{part.parameters:,}",
            *(f"{memory[name] / GIB:,.2f}" for name in shown),
            f"{part.memory.total / GIB:,.2f}",
        )
    return table


def _step_shares(estimate: StageEstimate, full_matrices: bool, context: bool, experts: bool) -> dict[str, str]:
    """Returns the shares of a step by the headings of their columns."""
    time = estimate.time
    shares = {"~computation": f"{time.compute / time.total:.1%}", "bubble": f"{estimate.bubble:.1%}"}
    parts = {
        "~tensor": time.tensor,
        "~context": time.context,
        "~experts": time.experts,
        "~pipeline": time.pipeline,
        "~data": time.data,
        "~optimizer": time.optimizer,
    }
    parts |= {"~Newton-Schulz": time.orthogonalization, "~matrices": time.matrices}
    unused = (set() if context else {"~context"}) | (set() if experts else {"~experts"})
    unused |= set() if full_matrices else {"~Newton-Schulz", "~matrices"}
    return shares | {name: f"{seconds / time.total:.1%}" for name, seconds in parts.items() if name not in unused}


def stage_table(plan: Plan) -> FittingTable:
    """Returns time, throughput and FLOPs of each stage."""
    speed = ["stage", "K", "steps", "FLOPs", "~step", "~MFU", "~tokens/s", "~time"]
    # These kinds have columns only where they are used.
    full, context = plan.layout.optimizer.full_matrices, max(plan.layout.context) > 1
    rows = [_step_shares(estimate, full, context, plan.layout.experts > 1) for estimate in plan.stages]
    if context:
        speed.insert(1, "ranks per sample")
        speed.insert(5, "in attention")
    table = _table("Stages on this hardware; the last columns are shares of the step", *speed, *rows[0], left=("stage",))
    for estimate, shares in zip(plan.stages, rows, strict=True):
        stage, time = estimate.stage, estimate.time
        cells = [
            stage.name,
            str(stage.patch_size),
            f"{stage.steps:,}",
            f"{estimate.flops:.3g}",
            f"{time.total:.3g} s" if time.total < 999.5 else f"{time.total:,.0f} s",
            f"{time.mfu:.1%}",
            format_count(stage.tokens_per_step / time.total),
            format_duration(estimate.seconds),
        ]
        if context:
            attention = attention_flops(plan.shape, stage.positions, range(plan.shape.num_layers))
            cells.insert(1, str(stage.context_parallel_size))
            cells.insert(5, f"{attention / forward_flops_per_position(plan.shape, stage.positions):.1%}")
        table.add_row(*cells, *shares.values())
    return table


def traffic_table(plan: Plan) -> FittingTable:
    """Returns the bytes that a rank sends per step."""
    table = _table("Bytes sent by one rank per step (counted)", "stage", "parallelism", "link", "GB", left=("stage", "parallelism", "link"))
    for estimate in plan.stages:
        for row in estimate.traffic:
            table.add_row(
                estimate.stage.name, row.kind, row.link, f"{row.bytes / 1e9:,.0f}" if row.bytes >= 1e11 else f"{row.bytes / 1e9:.3g}"
            )
    return table


def resource_table(plan: Plan) -> FittingTable:
    """Returns the resources of the run next to those of token-level training."""
    columns = ("", "tokens", "~device hours", "~dollars", "~time", "FLOPs")
    title = f"Budget at ${plan.hardware.dollars_per_hour:g} per {plan.hardware.name} hour, an example"
    table = _table(title, *columns, left=("",))
    rows: list[tuple[str, Resources]] = [
        ("this plan", plan.run),
        ("token level, same tokens", plan.token_level),
        ("token level, same cost", plan.equal_cost),
    ]
    for name, resources in rows:
        hours, dollars = f"{resources.device_hours:,.0f}", f"${resources.dollars:,.0f}"
        table.add_row(name, format_count(resources.tokens), hours, dollars, format_duration(resources.seconds), f"{resources.flops:.3g}")
    return table


def print_tables(plan: Plan, console: Console) -> None:
    """Prints every table of a plan."""
    optimizer = "" if plan.layout.optimizer == PlannedOptimizer() else f", {plan.layout.optimizer.name}"
    console.print(Text.assemble((f"{plan.layout.ranks:,} x {plan.hardware.name}", "bold"), f": {plan.layout.name()}{optimizer}"))
    console.print(rank_table(plan.parts, plan.shape))
    console.print(stage_table(plan))
    if any(estimate.traffic for estimate in plan.stages):
        console.print(traffic_table(plan))
    console.print(resource_table(plan))
    saved = plan.checkpoints
    ends = f", so the run takes ~{format_duration(plan.run.seconds / saved.goodput)}" if saved.goodput else ""
    console.print(
        labeled(
            "Checkpoints",
            f"{saved.bytes / GIB:,.1f} GiB each. With a failure every ~{format_duration(saved.mtbf_seconds)} on "
            f"{plural(plan.layout.ranks, 'device')} and {saved.save_seconds:g} s per save, save every "
            f"~{format_duration(saved.daly_seconds)} (~{plural(saved.steps, 'step')}; Young's formula: "
            f"{format_duration(saved.young_seconds)}): ~{saved.goodput:.1%} of the time trains{ends}",
        )
    )
    need = f"~{plan.fullest.memory.total / GIB:,.1f} GiB on the fullest rank, in stage {plan.fullest.peak_stage}; "
    if plan.fits:
        console.print(labeled("Memory", f"{need}it fits into {plan.hardware.usable_text()}"))
    else:
        console.print(labeled("Memory", f"{need}it does not fit into {plan.hardware.usable_text()}", "bold red"))
    _print_caveats(plan.hardware, console)


def _print_caveats(hardware: Hardware, console: Console) -> None:
    counted = "Counted: parameters, FLOPs, weights, optimizer, activations, bytes sent, bubble. Estimated (~): everything else."
    console.print(f"{counted} {calibration(hardware)}", style="dim")


def _given_text(given: Plan, candidates: Sequence[Candidate]) -> str:
    text = f"{given.layout.name()}, ~{given.fullest.memory.total / GIB:,.1f} GiB, ~{given.run.device_hours:,.0f} device hours"
    if not given.fits:
        return f"{text}; it does not fit into {given.hardware.usable_text()}"
    if not candidates:
        return text
    more = (given.run.seconds / given.run.tokens) / candidates[0].seconds_per_token - 1
    return f"{text}, {more:.0%} more than the fastest" if more >= 0.005 else f"{text}, as fast as the fastest"


def print_search(found: Found, hardware: Hardware, ranks: int, console: Console, rows: int = 12) -> None:
    """Prints the fastest layouts, and the flags of each below the table."""
    shown = found.candidates[:rows]
    columns = ("", "layout", "micro-batch", "~GiB", "~device hours", "~MFU")
    fit = "fits" if len(found.candidates) == 1 else "fit"
    kept = f", and {found.other_batch:,} would change the global batch by more than {BATCH_TOLERANCE:.0%}" if found.other_batch else ""
    console.print(
        labeled(
            "Search",
            f"{found.tried:,} layouts and micro-batches on {plural(ranks, 'device')}; "
            f"{plural(len(found.candidates), 'layout')} {fit}{kept}",
        )
    )
    if found.given is not None:
        console.print(labeled("Given", _given_text(found.given, found.candidates)))
    if not shown:
        return
    table = _table("The fastest layouts", *columns, left=("layout",))
    for number, candidate in enumerate(shown, start=1):
        plan = candidate.plan
        mfu = " / ".join(dict.fromkeys(f"{estimate.time.mfu:.0%}" for estimate in plan.stages))
        row = [str(number), plan.layout.name(), str(candidate.choice.micro_batch_size), f"{plan.fullest.memory.total / GIB:.1f}"]
        row += [f"{plan.run.device_hours:,.0f}", mfu]
        table.add_row(*row)
    console.print(table)
    for number, candidate in enumerate(shown, start=1):
        console.print(labeled(f"{number}", candidate.flags))
    _print_caveats(hardware, console)


def print_simulation(simulation: Simulation, devices: int, interval: float, console: Console) -> None:
    """Prints how the wall time of a simulated run is spent."""
    table = _table(
        f"Simulated run on {plural(devices, 'device')}, one checkpoint per {format_duration(interval)}", "", "time", "share", left=("",)
    )
    for name, seconds in (
        ("useful steps", simulation.useful_seconds),
        ("repeated steps", simulation.lost_seconds),
        ("checkpoints", simulation.save_seconds),
        ("restarts", simulation.down_seconds),
    ):
        table.add_row(name, format_duration(seconds), f"{seconds / simulation.wall_seconds:.1%}")
    table.add_section()
    table.add_row("wall time", format_duration(simulation.wall_seconds), "100.0%")
    console.print(table)
    stages = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in simulation.stage_seconds.items())
    counts = f"{plural(simulation.failures, 'failure')}, {plural(simulation.preemptions, 'preemption')}"
    console.print(Text.assemble((f"Goodput {simulation.goodput:.1%}", "bold"), f"; {counts}; {stages}"))
