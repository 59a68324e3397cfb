"""How far a run is and how long it still takes, as numbers and as a few calm lines of a terminal.

In: `RunStart` and each `StepRecord`. Out: `Outlook` (fractions and times to go), and `live_view`, which draws it. Time to the next switch
goes by tokens, which that stage reads at the present speed; time to the end goes by FLOPs, as a later stage reads fewer tokens a second
but computes as fast.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_patch.training.callbacks.base import EvaluationRecord, RunStart, StepRecord
from megatron_patch.utils.units import format_count, format_duration

_BLOCKS = "▁▂▃▄▅▆▇█"
_BAR = 44
_CURVE = 24


@dataclass(frozen=True)
class Outlook:
    """Where a run stands.

    Args:
        tokens: share of the run's tokens read.
        compute: share of the run's FLOPs spent.
        switch_seconds: to the next switch; None behind the last.
        switch_to: the stage that begins there.
        end_seconds: to the end, infinite where the speed is not known yet.
    """

    tokens: float
    compute: float
    switch_seconds: float | None
    switch_to: str | None
    end_seconds: float

    def to_go(self) -> str:
        """The times in words."""
        end = f"end in {format_duration(self.end_seconds)}"
        return end if self.switch_seconds is None else f"switch in {format_duration(self.switch_seconds)}, {end}"


def outlook(start: RunStart, record: StepRecord) -> Outlook:
    """What is left of a run after a step."""
    ahead = [(tokens, name) for tokens, name in start.switches if tokens > record.tokens]
    whole = start.whole_cost * start.total_tokens
    # cost_tokens are FLOPs in units of a token at token level.
    rate = record.tflops * 1e12 * start.ranks / start.token_flops if start.token_flops else 0.0
    left = max(0.0, whole - record.cost_tokens)
    return Outlook(
        tokens=record.tokens / start.total_tokens,
        compute=min(1.0, record.cost_tokens / whole) if whole else 0.0,
        switch_seconds=(ahead[0][0] - record.tokens) / max(record.tokens_per_second, 1e-9) if ahead else None,
        switch_to=ahead[0][1] if ahead else None,
        end_seconds=left / rate if rate > 0 else math.inf if left else 0.0,
    )


class LossTrend:
    """The losses of one stage: a curve of a few characters, and whether they fall.

    A stage's loss cannot be compared with another's, so a switch begins anew.
    """

    def __init__(self) -> None:
        self._stage: int | None = None
        self._losses: deque[float] = deque(maxlen=_CURVE * 16)

    def add(self, stage_index: int, loss: float) -> None:
        """Takes a step's loss; one that is not finite is left out."""
        if stage_index != self._stage:
            self._stage = stage_index
            self._losses.clear()
        if math.isfinite(loss):
            self._losses.append(loss)

    def _means(self) -> list[float]:
        values, size = list(self._losses), math.ceil(len(self._losses) / _CURVE) or 1
        return [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]

    def curve(self) -> str:
        """Means of the last losses as blocks, the lowest at the bottom."""
        means = self._means()
        if len(means) < 2:
            return ""
        low, high = min(means), max(means)
        return "".join(_BLOCKS[round((mean - low) / ((high - low) or 1.0) * (len(_BLOCKS) - 1))] for mean in means)

    def arrow(self) -> str:
        """↘ where the later half is lower than the earlier by more than its noise, ↗ where higher, → between."""
        values = list(self._losses)
        if len(values) < 8:
            return ""
        halves = values[: len(values) // 2], values[len(values) // 2 :]
        means = [sum(half) / len(half) for half in halves]
        spread = sum((value - means[1]) ** 2 for value in halves[1]) / (len(halves[1]) - 1)
        noise = 2 * math.sqrt(spread / len(halves[1]))
        return "↘" if means[1] < means[0] - noise else "↗" if means[1] > means[0] + noise else "→"


def bar(share: float, marks: Sequence[float], width: int = _BAR) -> Text:
    """A line that fills, with a mark where each switch is."""
    text = Text()
    places = {min(width - 1, round(mark * width)) for mark in marks}
    filled = min(width, int(share * width))
    for place in range(width):
        text.append("┿" if place in places else "━", style=("bold cyan" if place < filled else "grey37"))
    return text


def live_view(start: RunStart, record: StepRecord, trend: LossTrend, evaluation: EvaluationRecord | None) -> RenderableType:
    """The run in four lines: progress, loss, speed, what is left.

    Args:
        start: the run.
        record: its last step.
        trend: losses of this stage.
        evaluation: the last one, where there was one.
    """
    ahead = outlook(start, record)
    marks = [tokens / start.total_tokens for tokens, _ in start.switches]
    patches = f"patches of {record.patch_size}" if record.patch_size > 1 else "single tokens"
    head = Text.assemble(bar(ahead.tokens, marks), (f" {ahead.tokens:6.1%}", "bold"), ("  step ", "dim"), f"{record.step:,}")
    head.append(f" of {start.total_steps:,}", style="dim")
    loss = "skipped" if record.skipped else f"{record.loss:.4f}"
    losses = Text.assemble((loss, "bold"), " ", (trend.curve(), "cyan"), f" {trend.arrow()}")
    if evaluation is not None:
        losses.append(f"   held out {evaluation.token_loss:.4f}", style="green")
        losses.append(" at K = 1", style="dim")
    waits = record.data_seconds / max(record.step_seconds, 1e-9)
    speed = [f"{format_count(record.tokens_per_second)} tokens/s"]
    speed += [f"MFU {record.mfu:.1%}" if record.mfu is not None else f"{record.tflops:.3g} TFLOP/s", f"{record.memory_gib:.1f} GiB"]
    speed += [f"{waits:.0%} waiting for data"] if waits > 0.02 else []
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    stage = Text.assemble((record.stage, "bold"), ("  " + patches, "dim"))
    grid.add_row("stage", Text.assemble(stage, (f"  {format_count(record.tokens)} of {format_count(start.total_tokens)} tokens", "")))
    grid.add_row("loss", losses)
    grid.add_row("speed", " · ".join(speed))
    to_go = Text()
    if ahead.switch_seconds is not None:
        to_go.append(f"{ahead.switch_to} in {format_duration(ahead.switch_seconds)} · ")
    to_go.append(f"end in {format_duration(ahead.end_seconds)}")
    to_go.append(f"   {ahead.compute:.1%} of the compute spent, {start.whole_cost:.2f} of token level's in all", style="dim")
    grid.add_row("to go", to_go)
    return Group(Text(""), head, grid)
