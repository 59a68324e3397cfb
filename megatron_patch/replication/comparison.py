"""Studies side by side: what arms gain at equal cost against the length of the run. In: study.json files. Out: Markdown, a PNG."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.errors import DataError
from megatron_patch.units import format_count, parse_count

# Of a full-cost reference; an arm of equal cost has half of it.
_TWICE = 0.75


@dataclass(frozen=True)
class StudySummary:
    """One study.

    Args:
        parameters: of its model.
        budget: cost tokens of an arm: what token level reads.
        batch_tokens: of a step at token level.
        rows: by arm, as in study.json.
    """

    parameters: int
    budget: int
    batch_tokens: int
    rows: Mapping[str, Mapping[str, Any]]

    @property
    def steps(self) -> int:
        """Of token level."""
        return -(-self.budget // self.batch_tokens)


def read_study(folder: Path) -> StudySummary:
    """A study's summary.

    Raises:
        DataError: the folder holds none.
    """
    path = folder / "study.json"
    if not path.is_file():
        raise DataError(f"{folder} holds no study.json", "folders written by examples/replicate/study.py", "run it with --status there")
    document = json.loads(path.read_text(encoding="utf-8"))
    settings, rows = document["settings"], {row["arm"]: row for row in document["rows"]}
    return StudySummary(document["parameters"], settings["budget"], parse_count(settings["config"]["global-batch-tokens"]), rows)


def _compared(studies: Sequence[StudySummary]) -> list[str]:
    """Arms with a difference in two studies or more (of one, in that one), in the order of the first that has them."""
    arms = dict.fromkeys(arm for study in studies for arm, row in study.rows.items() if row["difference"] is not None)
    return [arm for arm in arms if sum(study.rows.get(arm, {}).get("difference") is not None for study in studies) >= min(2, len(studies))]


def _winner(study: StudySummary) -> str:
    """The arm of equal cost that ends lowest, with its loss."""
    row = min((row for row in study.rows.values() if row["cost"] < _TWICE), key=lambda row: row["loss"], default=None)
    if row is None:
        return ""
    spread = "" if row["spread"] is None else f" ± {row['spread']:.3f}"
    return f"`{row['arm']}`, {row['loss']:.3f}{spread} (n = {row['seeds']})"


def comparison_markdown(studies: Sequence[StudySummary], plot: str) -> str:
    """The studies as one table, a column each.

    Args:
        studies: in the order of the columns.
        plot: the picture's path as the document sees it.
    """
    arms = _compared(studies)
    heads = [
        f"{format_count(study.parameters)} parameters, {format_count(study.budget)} tokens "
        f"({format_count(study.budget / study.parameters)} each), {study.steps:,} steps"
        for study in studies
    ]
    lines = [
        f"![held-out loss against the baseline's at equal cost, over the steps of the run]({plot})",
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
    lines.append("| **lowest held-out loss of all arms** | " + " | ".join(map(_winner, studies)) + " |")
    return "\n".join([*lines, ""])


def plot_comparison(path: Path, studies: Sequence[StudySummary], colours: Sequence[str]) -> None:
    """Difference to the baseline against the steps of token level, a line for each arm within a model size; bars are two standard errors.

    Args:
        path: the PNG.
        studies: any order.
        colours: for the arms, in turn.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9.0, 5.0), layout="constrained")
    sizes = sorted({study.parameters for study in studies})
    for number, arm in enumerate(_compared(studies)):
        colour = colours[number % len(colours)]
        for size, marker in zip(sizes, "osD^v<>ph", strict=False):
            of_size = sorted(
                (study for study in studies if study.parameters == size and study.rows.get(arm, {}).get("difference") is not None),
                key=lambda study: study.steps,
            )
            if of_size:
                axis.errorbar(
                    [study.steps for study in of_size],
                    [study.rows[arm]["difference"] for study in of_size],
                    yerr=[2 * (study.rows[arm]["error"] or 0.0) for study in of_size],
                    color=colour,
                    marker=marker,
                    markersize=5,
                    linewidth=1.4,
                    capsize=3,
                    label=f"{arm}, {format_count(size)} parameters",
                )
    axis.axhline(0.0, color="#33373d", linewidth=1.2)
    axis.set_xscale("log")
    # As far apart as their labels are wide.
    shown: list[int] = []
    for place in sorted(study.steps for study in studies):
        if not shown or place > 1.15 * shown[-1]:
            shown.append(place)
    axis.set_xticks(shown, [f"{place:,}" for place in shown])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("steps that token level takes for the same compute")
    axis.set_ylabel("held-out loss above its baseline's (nats)")
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8.5, loc="upper right")
    figure.suptitle("Patches against token level at equal cost: below the line they win", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)
