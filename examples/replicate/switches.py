"""What the last switch to single tokens does to the loss, and how long it takes to heal. In: metrics of runs. Out: rows, Markdown, a PNG.

Before the switch a model is evaluated as it will be used: its held-out loss at K = 1. After it the training loss at K = 1 counts, as each
token is read for the first time. Both are the same quantity, so that their difference at the switch is the jump. What an arm is behind its
baseline is taken at equal cost and seed by seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BINS = 200
FIRST_STEPS = 10
LOOKS = (0.02, 0.05, 0.2)


@dataclass(frozen=True)
class Switch:
    """The last switch of one run, to K = 1.

    Args:
        cost_tokens: spent before it.
        before: held-out token loss just before it, nats; None where nothing was evaluated there.
        first: mean training loss of the first steps after it.
        peak: highest training loss of these steps.
    """

    cost_tokens: float
    before: float | None
    first: float
    peak: float


def read_switch(records: Sequence[Mapping[str, Any]]) -> Switch | None:
    """The last switch to K = 1 in a run's metrics, or None where there is none or no step after it."""
    places = [place for place, record in enumerate(records) if record.get("type") == "switch" and record["to_patch_size"] == 1]
    if not places:
        return None
    place = places[-1]
    step, tokens = records[place]["step"], records[place]["tokens"]
    losses = [record["loss"] for record in records[place:] if record.get("type") == "step" and record["step"] > step][:FIRST_STEPS]
    spent = [record["cost_tokens"] for record in records[:place] if record.get("type") == "step"]
    if not losses or not spent:
        return None
    before = [
        record["token_loss"] for record in records[:place] if record.get("type") == "evaluation" and record["tokens"] == tokens
    ]  # fmt: skip
    return Switch(spent[-1], before[-1] if before else None, statistics.fmean(losses), max(losses))


def training_curve(records: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, float], ...]:
    """Training loss at K = 1 against cost: (bin, mean) over the steps in each of `BINS` equal parts of the run's cost."""
    steps = [record for record in records if record.get("type") == "step"]
    if not steps:
        return ()
    whole = steps[-1]["cost_tokens"]
    bins: dict[int, list[float]] = {}
    for record in steps:
        if record["patch_size"] == 1:
            bins.setdefault(min(BINS - 1, int(BINS * record["cost_tokens"] / whole)), []).append(record["loss"])
    return tuple((place, statistics.fmean(losses)) for place, losses in sorted(bins.items()))


@dataclass(frozen=True)
class SwitchRow:
    """An arm's switch over its seeds; losses in nats, shares of the budget.

    Args:
        arm: its name.
        baseline: that it is compared with.
        seeds: in the means.
        at: where the switch is, in shares of the budget.
        before: mean held-out token loss before it, None where a seed has none.
        first: mean training loss over the first steps after it.
        peak: mean of the seeds' highest training loss in these steps.
        behind: (share of the budget after the switch, training loss above the baseline's at equal cost, over one part in fifty around it).
        level: share of the budget after the switch from which on the mean is no longer above the baseline's; None where that never comes.
        gaps: (share of the budget after the switch, training loss above the baseline's) of every bin.
    """

    arm: str
    baseline: str
    seeds: int
    at: float
    before: float | None
    first: float
    peak: float
    behind: tuple[tuple[float, float], ...]
    level: float | None
    gaps: tuple[tuple[float, float], ...]


def compare_switch(
    arm: str,
    baseline: str,
    switches: Mapping[int, Switch],
    curves: Mapping[int, Sequence[tuple[int, float]]],
    baselines: Mapping[int, Sequence[tuple[int, float]]],
    budget: int,
) -> SwitchRow | None:
    """An arm's switch beside its baseline, over the seeds that both have; None where there are none.

    Args:
        arm: its name.
        baseline: the other arm's name.
        switches: by seed.
        curves: from `training_curve`, by seed.
        baselines: the other arm's, by seed.
        budget: cost tokens of both.
    """
    seeds = sorted(set(switches) & set(baselines))
    if not seeds:
        return None
    at = statistics.fmean(switches[seed].cost_tokens for seed in seeds) / budget
    differences: dict[int, list[float]] = {}
    for seed in seeds:
        theirs = dict(baselines[seed])
        for place, loss in curves[seed]:
            if place in theirs:
                differences.setdefault(place, []).append(loss - theirs[place])
    gaps = tuple(((place + 0.5) / BINS - at, statistics.fmean(values)) for place, values in sorted(differences.items()))
    smooth = tuple((share, statistics.fmean(gap for other, gap in gaps if abs(other - share) <= 0.0101)) for share, _ in gaps)
    above = [share for share, gap in smooth if gap > 0]
    level = None
    if smooth and (not above or above[-1] < smooth[-1][0]):
        level = max(0.0, above[-1]) if above else 0.0
    befores = [switches[seed].before for seed in seeds]
    known = [before for before in befores if before is not None]
    return SwitchRow(
        arm=arm,
        baseline=baseline,
        seeds=len(seeds),
        at=at,
        before=statistics.fmean(known) if len(known) == len(befores) else None,
        first=statistics.fmean(switches[seed].first for seed in seeds),
        peak=statistics.fmean(switches[seed].peak for seed in seeds),
        behind=tuple((look, min(smooth, key=lambda pair: abs(pair[0] - look))[1]) for look in LOOKS if smooth and smooth[-1][0] >= look),
        level=level,
        gaps=smooth,
    )


def switch_markdown(rows: Sequence[SwitchRow], plot: str) -> str:
    """The switches as Markdown.

    Args:
        rows: from `compare_switch`.
        plot: the picture's path as the document sees it.
    """
    looks = " | ".join(f"behind after {look:.0%}" for look in LOOKS)
    lines = [
        f"![training loss above the baseline's at equal cost, after the switch]({plot})",
        "",
        f"| arm | seeds | switch at | before it | first {FIRST_STEPS} steps | highest of them | {looks} | level after |",
        "| --- | --- | --- | --- | --- | --- | " + "--- | " * len(LOOKS) + "--- |",
    ]
    for row in rows:
        behind = {look: f"{gap:+.3f}" for look, gap in row.behind}
        before = "" if row.before is None else f"{row.before:.3f}"
        level = "never" if row.level is None else f"{row.level:.0%}"
        cells = (f"`{row.arm}`", str(row.seeds), f"{row.at:.0%}", before, f"{row.first:.3f}", f"{row.peak:.3f}")
        lines.append("| " + " | ".join((*cells, *(behind.get(look, "") for look in LOOKS), level)) + " |")
    lines += [
        "",
        "Shares are of the budget. Before the switch: the held-out loss at K = 1; after it: training losses at K = 1 on new text, and",
        "how far they are above the baseline's at equal cost (over one part in fifty of the budget around the place, where the noise of",
        "a seed is about 0.03); level: from where on they are not above it any more.",
        "",
    ]
    return "\n".join(lines)


def plot_switches(path: Path, rows: Sequence[SwitchRow], colours: Sequence[str], title: str) -> None:
    """Training loss above the baseline's at equal cost, against the share of the budget after the switch.

    Args:
        path: the PNG.
        rows: from `compare_switch`, at least one.
        colours: for the lines, in turn.
        title: above it.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9.0, 5.0), layout="constrained")
    for number, row in enumerate(rows):
        shares, gaps = [100 * share for share, _ in row.gaps], [gap for _, gap in row.gaps]
        axis.plot(shares, gaps, color=colours[number % len(colours)], linewidth=1.5, label=f"{row.arm} (n = {row.seeds})")
    axis.axhline(0.0, color="#33373d", linewidth=1.2)
    axis.set_xlim(left=0)
    axis.set_ylim(-0.15, 0.6)
    axis.set_xlabel("% of the budget after the switch")
    axis.set_ylabel("training loss above the baseline's at equal cost (nats, K = 1)")
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8.5, loc="upper right")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)
