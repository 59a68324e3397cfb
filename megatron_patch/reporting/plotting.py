"""Plots the held-out token loss of runs, or of one corpus, against tokens and against cost. In: folders of runs. Out: a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.errors import DataError
from megatron_patch.reporting.history import labeled
from megatron_patch.reporting.metrics_file import MetricsFile, loss_of_corpus, read_metrics_file
from megatron_patch.reporting.rows import EVALUATION_COLUMNS
from megatron_patch.utils.console import one_line
from megatron_patch.utils.figures import legend_label, save_figure
from megatron_patch.utils.units import format_count

_COLORS = ("#1f5fa8", "#d1495b", "#2e8b57", "#8a5fbf", "#c98a1b", "#3aa6a6", "#7a5548", "#5b6570")


@dataclass(frozen=True)
class Curve:
    """Held-out token loss of one run.

    Args:
        label: name in the legend.
        tokens: tokens read at each evaluation.
        cost_tokens: tokens that token-level training reads for the same FLOPs, at each evaluation.
        losses: loss at K = 1 of each evaluation, in nats per token.
        switches: (tokens, cost_tokens) of each switch.
        patch_sizes: K at each evaluation.
        notes: sentences about rows of the metrics and evaluations that are left out.
    """

    label: str
    tokens: list[float]
    cost_tokens: list[float]
    losses: list[float]
    switches: list[tuple[float, float]]
    patch_sizes: list[int]
    notes: list[str]


def read_curve(run: Path, label: str | None = None, corpus: str | None = None) -> Curve:
    """Reads the evaluations of a run.

    Args:
        run: folder of the run, or its metrics file.
        label: name in the legend; None uses the name of the folder.
        corpus: read the loss of this corpus in place of the loss of the blend.

    Raises:
        DataError: the run has no metrics, or the metrics contain no evaluation, or none of the corpus.
    """
    path = run / "metrics.jsonl" if run.is_dir() else run
    metrics = read_metrics_file(path)
    rows = [
        dict(zip(EVALUATION_COLUMNS, row, strict=False)) | ({} if corpus is None else {"token_loss": _loss_of(corpus, metrics, row)})
        for row in metrics.evaluations.rows()
    ]
    evaluations = [row for row in rows if row["token_loss"] is not None]
    if not evaluations and corpus is not None:
        raise DataError(
            f"{path} contains no evaluation of {one_line(corpus)}",
            f"one of {', '.join(map(one_line, metrics.corpora))}" if metrics.corpora else "a run whose evaluations name their corpora",
            "correct or remove --corpus",
        )
    if not evaluations:
        why = "".join(f"; {note}" for note in metrics.left_out.notes()[-1:])
        raise DataError(
            f"{path} contains no evaluation{why}", "a run that evaluates held-out data", "train with --eval-interval and a held-out --split"
        )
    left_out = [row["step"] for row in rows if row["token_loss"] is None] if corpus is not None else []
    notes = [f"draws no evaluation without {one_line(corpus or '')}: from step {left_out[0]:,} to {left_out[-1]:,}"] if left_out else []
    switches = [metrics.places.locate(record) for record in metrics.switches.last]
    return Curve(
        one_line(label or run.name),
        [row["tokens"] for row in evaluations],
        [row["cost_tokens"] for row in evaluations],
        [row["token_loss"] for row in evaluations],
        [(place["tokens"], place["cost_tokens"]) for place in switches],
        [row["patch_size"] for row in evaluations],
        metrics.left_out.notes() + notes,
    )


def _loss_of(corpus: str, metrics: MetricsFile, row: Sequence[Any]) -> float | None:
    names = list(metrics.corpora)
    return loss_of_corpus(row, names.index(corpus)) if corpus in names else None


def plot_runs(
    runs: Sequence[Path], output: Path, labels: Sequence[str] | None = None, title: str | None = None, corpus: str | None = None
) -> list[Curve]:
    """Draws the held-out token loss of runs, against tokens on the left and against cost on the right.

    Args:
        runs: folders of runs, or their metrics files.
        output: PNG file to write.
        labels: one label per run; None uses the names of the folders.
        title: title above both panels.
        corpus: draw the loss of this corpus, by its name in the metrics, in place of the loss of the blend.

    Returns:
        The curves, in the order of the runs.

    Raises:
        DataError: a run cannot be read, the number of labels is wrong, or the file cannot be written.
    """
    curves = [read_curve(run, label, corpus) for run, label in labeled(runs, labels)]
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True, layout="constrained")
    panels = (("tokens", "tokens read"), ("cost_tokens", "cost: tokens that token-level training reads for the same FLOPs"))
    for axis, (name, caption) in zip(axes, panels, strict=True):
        for number, curve in enumerate(curves):
            _draw(axis, curve, name, _COLORS[number % len(_COLORS)])
        axis.set_xlabel(caption)
        axis.xaxis.set_major_formatter(lambda value, _: format_count(value))
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(left=0)
    _zoom(axes[0], curves)
    axes[0].set_ylabel("held-out token loss (nats per token, K = 1)")
    axes[1].legend(frameon=False, loc="upper right")
    of = f" of {corpus}" if corpus else ""
    figure.suptitle(title or f"Held-out token loss{of} (dashed in patch stages; a ring marks the switch)", fontsize=11)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        save_figure(figure, output)
    except OSError as error:
        raise DataError(f"cannot write {output}: {error.strerror}", "a writable image file, such as loss.png", "change --output") from error
    finally:
        plt.close(figure)
    return curves


def _draw(axis: Any, curve: Curve, name: str, color: str) -> None:
    """Draws one run: dashed in patch stages, solid in the token stage."""
    xs = getattr(curve, name)
    start = 0
    for end in range(1, len(xs) + 1):
        if end == len(xs) or (curve.patch_sizes[end] > 1) != (curve.patch_sizes[start] > 1):
            # The last point of a stage also starts the next: the model is the same on both sides of the switch.
            first = max(0, start - 1)
            dashed = curve.patch_sizes[start] > 1
            axis.plot(
                xs[first:end], curve.losses[first:end], "--" if dashed else "-", color=color, linewidth=1.7, alpha=0.75 if dashed else 1.0
            )
            start = end
    for tokens, cost_tokens in curve.switches:
        position = tokens if name == "tokens" else cost_tokens
        nearest = min(range(len(xs)), key=lambda index: abs(xs[index] - position))
        axis.plot([position], [curve.losses[nearest]], "o", markerfacecolor="white", markeredgecolor=color, markersize=6)
    axis.plot([xs[-1]], [curve.losses[-1]], "o", color=color, markersize=4.5, label=legend_label(f"{curve.label}: {curve.losses[-1]:.3f}"))


def _zoom(axis: Any, curves: Sequence[Curve]) -> None:
    """Excludes the initial fall of the losses, which would compress the rest of the plot."""
    ends = [curve.losses[-1] for curve in curves]
    starts = [curve.losses[min(len(curve.losses) - 1, max(1, len(curve.losses) // 8))] for curve in curves]
    low, high = min(min(curve.losses) for curve in curves), max(*starts, *ends)
    margin = max(0.02, 0.06 * (high - low))
    axis.set_ylim(low - margin, high + margin)
