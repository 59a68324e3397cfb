"""Comparison of several studies: the gain of each arm at equal cost, by length of the run. In: study.json files. Out: Markdown, a PNG."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.errors import DataError
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
    """

    parameters: int
    budget: int
    batch_tokens: int
    rows: Mapping[str, Mapping[str, Any]]

    @property
    def steps(self) -> int:
        """Steps of token-level training, rounded up."""
        return -(-self.budget // self.batch_tokens)


def read_study(folder: Path) -> StudySummary:
    """Reads the summary of a study.

    Raises:
        DataError: the folder holds no study.json.
    """
    path = folder / "study.json"
    if not path.is_file():
        raise DataError(
            f"{folder} holds no study.json",
            "folders that examples/replicate/study.py wrote",
            "run study.py with --output of that folder and --status",
        )
    document = json.loads(path.read_text(encoding="utf-8"))
    settings, rows = document["settings"], {row["arm"]: row for row in document["rows"]}
    return StudySummary(document["parameters"], settings["budget"], parse_count(settings["config"]["global-batch-tokens"]), rows)


def _compared(studies: Sequence[StudySummary]) -> list[str]:
    """Returns the patch arms that have a difference in two studies or more (in one, if there is only one study), in order of appearance."""
    names = [arm for study in studies for arm, row in study.rows.items() if row["difference"] is not None and _reads_patches(study, row)]
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
    return "\n".join([*lines, ""])


def plot_comparison(path: Path, studies: Sequence[StudySummary], colors: Sequence[str]) -> None:
    """Draws the difference to the baseline against the steps of token-level training: one line per arm and model size.

    Error bars are two standard errors.

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
    arms = dict(zip(_compared(studies), itertools.cycle(colors), strict=False))
    sizes = dict(zip(sorted({study.parameters for study in studies}), itertools.cycle("osD^v<>ph"), strict=False))
    for arm, color in arms.items():
        for size, marker in sizes.items():
            of_size = sorted(
                (study for study in studies if study.parameters == size and study.rows.get(arm, {}).get("difference") is not None),
                key=lambda study: study.steps,
            )
            if of_size:
                axis.errorbar(
                    [study.steps for study in of_size],
                    [study.rows[arm]["difference"] for study in of_size],
                    yerr=[2 * (study.rows[arm]["error"] or 0.0) for study in of_size],
                    color=color,
                    marker=marker,
                    markersize=5,
                    linewidth=1.4,
                    capsize=3,
                )
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
    handles = [Line2D([], [], color=color, linewidth=2.0, label=arm) for arm, color in arms.items()]
    handles += [
        Line2D([], [], color="#33373d", marker=marker, markersize=5, linestyle="", label=f"{format_count(size)} parameters")
        for size, marker in sizes.items()
    ]
    figure.legend(handles=handles, frameon=False, fontsize=8.5, loc="outside right center")
    figure.suptitle("Patch training against token-level training at equal cost (below 0: patches are better)", fontsize=11)
    save_figure(figure, path)
    plt.close(figure)
