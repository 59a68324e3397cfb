"""The effect of the last switch to single tokens on the loss, and the recovery after it. In: metrics of runs. Out: rows, Markdown, a PNG.

The loss before the switch is the held-out loss at K = 1; the loss after it is the training loss at K = 1, where each token is read for the
first time. Both estimate the same quantity, so their difference is the jump at the switch. The gap between an arm and its baseline is taken
at equal cost, seed by seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.utils.figures import save_figure

BINS = 200
FIRST_STEPS = 10
GAP_SHARES = (0.02, 0.05, 0.2)
"""Shares of the budget after the switch at which the table shows the gap to the baseline."""


@dataclass(frozen=True)
class Switch:
    """The last switch of one run, to K = 1.

    Args:
        cost_tokens: cost before the switch.
        before: held-out token loss just before the switch, in nats; None without an evaluation there.
        first: mean training loss over the first `FIRST_STEPS` steps after the switch.
        peak: highest training loss of these steps.
    """

    cost_tokens: float
    before: float | None
    first: float
    peak: float


def read_switch(records: Sequence[Mapping[str, Any]]) -> Switch | None:
    """Returns the last switch to K = 1 in a run's metrics, or None without such a switch or without a step after it."""
    indices = [index for index, record in enumerate(records) if record.get("type") == "switch" and record["to_patch_size"] == 1]
    if not indices:
        return None
    index = indices[-1]
    step, tokens = records[index]["step"], records[index]["tokens"]
    losses = [record["loss"] for record in records[index:] if record.get("type") == "step" and record["step"] > step][:FIRST_STEPS]
    spent = [record["cost_tokens"] for record in records[:index] if record.get("type") == "step"]
    if not losses or not spent:
        return None
    before = [
        record["token_loss"] for record in records[:index] if record.get("type") == "evaluation" and record["tokens"] == tokens
    ]  # fmt: skip
    return Switch(spent[-1], before[-1] if before else None, statistics.fmean(losses), max(losses))


def training_curve(records: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, float], ...]:
    """Returns training loss at K = 1 against cost: (bin, mean) over the steps in each of `BINS` equal parts of the run's cost."""
    steps = [record for record in records if record.get("type") == "step"]
    if not steps:
        return ()
    total = steps[-1]["cost_tokens"]
    bins: dict[int, list[float]] = {}
    for record in steps:
        if record["patch_size"] == 1:
            bins.setdefault(min(BINS - 1, int(BINS * record["cost_tokens"] / total)), []).append(record["loss"])
    return tuple((number, statistics.fmean(losses)) for number, losses in sorted(bins.items()))


@dataclass(frozen=True)
class SwitchRow:
    """The switch of one arm, averaged over its seeds. Losses are in nats, shares are of the budget.

    Args:
        arm: name of the arm.
        baseline: name of the arm that it is compared with.
        seeds: number of seeds in the means.
        at: cost before the switch, as a share.
        before: mean held-out token loss before the switch; None if a seed has none.
        first: mean training loss over the first steps after the switch.
        peak: mean over seeds of the highest training loss of these steps.
        behind: (share after the switch, training loss above the baseline's at equal cost) at a few shares, averaged over 2 % of the budget.
        level: share after the switch from which the mean loss is no longer above the baseline's; None if that never happens.
        gaps: (share after the switch, training loss above the baseline's at equal cost) of every bin, averaged in the same way.
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
    """Compares an arm after its switch with its baseline over the seeds that both have; returns None without a common seed.

    Args:
        arm: name of the arm.
        baseline: name of the baseline.
        switches: the arm's switch by seed.
        curves: the arm's training loss by seed, from `training_curve`.
        baselines: the baseline's training loss by seed.
        budget: cost tokens of both.
    """
    seeds = sorted(set(switches) & set(baselines))
    if not seeds:
        return None
    at = statistics.fmean(switches[seed].cost_tokens for seed in seeds) / budget
    differences: dict[int, list[float]] = {}
    for seed in seeds:
        theirs = dict(baselines[seed])
        for number, loss in curves[seed]:
            if number in theirs:
                differences.setdefault(number, []).append(loss - theirs[number])
    gaps = tuple(((number + 0.5) / BINS - at, statistics.fmean(values)) for number, values in sorted(differences.items()))
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
        behind=tuple(
            (share, min(smooth, key=lambda pair: abs(pair[0] - share))[1]) for share in GAP_SHARES if smooth and smooth[-1][0] >= share
        ),
        level=level,
        gaps=smooth,
    )


def switch_markdown(rows: Sequence[SwitchRow], plot: str) -> str:
    """Returns the switches as Markdown.

    Args:
        rows: from `compare_switch`.
        plot: path of the plot, relative to the document.
    """
    gap_heads = " | ".join(f"gap after {share:.0%}" for share in GAP_SHARES)
    lines = [
        f"![training loss minus the baseline's at equal cost, after the switch]({plot})",
        "",
        f"| arm | seeds | switch at | loss before | first {FIRST_STEPS} steps | their maximum | {gap_heads} | level after |",
        "| --- | --- | --- | --- | --- | --- | " + "--- | " * len(GAP_SHARES) + "--- |",
    ]
    for row in rows:
        behind = {share: f"{gap:+.3f}" for share, gap in row.behind}
        before = "" if row.before is None else f"{row.before:.3f}"
        level = "never" if row.level is None else f"{row.level:.0%}"
        cells = (f"`{row.arm}`", str(row.seeds), f"{row.at:.0%}", before, f"{row.first:.3f}", f"{row.peak:.3f}")
        lines.append("| " + " | ".join((*cells, *(behind.get(share, "") for share in GAP_SHARES), level)) + " |")
    lines += [
        "",
        "Shares are of the budget. The loss before the switch is the held-out loss at K = 1. The others are training losses at K = 1 on",
        "new text. A gap is the loss minus the baseline's at equal cost, averaged over 2 % of the budget, where the noise of one seed is",
        "about 0.03. Level: the share after which the loss is no longer above the baseline's.",
        "",
    ]
    return "\n".join(lines)


def plot_switches(path: Path, rows: Sequence[SwitchRow], colors: Sequence[str], title: str) -> None:
    """Draws training loss minus the baseline's at equal cost, against the share of the budget after the switch.

    Args:
        path: PNG file to write.
        rows: from `compare_switch`, at least one.
        colors: for the lines, in turn.
        title: title of the figure.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9.0, 5.0), layout="constrained")
    for number, row in enumerate(rows):
        shares, gaps = [100 * share for share, _ in row.gaps], [gap for _, gap in row.gaps]
        axis.plot(shares, gaps, color=colors[number % len(colors)], linewidth=1.5, label=f"{row.arm} (n = {row.seeds})")
    axis.axhline(0.0, color="#33373d", linewidth=1.2)
    axis.set_xlim(left=0)
    axis.set_ylim(-0.15, 0.6)
    axis.set_xlabel("% of the budget after the switch")
    axis.set_ylabel("training loss minus the baseline's at equal cost (nats, K = 1)")
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8.5, loc="upper right")
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)
    plt.close(figure)
