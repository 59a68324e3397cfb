"""Estimates how far a run is and how long it still takes, and draws this as a few lines on a terminal.

In: `RunStart` and each `StepRecord`. Out: `Outlook` (shares and remaining times), and `live_view`, which draws them. The time to the next
switch follows from the stage's tokens/s. The time to the end follows from the FLOP/s, because a later stage reads fewer tokens per second
but computes as fast. Both include the evaluations and saves to come (`Pauses`).
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
from megatron_patch.utils.console import one_line
from megatron_patch.utils.units import format_count, format_duration

_BLOCKS = "▁▂▃▄▅▆▇█"
_BAR, _SHORTEST_BAR = 44, 10  # characters
_CURVE = 24  # characters


@dataclass(frozen=True)
class Outlook:
    """The progress of a run and its remaining time.

    Args:
        tokens: share of the run's tokens that is read.
        compute: share of the run's FLOPs that is spent.
        switch_seconds: seconds to the next switch, with the pauses until then; None in the last stage.
        switch_to: name of the stage that begins there, or None.
        end_seconds: seconds to the end, with all pauses; infinite if the speed is unknown.
    """

    tokens: float
    compute: float
    switch_seconds: float | None
    switch_to: str | None
    end_seconds: float

    def to_go(self) -> str:
        """Returns the remaining times in words."""
        end = f"end in {format_duration(self.end_seconds)}"
        return end if self.switch_seconds is None else f"switch in {format_duration(self.switch_seconds)}, {end}"


def outlook(start: RunStart, record: StepRecord, pauses: tuple[float, float] = (0.0, 0.0)) -> Outlook:
    """Returns the outlook after a step.

    Args:
        start: the record of the run's start.
        record: the record of the step.
        pauses: seconds of evaluations and saves until the next switch, and until the end.
    """
    ahead = [(tokens, name) for tokens, name in start.switches if tokens > record.tokens]
    # Costs in tokens: FLOPs over the FLOPs of one token in token-level training.
    total = start.whole_cost * start.total_tokens
    rate = record.tflops * 1e12 * start.ranks / start.token_flops if start.token_flops else 0.0
    left = max(0.0, total - record.cost_tokens)
    return Outlook(
        tokens=record.tokens / start.total_tokens,
        compute=min(1.0, record.cost_tokens / total) if total else 0.0,
        switch_seconds=pauses[0] + (ahead[0][0] - record.tokens) / max(record.tokens_per_second, 1e-9) if ahead else None,
        switch_to=ahead[0][1] if ahead else None,
        end_seconds=pauses[1] + (left / rate if rate > 0 else math.inf if left else 0.0),
    )


class LossTrend:
    """Draws the last losses of one stage as a curve of a few characters, and tests whether they fall.

    A switch of stages empties it, because losses of different stages cannot be compared.
    """

    def __init__(self) -> None:
        self._stage: int | None = None
        self._losses: deque[float] = deque(maxlen=_CURVE * 16)

    def add(self, stage_index: int, loss: float) -> None:
        """Adds the loss of a step; a loss that is not finite is ignored."""
        if stage_index != self._stage:
            self._stage = stage_index
            self._losses.clear()
        if math.isfinite(loss):
            self._losses.append(loss)

    def _means(self) -> list[float]:
        values, size = list(self._losses), math.ceil(len(self._losses) / _CURVE) or 1
        return [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]

    def curve(self) -> str:
        """Returns means of the last losses as block characters, the lowest at the bottom."""
        means = self._means()
        if len(means) < 2:
            return ""
        low, high = min(means), max(means)
        return "".join(_BLOCKS[round((mean - low) / ((high - low) or 1.0) * (len(_BLOCKS) - 1))] for mean in means)

    def arrow(self) -> str:
        """Returns ↘ if the later half of the losses is lower than the earlier half by more than its noise, ↗ if higher, else →."""
        values = list(self._losses)
        if len(values) < 8:
            return ""
        halves = values[: len(values) // 2], values[len(values) // 2 :]
        means = [sum(half) / len(half) for half in halves]
        spread = sum((value - means[1]) ** 2 for value in halves[1]) / (len(halves[1]) - 1)
        noise = 2 * math.sqrt(spread / len(halves[1]))
        return "↘" if means[1] < means[0] - noise else "↗" if means[1] > means[0] + noise else "→"


def bar(share: float, marks: Sequence[float], width: int = _BAR) -> Text:
    """Returns a progress bar with a mark at each switch.

    Args:
        share: share of the bar that is filled.
        marks: shares at which the switches are.
        width: characters of the bar.
    """
    text = Text()
    marked = {min(width - 1, round(mark * width)) for mark in marks}
    filled = min(width, int(share * width))
    for column in range(width):
        # Not only the color differs, because a terminal may show none.
        char = "┿" if column in marked else "━" if column < filled else "─"
        text.append(char, style=("bold cyan" if column < filled else "grey37"))
    return text


@dataclass(frozen=True)
class LiveState:
    """What the live view shows.

    Args:
        start: the record of the run's start.
        record: the record of the last step.
        trend: losses of this stage.
        pauses: seconds of evaluations and saves until the next switch, and until the end.
        evaluation: the last evaluation, or None.
        sample: the last text that was generated, on one line; "" without one.
        ended: how the run ended; "" while it trains.
    """

    start: RunStart
    record: StepRecord
    trend: LossTrend
    pauses: tuple[float, float] = (0.0, 0.0)
    evaluation: EvaluationRecord | None = None
    sample: str = ""
    ended: str = ""


def live_view(state: LiveState, width: int) -> RenderableType:
    """Returns the live view: progress bar, stage, loss, speed, remaining time and the last sample.

    Args:
        state: what it shows.
        width: characters of a line.
    """
    start, record = state.start, state.record
    ahead = outlook(start, record, state.pauses)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True, min_width=6)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    patches = f"patches of {record.patch_size}" if record.patch_size > 1 else "single tokens"
    stage = Text.assemble((one_line(record.stage), "bold"), ("  " + patches, "dim"))
    grid.add_row("stage", Text.assemble(stage, (f"  {format_count(record.tokens)} of {format_count(start.total_tokens)} tokens", "")))
    grid.add_row("loss", _losses(state))
    waits = record.data_seconds / max(record.step_seconds, 1e-9)
    speed = [f"{format_count(record.tokens_per_second)} tokens/s"]
    speed += [f"MFU {record.mfu:.1%}" if record.mfu is not None else f"{record.tflops:.3g} TFLOP/s", f"{record.memory_gib:.1f} GiB"]
    speed += [f"{waits:.0%} waiting for data"] if waits > 0.02 else []
    grid.add_row("speed", " · ".join(speed))
    if (worst := record.worst_block) is not None:
        grid.add_row("experts", _experts(record, *worst))
    if state.ended:
        to_go = [one_line(state.ended)]
    else:
        to_go = [f"end in {format_duration(ahead.end_seconds)}"]
        if ahead.switch_seconds is not None:
            to_go.insert(0, f"stage {one_line(ahead.switch_to or '')} in {format_duration(ahead.switch_seconds)}")
    to_go.append(f"{ahead.compute:.1%} of FLOPs spent")
    grid.add_row("to go" if not state.ended else "ended", " · ".join(to_go))
    if state.sample:
        grid.add_row("sample", Text(one_line(state.sample), "italic"))
    return Group(Text(""), _head(state, ahead, width), grid)


def _head(state: LiveState, ahead: Outlook, width: int) -> Text:
    """Returns the bar and the step, in at most `width` characters if the bar can be that short."""
    start = state.start
    numbers = Text.assemble((f" {ahead.tokens:6.1%}", "bold"), ("  step ", "dim"), f"{state.record.step:,}")
    numbers.append(f" of {start.total_steps:,}", style="dim")
    marks = [tokens / start.total_tokens for tokens, _ in start.switches]
    width = max(_SHORTEST_BAR, min(_BAR, width - len(numbers)))
    return Text.assemble(bar(ahead.tokens, marks, width), numbers, no_wrap=True, overflow="ellipsis")


def _experts(record: StepRecord, block: int, load: float) -> str:
    return f"largest load {load:.1f} times the mean (block {block}) · {sum(record.dead_experts):,} dead in all blocks"


def _losses(state: LiveState) -> Text:
    loss = "skipped" if state.record.skipped else f"{state.record.loss:.4f}"
    losses = Text.assemble((loss, "bold"), " ", (state.trend.curve(), "cyan"), f" {state.trend.arrow()}")
    if state.evaluation is not None:
        losses.append(f"   held-out token loss {state.evaluation.token_loss:.4f}", style="green")
    return losses
