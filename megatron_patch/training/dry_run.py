"""Prints the resolved plan, with --dry-run and at the start of every run.

In: a run and the configuration of its engine. Out: tables on a console. Needs neither data nor GPUs, and imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_patch.config.megatron.command_line import MegatronReport
from megatron_patch.config.option_types import flag_of
from megatron_patch.config.options import ScheduleOptions
from megatron_patch.config.parsing import option_values
from megatron_patch.config.resolve import RunConfig
from megatron_patch.config.schedules import lr_schedules
from megatron_patch.data.token_stream import TrainStream
from megatron_patch.engine.deepspeed_config import EngineConfig, batch_settings
from megatron_patch.model.flops import parameter_count
from megatron_patch.model.shape import ModelShape
from megatron_patch.optimizers.registry import optimizer_type
from megatron_patch.planning.cost import Cost
from megatron_patch.planning.layout import layout_of
from megatron_patch.planning.plan import pipeline_parts
from megatron_patch.planning.tables import rank_table
from megatron_patch.stages import Stage, StagePlan, steps_of_tokens
from megatron_patch.training.stream import corpus_usage_table
from megatron_patch.utils.console import labeled
from megatron_patch.utils.tables import FittingTable
from megatron_patch.utils.units import format_count, plural

_LEFT = ("stage", "part", "optimizer", "lr")


def stage_table(run: RunConfig, cost: Cost) -> FittingTable:
    """Returns a table with one row for each stage and one for the run.

    Args:
        run: the run.
        cost: FLOPs of its steps.
    """
    columns = _stage_columns(run, cost)
    table = FittingTable("Stages", list(columns), left=_LEFT)
    *stages, total = zip(*columns.values(), strict=True)
    for row in stages:
        table.add_row(*row)
    table.add_section()
    table.add_row(*total)
    return table


def _stage_columns(run: RunConfig, cost: Cost) -> dict[str, list[str]]:
    """Returns the columns of the stage table: a cell for each stage and one for the run."""
    plan, ranks = run.plan, run.data_parallel_size
    flops = [stage.steps * cost.step_flops(stage) for stage in plan.stages]
    names = [stage.name + ("" if stage.side == "both" else f" ({stage.side} side)") for stage in plan.stages]
    micro_batches = [
        f"{stage.gradient_accumulation(ranks)} x {stage.micro_batch_size} x {stage.sample_ranks(ranks)}" for stage in plan.stages
    ]
    shared = any(stage.context_parallel_size > 1 for stage in plan.stages)
    return {
        "stage": [*names, "run"],
        "K": [*(str(stage.patch_size) for stage in plan.stages), ""],
        "T": [*(f"{stage.positions:,}" for stage in plan.stages), ""],
        "samples/step": [*(f"{stage.global_batch_size:,}" for stage in plan.stages), ""],
        "micro-batches": [*micro_batches, ""],
        **({"ranks/sample": [*(str(stage.context_parallel_size) for stage in plan.stages), ""]} if shared else {}),
        "tokens/step": [*(f"{stage.tokens_per_step:,}" for stage in plan.stages), ""],
        "steps": [*(f"{stage.steps:,}" for stage in plan.stages), f"{plan.steps:,}"],
        "tokens": [*(format_count(stage.tokens) for stage in plan.stages), format_count(plan.tokens)],
        "of tokens": [*(f"{stage.tokens / plan.tokens:.1%}" for stage in plan.stages), "100%"],
        "of FLOPs": [*(f"{part / sum(flops):.1%}" for part in flops), "100%"],
        "optimizer": ["new", *(stage.optimizer for stage in plan.stages[1:]), ""],
        "lr": [*(f"{stage.lr.lr:g} {stage.lr.style}" if stage.lr_policy == "restart" else stage.lr_policy for stage in plan.stages), ""],
    }


def lr_table(plan: StagePlan) -> FittingTable:
    """Returns a table of the parts of each learning-rate schedule: lengths in steps, in tokens, and as shares of the schedule.

    A schedule is listed under the stage at which it begins. A decay that ends after the run goes `toward` its minimum, and is shown with
    its whole length.
    """
    columns = ["stage", "part", "lr", "steps", "tokens", "of steps", "of tokens"]
    table = FittingTable("Learning rates", columns, left=_LEFT)
    for _, covered in lr_schedules(plan):
        all_steps, all_tokens = sum(stage.steps for stage in covered), sum(stage.tokens for stage in covered)
        for name, part, rate, begin, end in _lr_parts(covered):
            steps = steps_of_tokens(covered, end) - steps_of_tokens(covered, begin)
            number = f"{int(steps):,}" if steps.denominator == 1 else f"{float(steps):,.1f}"
            shares = (f"{float(steps) / all_steps:,.1%}", f"{(end - begin) / all_tokens:,.1%}")
            table.add_row(name, part, rate, number, format_count(end - begin), *shares)
        table.add_section()
    return table


def _lr_parts(covered: Sequence[Stage]) -> list[tuple[str, str, str, int, int]]:
    """Returns the parts of a schedule: (stage that begins it, name, learning rate, first token, token after the last one).

    Tokens are counted from the schedule's start.
    """
    shape, tokens = covered[0].lr, sum(stage.tokens for stage in covered)
    warm, decays = shape.warmup_tokens, shape.style not in ("constant", "inverse-square-root")
    end = tokens if shape.decay_tokens is None or not decays else shape.decay_tokens
    rate, last = f"{shape.lr:g}", f"{'toward' if end > tokens else 'to'} {shape.min_lr:g}"
    parts = [("warm-up", f"to {rate}", 0, warm)]
    if shape.style == "WSD":
        begin = end - min(shape.wsd_decay_tokens, end - warm)
        parts += [("constant", rate, warm, begin), (f"{shape.wsd_decay_style} decay", last, begin, end)]
    elif decays:
        parts.append((f"{shape.style} decay", last, warm, end))
    else:
        parts.append((shape.style, rate if shape.style == "constant" else f"from {rate}", warm, end))
    parts.append(("minimum", f"{shape.min_lr:g}", end, tokens))
    parts = [part for part in parts if part[2] < part[3]]
    rows = [(covered[0].name if part is parts[0] else "", *part) for part in parts]
    first = 0
    for stage in covered:
        if stage.lr_policy == "rewarm":
            rows.append((stage.name, "rewarm", "x 0 to 1", first, first + stage.rewarm_tokens))
        first += stage.tokens
    return rows


def rates_by_kind(schedule: ScheduleOptions) -> str:
    """Returns the kinds of parameters whose learning rate or weight decay is not that of the other ones, in one line; "": none."""
    hidden, vocabulary = "hidden matrices", "word embeddings and head"
    kinds = [(vocabulary, "decoupled_lr", "embedding_weight_decay")]
    if optimizer_type(schedule.optimizer).full_matrices:
        kinds.insert(0, (hidden, "muon_lr", "muon_weight_decay"))
    texts = []
    for kind, rate_name, decay_name in kinds:
        rate, decay = getattr(schedule, rate_name), getattr(schedule, decay_name)
        parts = []
        if rate is not None and rate != schedule.lr:
            parts.append(f"lr {rate:g} ({flag_of(rate_name)}), {rate / schedule.lr:.4g} times that of the schedule")
        if decay is not None and decay != schedule.weight_decay:
            parts.append(f"weight decay {decay:g} ({flag_of(decay_name)})")
        texts += [f"{kind}: {', '.join(parts)}"] if parts else []
    if not texts:
        return ""
    return "; ".join([*texts, f"the others: lr {schedule.lr:g}, weight decay {schedule.weight_decay:g}"])


def architecture(run: RunConfig) -> str:
    """Returns the kind of model in one line: family, norm, activation, positions, biases, head, attention heads and their groups."""
    shape = run.shape
    positions = "learned positions"
    if shape.position_embedding == "rope":
        scaled = "" if shape.rotary_scaling == "none" else f", {shape.rotary_scaling} scaling by {shape.rotary_factor:g}"
        positions = f"rotary positions (base {shape.rotary_base:g}{scaled})"
        if shape.windowed_rotary_base is not None:
            positions += f", base {shape.windowed_rotary_base:g} in blocks with a window"
        if shape.unrotated_layers:
            positions += f", none in {len(shape.unrotated_layers)} of {plural(shape.num_layers, 'block')}"
    norms = f"{shape.normalization} (epsilon {shape.norm_epsilon:g})"
    places = {"pre": "", "post": " after attention and feed-forward layer", "both": " before and after attention and feed-forward layer"}
    norms += places[shape.norm_placement]
    if shape.qk_norm:
        norms += ", also of queries and keys" + (" over all heads" if shape.qk_norm_scope == "all" else "")
    biases = "biases" if shape.mlp_bias else "biases in query, key and value only" if shape.qkv_bias else "no biases"
    heads = plural(shape.num_attention_heads, "head") + f" of {shape.head_size}"
    blocks = plural(shape.num_layers, "block")
    groups = "" if shape.num_query_groups == shape.num_attention_heads else f" in {plural(shape.num_query_groups, 'group')}"
    parts = (
        f"family {run.options.model.model_family}",
        norms,
        _feed_forward(shape),
        positions,
        biases,
        "tied head" if shape.tie_embeddings else "untied head",
        heads + groups,
        *(["scaled embeddings"] if shape.scaled_embeddings else []),
        *([] if shape.query_scalar is None else [f"scores divided by the root of {shape.query_scalar:g}"]),
        *([] if shape.attention_softcap is None else [f"scores capped at {shape.attention_softcap:g}"]),
        *([] if shape.logit_softcap is None else [f"logits capped at {shape.logit_softcap:g}"]),
        *([] if shape.window is None else [f"windows of {plural(shape.window, 'position')} in {shape.windowed_layers} of {blocks}"]),
    )
    return "; ".join(parts)


def _feed_forward(shape: ModelShape) -> str:
    kind = {"swiglu": "SwiGLU", "geglu": "GeGLU", "gelu": "GELU"}[shape.activation]
    dense, experts = f"{kind} of width {shape.ffn_hidden_size:,}", shape.experts
    if experts is None:
        return dense
    shared = f" and a shared one of width {experts.shared_ffn_hidden_size:,}" if experts.shared_ffn_hidden_size else ""
    bias = ", with a bias for the choice" if experts.bias else ""
    routed = f"{experts.top_k} of {experts.count} experts ({kind} of width {experts.ffn_hidden_size:,}){shared}, by {experts.score}{bias}"
    if not experts.dense_layers:
        return routed
    return f"{routed}; in {len(experts.dense_layers)} of {plural(shape.num_layers, 'block')} none, but {dense}"


def print_megatron(report: MegatronReport, console: Console) -> None:
    """Prints what became of flags that only Megatron has: a table of those that were translated, and lines for the others."""
    if report.rows:
        table = Table(title="Megatron's flags", title_justify="left", header_style="bold")
        for name in ("given", "here", "why"):
            table.add_column(name, overflow="fold")
        for row in report.rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
    if report.ignored:
        console.print(labeled("No effect", report.ignored_text))
    for note in report.notes:
        console.print(labeled("Note", note, "yellow"))


def print_plan(
    run: RunConfig, engine_config: EngineConfig, console: Console, origins: bool = True, stream: TrainStream | None = None
) -> None:
    """Prints the stages, the model, the cost, the data and the memory of a run.

    Args:
        run: the run.
        engine_config: the configuration of DeepSpeed.
        console: where to print.
        origins: whether to print also the options with their origins, the memory of each rank and DeepSpeed's JSON.
        stream: the training stream, whose corpus usage is printed; None: the data does not exist on this machine.
    """
    cost = Cost(run.shape, run.plan, run.options.stages.seq_length)
    layout = layout_of(run, engine_config)
    parts = pipeline_parts(run.shape, run.plan, layout)
    fullest = max(part.memory.total for part in parts)
    if run.megatron is not None:
        print_megatron(run.megatron, console)
    if origins:
        values = option_values(run.options)
        given = ", ".join(f"{name.replace('_', '-')} = {_shown(values[name])} ({origin})" for name, origin in sorted(run.origins.items()))
        options = f"{given}; the other options have their defaults" if given else "all options have their defaults"
        console.print(labeled("Options", options))
    console.print(stage_table(run, cost))
    console.print(lr_table(run.plan))
    if kinds := rates_by_kind(run.options.schedule):
        console.print(labeled("By kind", kinds))
    count = parameter_count(run.shape)
    active = f", {format_count(count.active)} active for each position" if count.unused else ""
    console.print(
        labeled(
            "Model",
            f"{format_count(count.total)} parameters ({count.total:,}){active}: embedding {format_count(count.embedding)}, "
            f"blocks {format_count(count.blocks)}, head {format_count(count.head)}; {plural(run.shape.num_layers, 'layer')} "
            f"x {run.shape.hidden_size}, {plural(run.shape.num_attention_heads, 'head')}, "
            f"{plural(run.shape.num_query_groups, 'key-value head')}, vocabulary {run.shape.vocab_size:,}",
        )
    )
    console.print(labeled("Architecture", architecture(run)))
    flops = sum(stage.steps * cost.step_flops(stage) for stage in run.plan.stages)
    console.print(
        labeled(
            "Cost",
            f"{flops:.3g} FLOPs: {cost.total:.3f} of token-level training on the same {format_count(run.plan.tokens)} tokens "
            f"({run.plan.cost():.3f} counted in positions: λ/K + 1 - λ)",
        )
    )
    blend = ", ".join(f"{prefix} ({weight:.1%})" for prefix, weight in run.blend) or "none (no --data-path)"
    console.print(labeled("Data", f"{blend}; read in blocks of {run.plan.block_tokens:,} tokens"))
    if stream is not None:
        console.print(corpus_usage_table(stream))
    console.print(
        labeled(
            "Ranks",
            f"{layout.ranks:,}: {layout.name()}; about {fullest / 2**30:.1f} GiB of memory on the fullest rank",
        )
    )
    if origins:
        console.print(rank_table(parts, run.shape))
    for note in (*run.notes, *engine_config.notes):
        console.print(labeled("Note", note, "yellow"))
    if origins:
        settings = {**engine_config.deepspeed, **batch_settings(run.plan.stages[0], run.data_parallel_size)}
        console.print(labeled("DeepSpeed", f"(first stage) {json.dumps(settings)}"))


def _shown(value: object) -> str:
    """Returns the value of an option as a user writes it."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
