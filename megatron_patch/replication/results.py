"""One table and one plot of a study's runs. In: the metrics files of all finished runs. Out: JSON, Markdown, a PNG.

A spread is the standard deviation over seeds. A difference is taken seed by seed against the arm's baseline, so that the effect of a seed
on both cancels; its error is the standard error of the mean. One seed has neither spread nor error.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from megatron_patch.replication.arms import Arm
from megatron_patch.replication.routing import Routing, read_routing
from megatron_patch.replication.switches import Switch, SwitchRow, compare_switch, read_switch, training_curve
from megatron_patch.training.callbacks.metrics import read_metrics
from megatron_patch.utils.figures import save_figure
from megatron_patch.utils.units import format_count


@dataclass(frozen=True)
class Outcome:
    """Results of one finished run.

    Args:
        arm: name of the arm.
        seed: of weights and data order.
        tokens: tokens read.
        cost_tokens: tokens that token-level training reads for the same FLOPs.
        steps: number of steps.
        loss: held-out token loss at the end, in nats.
        seconds: time of all steps, without evaluations and checkpoints.
        curve: (cost_tokens, held-out token loss) of each evaluation.
        switch: the last switch to single tokens; None for an arm without one.
        training: training loss against cost, from `training_curve`.
        routing: load and entropy of experts; None without experts.
    """

    arm: str
    seed: int
    tokens: int
    cost_tokens: float
    steps: int
    loss: float
    seconds: float
    curve: tuple[tuple[float, float], ...]
    switch: Switch | None = None
    training: tuple[tuple[int, float], ...] = ()
    routing: Routing | None = None


def read_outcome(save: Path, arm: str, seed: int) -> Outcome | None:
    """Returns the outcome of a run, or None when it has not finished."""
    path = save / "metrics.jsonl"
    if not path.is_file():
        return None
    records = list(read_metrics(path))
    steps = [record for record in records if record.get("type") == "step"]
    curve = [
        (record["cost_tokens"], record["token_loss"])
        for record in records
        if record.get("type") == "evaluation" and record["token_loss"] is not None
    ]
    if not curve or not any(record.get("type") == "end" and record.get("reason") == "done" for record in records):
        return None
    end = steps[-1]
    seconds = sum(record["step_seconds"] for record in steps)
    return Outcome(
        arm,
        seed,
        end["tokens"],
        end["cost_tokens"],
        len(steps),
        curve[-1][1],
        seconds,
        tuple(curve),
        read_switch(records),
        training_curve(records),
        read_routing(records),
    )


def end_date(save: Path) -> str:
    """Returns the day on which a run wrote its last metrics, as YYYY-MM-DD."""
    return date.fromtimestamp((save / "metrics.jsonl").stat().st_mtime).isoformat()


@dataclass(frozen=True)
class Row:
    """Results of one arm over its seeds.

    Args:
        arm: name of the arm.
        what: description of the arm.
        seeds: number of finished runs.
        tokens: tokens that each run reads.
        cost: cost of a run relative to token-level training on twice the budget.
        steps: steps of each run.
        loss: mean held-out token loss at the end, in nats.
        spread: standard deviation of the loss over seeds; None with one seed.
        difference: mean difference to the baseline over the seeds that both have, in nats; None for a baseline.
        error: standard error of that mean; None with one seed.
        pairs: number of seeds in the difference.
        seconds: mean time of all steps of a run.
        optimizer: name of the arm's optimizer.
        differences: difference to the baseline by seed, in nats.
    """

    arm: str
    what: str
    seeds: int
    tokens: int
    cost: float
    steps: int
    loss: float
    spread: float | None
    difference: float | None
    error: float | None
    pairs: int
    seconds: float
    optimizer: str = "adamw"
    differences: tuple[float, ...] = ()


def summarize(arms: Sequence[Arm], outcomes: Sequence[Outcome], budget: int) -> list[Row]:
    """Returns one row per arm that has a finished run."""
    by_arm: dict[str, dict[int, Outcome]] = {}
    for outcome in outcomes:
        by_arm.setdefault(outcome.arm, {})[outcome.seed] = outcome
    rows = []
    for arm in arms:
        mine = by_arm.get(arm.name)
        if not mine:
            continue
        losses = [outcome.loss for outcome in mine.values()]
        theirs: Mapping[int, Outcome] = by_arm.get(arm.baseline, {}) if arm.baseline else {}
        differences = [outcome.loss - theirs[seed].loss for seed, outcome in mine.items() if seed in theirs]
        first = next(iter(mine.values()))
        rows.append(
            Row(
                arm=arm.name,
                what=arm.description,
                seeds=len(mine),
                tokens=first.tokens,
                cost=first.cost_tokens / (2 * budget),
                steps=first.steps,
                loss=statistics.fmean(losses),
                spread=statistics.stdev(losses) if len(losses) > 1 else None,
                difference=statistics.fmean(differences) if differences else None,
                error=statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None,
                pairs=len(differences),
                seconds=statistics.fmean(outcome.seconds for outcome in mine.values()),
                optimizer=arm.optimizer,
                differences=tuple(differences),
            )
        )
    return rows


def summarize_switches(arms: Sequence[Arm], outcomes: Sequence[Outcome], budget: int) -> list[SwitchRow]:
    """Returns one row per arm that switches to single tokens and shares a seed with its baseline."""
    rows = []
    for arm in arms:
        mine = {outcome.seed: outcome for outcome in outcomes if outcome.arm == arm.name}
        switches = {seed: outcome.switch for seed, outcome in mine.items() if outcome.switch is not None}
        theirs = {outcome.seed: outcome.training for outcome in outcomes if outcome.arm == arm.baseline}
        if switches and arm.baseline:
            curves = {seed: outcome.training for seed, outcome in mine.items()}
            rows.append(compare_switch(arm.name, arm.baseline, switches, curves, theirs, budget))
    return [row for row in rows if row is not None]


def significance(row: Row) -> str:
    """Returns "better" or "worse" for a difference of more than two standard errors, "not separated" for a smaller one.

    Without a difference the result is empty; with one seed, which has no standard error, it is "one seed".
    """
    if row.difference is None:
        return ""
    if row.error is None:
        return "one seed"
    if abs(row.difference) <= 2 * row.error:
        return "not separated"
    return "better" if row.difference < 0 else "worse"


def markdown(rows: Sequence[Row], arms: Sequence[Arm], about: str, command: str, plot: str) -> str:
    """Returns the study as Markdown.

    Args:
        rows: from `summarize`.
        arms: all arms, for the names of the baselines.
        about: one paragraph with model, data, budget, machine and date.
        command: the command that reproduces the study.
        plot: path of the plot, relative to the document.
    """
    baselines = {arm.name: arm.baseline for arm in arms}
    lines = [
        about,
        "",
        "```",
        command,
        "```",
        "",
        f"![held-out token loss against cost, mean and range over seeds]({plot})",
        "",
        "| arm | seeds | tokens | cost | steps | held-out token loss | difference to its baseline | | time |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        spread = "" if row.spread is None else f" ± {row.spread:.3f}"
        difference = ""
        if row.difference is not None:
            difference = f"{row.difference:+.3f}" + ("" if row.error is None else f" ± {row.error:.3f}") + f" (`{baselines[row.arm]}`)"
        lines.append(
            f"| `{row.arm}` | {row.seeds} | {format_count(row.tokens)} | {row.cost:.3f} | {row.steps:,} | {row.loss:.3f}{spread} | "
            f"{difference} | {significance(row)} | {row.seconds / 60:.1f} min |"
        )
    lines += [
        "",
        "Losses are in nats per token at K = 1 on held-out text: mean ± standard deviation over seeds. Differences are taken seed by seed:",
        "mean ± standard error; better or worse means more than two standard errors. Cost is relative to token-level training on twice the",
        "budget.",
        "",
        *(f"- `{row.arm}`: {row.what}" for row in rows),
        "",
    ]
    return "\n".join(lines)


def write_json(
    path: Path,
    rows: Sequence[Row],
    switches: Sequence[SwitchRow],
    outcomes: Sequence[Outcome],
    settings: Mapping[str, Any],
    parameters: int,
) -> None:
    """Writes study.json: settings, number of parameters, and every number of the tables and plots."""
    document = {
        "settings": settings,
        "parameters": parameters,
        "rows": [asdict(row) for row in rows],
        "switches": [asdict(row) for row in switches],
        "runs": [asdict(outcome) for outcome in outcomes],
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


COLORS = ("#33373d", "#8b8f96", "#2563b8", "#16875f", "#d2512f", "#8b53c4", "#b9850b", "#0d8a9e", "#c03e79", "#7b4a2b", "#6f8f1a")
MAIN_ARMS = (
    "token",
    "token-wsd",
    "token-wsd-long",
    "patch-k4",
    "patch-k2",
    "superposition-k2",
    "superposition-k2-long",
    "superposition-k4-long",
    "superposition-k6-long",
    "superposition-k3",
    "superposition-k8-power",
    "stairs-4-2-1",
    "token-full",
)
"""The arms whose loss curves are drawn; the other arms appear with their final losses."""


def plot_study(
    path: Path, arms: Sequence[Arm], outcomes: Sequence[Outcome], budget: int, title: str, main_arms: Sequence[str] = MAIN_ARMS
) -> None:
    """Draws held-out token loss against cost for the main arms (left), and the final loss of every arm (right, one dot per seed).

    Args:
        path: PNG file to write.
        arms: in the order of the table.
        outcomes: finished runs.
        budget: cost tokens per arm.
        title: title of the figure.
        main_arms: names of the arms whose curves are drawn.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    done = [arm for arm in arms if any(outcome.arm == arm.name for outcome in outcomes)]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13.5, max(5.2, 0.3 * len(done) + 1.4)), gridspec_kw={"width_ratios": (1.3, 1.0)}, layout="constrained"
    )
    main = [arm for arm in done if arm.way in main_arms or arm.name in main_arms] or done[: len(MAIN_ARMS)]
    colors = {arm.name: COLORS[number % len(COLORS)] for number, arm in enumerate(main)}
    # Lines are dashed for AdamW among several optimizers, else for the papers' schedule.
    several = len({arm.optimizer for arm in main}) > 1
    for arm in main:
        dashed = arm.optimizer == "adamw" if several else arm.baseline == "token-wsd"
        runs = [outcome for outcome in outcomes if outcome.arm == arm.name]
        _draw(left, runs, budget, colors[arm.name], arm, "--" if dashed else "-")
    baselines = {arm.name for arm in arms if arm.token_level and arm.cost == 1.0}
    # Early losses of patch models at K = 1 would compress the plot; its top is the baselines' loss after a tenth of the budget.
    shown = [loss for outcome in outcomes if outcome.arm in baselines for cost, loss in outcome.curve if cost >= 0.1 * budget]
    ends = [outcome.loss for outcome in outcomes]
    top, bottom = max(shown or ends), min(ends)
    left.set_ylim(bottom - 0.05 * (top - bottom) - 0.01, top + 0.05 * (top - bottom) + 0.01)
    left.set_xlim(left=0)
    left.set_xlabel("cost relative to token-level training on twice the budget")
    left.set_ylabel("held-out token loss (nats, K = 1)")
    left.legend(frameon=False, fontsize=8.5, loc="upper right")
    _draw_ends(right, done, outcomes, colors)
    for axis in (left, right):
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)
    plt.close(figure)


def _draw_ends(axis: Any, arms: Sequence[Arm], outcomes: Sequence[Outcome], colors: Mapping[str, str]) -> None:
    """Draws the final losses: one row per arm, one dot per seed, a bar at the mean, and a vertical line at each baseline."""
    for row, arm in enumerate(arms):
        losses = [outcome.loss for outcome in outcomes if outcome.arm == arm.name]
        color, mean = colors.get(arm.name, "#6b7078"), statistics.fmean(losses)
        axis.plot(losses, [row] * len(losses), "o", color=color, alpha=0.45, markersize=5, markeredgewidth=0)
        axis.plot([mean], [row], "|", color=color, markersize=15, markeredgewidth=2.4)
        if arm.baseline is None and arm.cost == 1.0:
            axis.axvline(mean, color=color, linewidth=1.0, linestyle="-" if arm.name == "token" else "--", alpha=0.6)
    axis.set_yticks(range(len(arms)), [arm.name for arm in arms], fontsize=8.5)
    axis.set_ylim(len(arms) - 0.4, -0.6)
    axis.set_xlabel("held-out token loss at the end (nats, K = 1)")


def _draw(axis: Any, runs: Sequence[Outcome], budget: int, color: str, arm: Arm, style: str) -> None:
    """Draws one arm: the mean over seeds as a line, their range as a band. All seeds are evaluated at the same steps."""
    length = min(len(run.curve) for run in runs)
    xs = [cost / (2 * budget) for cost, _ in runs[0].curve[:length]]
    columns = [[run.curve[index][1] for run in runs] for index in range(length)]
    means = [statistics.fmean(column) for column in columns]
    width = 2.2 if arm.token_level else 1.5
    axis.plot(xs, means, style, color=color, linewidth=width, label=f"{arm.name}: {means[-1]:.3f} (n = {len(runs)})")
    if len(runs) > 1:
        axis.fill_between(
            xs, [min(column) for column in columns], [max(column) for column in columns], color=color, alpha=0.16, linewidth=0
        )
    axis.plot([xs[-1]], [means[-1]], "o", color=color, markersize=4)
