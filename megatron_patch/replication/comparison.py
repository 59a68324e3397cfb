"""Comparison of several studies: the gain of each arm at equal cost, by length of the run and by optimizer.

In: study.json files, or the records of studies. Out: Markdown, a PNG. Where studies of one model differ in the length of the run, a second
table states from how many steps an arm reaches its baseline.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_patch.errors import DataError
from megatron_patch.optimizers.registry import OPTIMIZERS
from megatron_patch.replication.arms import all_arms, select_arms
from megatron_patch.replication.records import read_records
from megatron_patch.replication.results import summarize
from megatron_patch.utils.figures import save_figure
from megatron_patch.utils.units import format_count, parse_count

_EQUAL_COST = 0.5
"""Cost of an arm that spends the budget, relative to the full-cost reference."""


@dataclass(frozen=True)
class StudySummary:
    """Results of one study.

    Args:
        parameters: number of parameters of its model.
        budget: cost tokens per arm, which token-level training reads.
        batch_tokens: tokens per step of token-level training.
        rows: the rows of study.json by name of the arm.
        left_out: arms of the study that this program does not have; they are not in `rows`.
    """

    parameters: int
    budget: int
    batch_tokens: int
    rows: Mapping[str, Mapping[str, Any]]
    left_out: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Steps of token-level training, rounded up."""
        return -(-self.budget // self.batch_tokens)


def read_study(path: Path) -> StudySummary:
    """Reads the summary of a study.

    Args:
        path: output folder of a study, or the file of its records.

    Raises:
        DataError: the folder holds no study.json, or the file holds no records.
    """
    if path.is_file():
        return _from_records(path)
    if not (path / "study.json").is_file():
        raise DataError(
            f"{path} holds no study.json",
            "folders that examples/replicate/study.py wrote, or files of its --records",
            "run study.py with --output of that folder and --status",
        )
    document = json.loads((path / "study.json").read_text(encoding="utf-8"))
    settings, rows = document["settings"], {row["arm"]: row for row in document["rows"]}
    return StudySummary(document["parameters"], settings["budget"], parse_count(settings["config"]["global-batch-tokens"]), rows)


def _from_records(path: Path) -> StudySummary:
    """Reads the summary of a study from its records; arms that this program does not have are in `left_out` only."""
    header, records = read_records(path)
    batch_tokens = parse_count(header.config["global-batch-tokens"])
    # Only names and baselines matter here, so that rates need not be those of the runs.
    arms = all_arms(1.0, batch_tokens, optimizers={name: {} for name in OPTIMIZERS})
    known = {arm.name for arm in arms}
    names = list(dict.fromkeys(record.run[0] for record in records))
    left_out = tuple(name for name in names if name.partition("+")[0] not in known)
    here = [name for name in names if name not in left_out]
    # Without a name, select_arms returns all arms; none of them has a run then.
    rows = summarize(select_arms(here, arms), [record.outcome for record in records], header.budget)
    return StudySummary(header.parameters, header.budget, batch_tokens, {row.arm: asdict(row) for row in rows}, left_out)


def _compared(studies: Sequence[StudySummary]) -> list[str]:
    """Returns the patch arms that have a difference in two studies or more (in one, if there is only one study), in order of appearance."""
    names = [
        arm
        for study in studies
        for arm, row in study.rows.items()
        if row["difference"] is not None and _reads_patches(study, row) and "+" not in arm
    ]
    return [arm for arm in dict.fromkeys(names) if names.count(arm) >= min(2, len(studies))]


def _reads_patches(study: StudySummary, row: Mapping[str, Any]) -> bool:
    """Returns whether an arm reads more tokens than token-level training does for the same cost."""
    return bool(row["tokens"] > 1.01 * study.budget * row["cost"] / _EQUAL_COST)


def _lowest_loss(study: StudySummary) -> str:
    """Returns the arm of equal cost with the lowest final loss, and that loss, as a table cell."""
    row = min((row for row in study.rows.values() if row["cost"] < 1.5 * _EQUAL_COST), key=lambda row: row["loss"], default=None)
    if row is None:
        return ""
    spread = "" if row["spread"] is None else f" ± {row['spread']:.3f}"
    return f"`{row['arm']}`, {row['loss']:.3f}{spread} (n = {row['seeds']})"


def comparison_markdown(studies: Sequence[StudySummary], plot: str) -> str:
    """Returns one table with a column per study.

    Args:
        studies: in the order of the columns.
        plot: path of the plot, relative to the document.
    """
    arms = _compared(studies)
    heads = [
        f"{format_count(study.parameters)} parameters, {format_count(study.budget)} tokens "
        f"({format_count(study.budget / study.parameters)} per parameter), {study.steps:,} steps"
        for study in studies
    ]
    lines = [
        f"![held-out loss minus the baseline's at equal cost, by steps of the run]({plot})",
        "",
        "| arm | " + " | ".join(heads) + " |",
        "| --- |" + " --- |" * len(studies),
    ]
    for arm in arms:
        cells = []
        for study in studies:
            row = study.rows.get(arm, {})
            error = "" if row.get("error") is None else f" ± {row['error']:.3f}"
            cells.append("" if row.get("difference") is None else f"{row['difference']:+.3f}{error} (n = {row['pairs']})")
        lines.append(f"| `{arm}` | " + " | ".join(cells) + " |")
    lines.append("| **lowest held-out loss of all arms** | " + " | ".join(map(_lowest_loss, studies)) + " |")
    return "\n".join([*lines, "", *_crossing_lines(arms, studies)])


def crossing(points: Sequence[tuple[int, float]]) -> str:
    """Returns from how many steps an arm is level with its baseline, in words.

    Args:
        points: (steps, difference in nats) of studies that differ in their length, in order of the steps; at least two.

    Returns:
        The number of steps between the last difference above 0 and the next one, interpolated over the logarithm of the steps.
    """
    above = [number for number, (_, gap) in enumerate(points) if gap > 0]
    if not above:
        return f"{points[0][0]:,} or fewer"
    if above[-1] == len(points) - 1:
        return f"more than {points[-1][0]:,}"
    (low, gap), (high, below) = points[above[-1]], points[above[-1] + 1]
    steps = math.exp(math.log(low) + math.log(high / low) * gap / (gap - below))
    return f"about {float(f'{steps:.2g}'):,.0f}"


def _crossing_lines(arms: Sequence[str], studies: Sequence[StudySummary]) -> list[str]:
    """Returns a table of the crossings of every arm with two lengths of one model and step size; nothing if there is none."""
    groups = sorted({(study.parameters, study.batch_tokens) for study in studies})
    lines = []
    for (parameters, batch_tokens), arm in itertools.product(groups, arms):
        alike = [study for study in studies if (study.parameters, study.batch_tokens) == (parameters, batch_tokens)]
        compared = ((study.steps, study.rows[arm]) for study in alike if study.rows.get(arm, {}).get("difference") is not None)
        rows = sorted(compared, key=lambda row: row[0])
        if len({steps for steps, _ in rows}) > 1:
            gaps = ", ".join(f"{row['difference']:+.3f} at {steps:,} (n = {row['pairs']})" for steps, row in rows)
            cells = (f"`{arm}`", format_count(parameters), format_count(batch_tokens), gaps)
            lines.append(f"| {' | '.join((*cells, crossing([(steps, row['difference']) for steps, row in rows])))} |")
    head = ["| arm | parameters | tokens per step | gap at steps | level from steps |", "| --- | --- | --- | --- | --- |"]
    return [*head, *lines, ""] if lines else []


def plot_comparison(path: Path, studies: Sequence[StudySummary], colors: Sequence[str]) -> None:
    """Draws the difference to the baseline against the steps of token-level training: one line per arm and model size.

    The color stands for the arm without its optimizer; AdamW's lines are dashed. Error bars are two standard errors; small dots are seeds.

    Args:
        path: PNG file to write.
        studies: in any order.
        colors: for the arms, in turn.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    figure, axis = plt.subplots(figsize=(9.0, 4.6), layout="constrained")
    arms = {arm: next(study.rows[arm].get("optimizer", "adamw") for study in studies if arm in study.rows) for arm in _compared(studies)}
    ways = {arm: arm.removeprefix(f"{optimizer}-") for arm, optimizer in arms.items()}
    way_colors = dict(zip(dict.fromkeys(ways.values()), itertools.cycle(colors), strict=False))
    styles = {optimizer: "--" if optimizer == "adamw" else "-" for optimizer in arms.values()} if len(set(arms.values())) > 1 else {}
    sizes = dict(zip(sorted({study.parameters for study in studies}), itertools.cycle("osD^v<>ph"), strict=False))
    for (arm, optimizer), (size, marker) in itertools.product(arms.items(), sizes.items()):
        color = way_colors[ways[arm]]
        of_size = sorted(
            (study for study in studies if study.parameters == size and study.rows.get(arm, {}).get("difference") is not None),
            key=lambda study: study.steps,
        )
        if not of_size:
            continue
        axis.errorbar(
            [study.steps for study in of_size],
            [study.rows[arm]["difference"] for study in of_size],
            yerr=[2 * (study.rows[arm]["error"] or 0.0) for study in of_size],
            color=color,
            linestyle=styles.get(optimizer, "-"),
            marker=marker,
            markersize=5,
            markerfacecolor="white" if styles.get(optimizer) == "--" else color,
            linewidth=1.4,
            capsize=3,
        )
        seeds = [(study.steps, gap) for study in of_size for gap in study.rows[arm].get("differences", ())]
        axis.plot([steps for steps, _ in seeds], [gap for _, gap in seeds], ".", color=color, alpha=0.45, markersize=4)
    axis.axhline(0.0, color="#33373d", linewidth=1.2)
    axis.set_xscale("log")
    # Ticks that are closer than this have overlapping labels.
    shown: list[int] = []
    for steps in sorted(study.steps for study in studies):
        if not shown or steps > 1.25 * shown[-1]:
            shown.append(steps)
    axis.set_xticks(shown, [f"{steps:,}" for steps in shown])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("steps of token-level training for the same compute")
    axis.set_ylabel("held-out loss minus the baseline's (nats)")
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], color=color, linewidth=2.0, label=way) for way, color in way_colors.items()]
    handles += [Line2D([], [], color="#33373d", linestyle=style, label=optimizer) for optimizer, style in styles.items()]
    handles += [
        Line2D([], [], color="#33373d", marker=marker, markersize=5, linestyle="", label=f"{format_count(size)} parameters")
        for size, marker in sizes.items()
    ]
    figure.legend(handles=handles, frameon=False, fontsize=8.5, loc="outside right center")
    figure.suptitle("Patch training against token-level training at equal cost (below 0: patches are better)", fontsize=11)
    save_figure(figure, path)
    plt.close(figure)
