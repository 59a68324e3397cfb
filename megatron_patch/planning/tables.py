"""Tables of plans, searches and simulations on a console. Estimates are marked with ~."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from megatron_patch.model.shape import ModelShape
from megatron_patch.planning.hardware import Hardware
from megatron_patch.planning.memory import COUNTED_PARTS
from megatron_patch.planning.plan import PipelinePart, Plan, Resources
from megatron_patch.planning.published import calibration
from megatron_patch.planning.reliability import Simulation
from megatron_patch.planning.search import BATCH_TOLERANCE, Found
from megatron_patch.utils.console import labeled
from megatron_patch.utils.units import format_count, format_duration, plural

GIB = 2**30
_PARTS = ("weights", "gradients", "optimizer", "activations", "loss", "buffers", "fragmentation")


def _table(title: str, *columns: str, left: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    return table


class _Fitting:
    """The first of several renderables that fits into the console's width, else the last."""

    def __init__(self, *widest_first: RenderableType) -> None:
        self._choices = widest_first

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yields the chosen renderable."""
        fitting = (one for one in self._choices if Measurement.get(console, options.update(width=10_000), one).maximum <= options.max_width)
        yield next(fitting, self._choices[-1])


def rank_table(parts: Sequence[PipelinePart], shape: ModelShape) -> RenderableType:
    """Returns layers, parameters and memory of each rank, with one row per pipeline rank; in a narrow terminal as two tables."""
    marks = {name: name if name in COUNTED_PARTS else f"~{name}" for name in _PARTS}
    title = "Per rank: parameters (exact) and memory in GiB (~ is estimated)"
    wide = _table(title, "pipeline rank", "ranks", "layers", "parameters", *marks.values(), "~total", left=("layers",))
    narrow = _table("Per rank: parameters (exact)", "pipeline rank", "ranks", "layers", "parameters", "~GiB", left=("layers",))
    fullest = max(parts, key=lambda part: part.memory.total)
    memory = _table(f"Pipeline rank {fullest.pipeline_rank}, the fullest", "part", "GiB", left=("part",))
    for part in parts:
        numbers = part.memory.to_json()
        row = (str(part.pipeline_rank), f"{part.ranks:,}", part.describe(shape.num_layers), f"{part.parameters:,}")
        wide.add_row(*row, *(f"{numbers[name] / GIB:.2f}" for name in _PARTS), f"{part.memory.total / GIB:.2f}")
        narrow.add_row(*row, f"{part.memory.total / GIB:.2f}")
    for name, mark in marks.items():
        memory.add_row(mark, f"{fullest.memory.to_json()[name] / GIB:.2f}")
    memory.add_section()
    memory.add_row("~total", f"{fullest.memory.total / GIB:.2f}")
    return _Fitting(wide, Group(narrow, memory))


def stage_table(plan: Plan) -> RenderableType:
    """Returns time, throughput and FLOPs of each stage; in a narrow terminal as two tables."""
    first = ("stage", "K", "steps", "FLOPs", "~step", "~MFU", "~tokens/s", "~time")
    second = ("~computation", "bubble", "~tensor", "~pipeline", "~data", "~optimizer")
    wide = _table("Stages on this hardware; the last columns are shares of the step", *first, *second, left=("stage",))
    speed = _table("Stages on this hardware", *first, left=("stage",))
    shares = _table("Shares of the step", "stage", *second, left=("stage",))
    for estimate in plan.stages:
        stage, time = estimate.stage, estimate.time
        row = (
            stage.name,
            str(stage.patch_size),
            f"{stage.steps:,}",
            f"{estimate.flops:.3g}",
            f"{time.total:.3g} s",
            f"{time.mfu:.1%}",
            format_count(stage.tokens_per_step / time.total),
            format_duration(estimate.seconds),
        )
        parts = (time.tensor, time.pipeline, time.data, time.optimizer)
        tensor, pipeline, data, optimizer = (f"{seconds / time.total:.1%}" for seconds in parts)
        rest = (f"{time.compute / time.total:.1%}", f"{estimate.bubble:.1%}", tensor, pipeline, data, optimizer)
        wide.add_row(*row, *rest)
        speed.add_row(*row)
        shares.add_row(stage.name, *rest)
    return _Fitting(wide, Group(speed, shares))


def traffic_table(plan: Plan) -> Table:
    """Returns the bytes that a rank sends per step."""
    table = _table("Bytes sent by one rank per step (counted)", "stage", "parallelism", "link", "GB", left=("stage", "parallelism", "link"))
    for estimate in plan.stages:
        for row in estimate.traffic:
            table.add_row(
                estimate.stage.name, row.kind, row.link, f"{row.bytes / 1e9:,.0f}" if row.bytes >= 1e11 else f"{row.bytes / 1e9:.3g}"
            )
    return table


def resource_table(plan: Plan) -> RenderableType:
    """Returns the resources of the run next to those of token-level training; in a narrow terminal without FLOPs."""
    columns = ("", "tokens", "~device hours", "~dollars", "~time")
    title = f"Budget at ${plan.hardware.dollars_per_hour:g} per {plan.hardware.name} hour, an example"
    wide, narrow = _table(title, *columns, "FLOPs", left=("",)), _table(title, *columns, left=("",))
    rows: list[tuple[str, Resources]] = [
        ("this plan", plan.run),
        ("token level, same tokens", plan.token_level),
        ("token level, same cost", plan.equal_cost),
    ]
    for name, resources in rows:
        row = [name, format_count(resources.tokens), f"{resources.device_hours:,.0f}"]
        row += [f"${resources.dollars:,.0f}", format_duration(resources.seconds)]
        wide.add_row(*row, f"{resources.flops:.3g}")
        narrow.add_row(*row)
    return _Fitting(wide, narrow)


def print_tables(plan: Plan, console: Console) -> None:
    """Prints every table of a plan."""
    console.print(Text.assemble((f"{plan.layout.ranks:,} x {plan.hardware.name}", "bold"), f": {plan.layout.name()}"))
    console.print(rank_table(plan.parts, plan.shape))
    console.print(stage_table(plan))
    if any(estimate.traffic for estimate in plan.stages):
        console.print(traffic_table(plan))
    console.print(resource_table(plan))
    saved = plan.checkpoints
    console.print(
        labeled(
            "Checkpoints",
            f"{saved.bytes / GIB:,.1f} GiB each. With a failure every ~{format_duration(saved.mtbf_seconds)} on "
            f"{plural(plan.layout.ranks, 'device')} and {saved.save_seconds:g} s per save, save every "
            f"~{format_duration(saved.daly_seconds)} (~{plural(saved.steps, 'step')}; Young's formula: "
            f"{format_duration(saved.young_seconds)}): ~{saved.goodput:.1%} of the time trains",
        )
    )
    need = f"~{plan.fullest.memory.total / GIB:.1f} GiB on the fullest rank, in stage {plan.fullest.peak_stage}; "
    if plan.fits:
        console.print(labeled("Memory", f"{need}it fits into {plan.hardware.usable_text()}"))
    else:
        console.print(labeled("Memory", f"{need}it does not fit into {plan.hardware.usable_text()}", "bold red"))
    _print_caveats(plan.hardware, console)


def _print_caveats(hardware: Hardware, console: Console) -> None:
    counted = "Counted: parameters, FLOPs, weights, optimizer, activations, bytes sent, bubble. Estimated (~): everything else."
    console.print(f"{counted} {calibration(hardware)}", style="dim")


def print_search(found: Found, hardware: Hardware, ranks: int, console: Console, rows: int = 12) -> None:
    """Prints the fastest layouts; in a narrow terminal, the flags of each follow the table."""
    shown = found.candidates[:rows]
    columns = ("", "layout", "micro-batch", "~GiB", "~MFU", "~device hours")
    kept = f", and {found.other_batch:,} would change the global batch by more than {BATCH_TOLERANCE:.0%}" if found.other_batch else ""
    console.print(
        labeled(
            "Search", f"{found.tried:,} layouts and micro-batches on {plural(ranks, 'device')}; {len(found.candidates)} layouts fit{kept}"
        )
    )
    if not shown:
        return
    wide = _table("The fastest layouts", *columns, "flags", left=("layout", "flags"))
    narrow = _table("The fastest layouts", *columns, left=("layout",))
    for number, candidate in enumerate(shown, start=1):
        plan = candidate.plan
        mfu = " / ".join(dict.fromkeys(f"{estimate.time.mfu:.0%}" for estimate in plan.stages))
        row = [str(number), plan.layout.name(), str(candidate.choice.micro_batch_size), f"{plan.fullest.memory.total / GIB:.1f}"]
        row += [mfu, f"{plan.run.device_hours:,.0f}"]
        wide.add_row(*row, candidate.flags)
        narrow.add_row(*row)
    flags = (labeled(f"{number}", candidate.flags) for number, candidate in enumerate(shown, start=1))
    console.print(_Fitting(wide, Group(narrow, *flags)))
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
