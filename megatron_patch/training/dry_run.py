"""The resolved plan, printed: what `--dry-run` shows, and what every run shows at its start.

In: a run and its engine configuration. Out: tables for people. Needs neither data nor GPUs.
"""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from megatron_patch.config.parsing import option_values
from megatron_patch.config.resolve import RunConfig
from megatron_patch.data.token_stream import TrainStream
from megatron_patch.engine.deepspeed_config import EngineConfig, batch_settings
from megatron_patch.model.flops import parameter_count
from megatron_patch.planning.cost import Cost
from megatron_patch.planning.layout import layout_of
from megatron_patch.planning.plan import pipeline_parts
from megatron_patch.planning.tables import rank_table
from megatron_patch.stages import Stage
from megatron_patch.training.stream import corpus_usage_table
from megatron_patch.utils.units import format_count


def stage_table(run: RunConfig, cost: Cost) -> Table:
    """One row a stage and one for the run."""
    table = Table(title="Stages", title_justify="left", header_style="bold")
    for name in (
        "stage",
        "K",
        "T",
        "samples/step",
        "micro-batches",
        "tokens/step",
        "steps",
        "tokens",
        "of tokens",
        "of FLOPs",
        "optimizer",
        "lr",
    ):
        table.add_column(name, justify="left" if name in ("stage", "optimizer", "lr") else "right")
    total_flops = sum(stage.steps * cost.step_flops(stage) for stage in run.plan.stages)
    for index, stage in enumerate(run.plan.stages):
        table.add_row(
            stage.name + ("" if stage.side == "both" else f" ({stage.side} side)"),
            str(stage.patch_size),
            f"{stage.positions:,}",
            f"{stage.global_batch_size:,}",
            f"{stage.gradient_accumulation(run.data_parallel_size)} x {stage.micro_batch_size} x {run.data_parallel_size}",
            f"{stage.tokens_per_step:,}",
            f"{stage.steps:,}",
            format_count(stage.tokens),
            f"{stage.tokens / run.plan.tokens:.1%}",
            f"{stage.steps * cost.step_flops(stage) / total_flops:.1%}",
            "new" if index == 0 else stage.optimizer,
            _lr_text(stage),
        )
    table.add_section()
    table.add_row("run", "", "", "", "", "", f"{run.plan.steps:,}", format_count(run.plan.tokens), "100%", "100%", "", "")
    return table


def _lr_text(stage: Stage) -> str:
    if stage.lr_policy == "continue":
        return "goes on"
    if stage.lr_policy == "rewarm":
        return f"goes on, rewarmed over {format_count(stage.rewarm_tokens)}"
    warm = f", {format_count(stage.lr.warmup_tokens)} warm-up" if stage.lr.warmup_tokens else ""
    decay = f", last {format_count(stage.lr.wsd_decay_tokens)} decay" if stage.lr.style == "WSD" else ""
    return f"{stage.lr.lr:g} {stage.lr.style}{warm}{decay}"


def print_plan(run: RunConfig, engine: EngineConfig, console: Console, origins: bool = True, stream: TrainStream | None = None) -> None:
    """Prints options with their origins, stages, model, cost, what is read of the data where it is here, and DeepSpeed's JSON."""
    cost = Cost(run.shape, run.plan, run.options.stages.seq_length)
    layout = layout_of(run, engine)
    parts = pipeline_parts(run.shape, run.plan, layout)
    fullest = max(part.memory.total for part in parts)
    if origins:
        values = option_values(run.options)
        given = ", ".join(f"{name.replace('_', '-')} = {values[name]} ({origin})" for name, origin in sorted(run.origins.items()))
        console.print(f"[bold]Options[/bold] {given or 'all by default'}; the others by default.", highlight=False, soft_wrap=True)
    console.print(stage_table(run, cost))
    count = parameter_count(run.shape)
    console.print(
        f"[bold]Model[/bold] {format_count(count.total)} parameters ({count.total:,}): embedding {format_count(count.embedding)}, "
        f"blocks {format_count(count.blocks)}, head {format_count(count.head)}; {run.shape.num_layers} layers x {run.shape.hidden_size}, "
        f"{run.shape.num_attention_heads} heads, {run.shape.num_query_groups} key-value heads, vocabulary {run.shape.vocab_size:,}",
        highlight=False,
    )
    flops = sum(stage.steps * cost.step_flops(stage) for stage in run.plan.stages)
    console.print(
        f"[bold]Cost[/bold] {flops:.3g} FLOPs: {cost.whole:.3f} of token-level training on the same {format_count(run.plan.tokens)} tokens "
        f"({run.plan.cost():.3f} by positions: λ/K + 1 - λ)",
        highlight=False,
    )
    console.print(
        f"[bold]Data[/bold] blocks of {run.plan.block_tokens:,} tokens; "
        + (", ".join(f"{prefix} ({weight:.1%})" for prefix, weight in run.blend) or "none given"),
        highlight=False,
    )
    if stream is not None:
        console.print(corpus_usage_table(stream))
    console.print(
        f"[bold]Ranks[/bold] {layout.ranks:,}: {layout.name()}; the fullest needs about {fullest / 2**30:.1f} GiB", highlight=False
    )
    if origins:
        console.print(rank_table(parts, run.shape))
    for note in run.notes:
        console.print(f"[yellow]Note[/yellow] {note}", highlight=False)
    if origins:
        settings = {**engine.deepspeed, **batch_settings(run.plan.stages[0], run.data_parallel_size)}
        console.print(f"[bold]DeepSpeed[/bold] (first stage) {json.dumps(settings)}", highlight=False, soft_wrap=True)
