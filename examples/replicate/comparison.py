"""Studies side by side: what arms gain at equal cost against the length of the run. In: study.json files. Out: Markdown, a PNG."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.errors import DataError
from megatron_patch.utils.units import format_count, parse_count

_EQUAL = 0.5
"""What an arm of equal cost spends, of the full-cost reference."""


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
    """Arms of patches with a difference in two studies or more (of one, in that one), in the order of the first that has them."""
    found = [arm for study in studies for arm, row in study.rows.items() if row["difference"] is not None and _reads_patches(study, row)]
    return [arm for arm in dict.fromkeys(found) if found.count(arm) >= min(2, len(studies))]


def _reads_patches(study: StudySummary, row: Mapping[str, Any]) -> bool:
    """Whether an arm reads more tokens than token level does for its cost."""
    return bool(row["tokens"] > 1.01 * study.budget * row["cost"] / _EQUAL)


def _winner(study: StudySummary) -> str:
    """The arm of equal cost that ends lowest, with its loss."""
    row = min((row for row in study.rows.values() if row["cost"] < 1.5 * _EQUAL), key=lambda row: row["loss"], default=None)
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
    from matplotlib.lines import Line2D

    figure, axis = plt.subplots(figsize=(9.0, 4.6), layout="constrained")
    arms = dict(zip(_compared(studies), itertools.cycle(colours), strict=False))
    sizes = dict(zip(sorted({study.parameters for study in studies}), itertools.cycle("osD^v<>ph"), strict=False))
    for arm, colour in arms.items():
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
                    color=colour,
                    marker=marker,
                    markersize=5,
                    linewidth=1.4,
                    capsize=3,
                )
    axis.axhline(0.0, color="#33373d", linewidth=1.2)
    axis.set_xscale("log")
    # As far apart as their labels are wide.
    shown: list[int] = []
    for place in sorted(study.steps for study in studies):
        if not shown or place > 1.25 * shown[-1]:
            shown.append(place)
    axis.set_xticks(shown, [f"{place:,}" for place in shown])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("steps that token level takes for the same compute")
    axis.set_ylabel("held-out loss above its baseline's (nats)")
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], color=colour, linewidth=2.0, label=arm) for arm, colour in arms.items()]
    handles += [
        Line2D([], [], color="#33373d", marker=marker, markersize=5, linestyle="", label=f"{format_count(size)} parameters")
        for size, marker in sizes.items()
    ]
    figure.legend(handles=handles, frameon=False, fontsize=8.5, loc="outside right center")
    figure.suptitle("Patches against token level at equal cost: below the line they win", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)
