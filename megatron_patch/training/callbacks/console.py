"""Prints the run: a live view on a terminal, and aligned lines everywhere. What others chose (names, paths, samples) is never a command."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rich.console import Console as RichConsole
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megatron_patch.training.callbacks.base import Callback, EvaluationRecord, Event, RunEnd, RunStart, SaveRecord, StepRecord, SwitchRecord
from megatron_patch.training.callbacks.progress import LiveState, LossTrend, live_view, outlook
from megatron_patch.training.pauses import Pauses
from megatron_patch.utils.console import line_width, make_console, one_line, shortened
from megatron_patch.utils.units import format_count, format_duration

_HEAD_EVERY = 40  # lines
_WIDE = 160
_WIDE_NAME, _NARROW_NAME = 80, 24  # longest name of a corpus
_SAMPLE = 400  # characters of a sample
_WIDTHS = {
    "step": 8,
    "stage": -10,
    "K": 2,
    "tokens": 8,
    "loss": 8,
    "lr": 9,
    "grad": 7,
    "experts": 9,
    "tok/s": 7,
    "pos/s": 7,
    "TFLOP/s": 7,
    "MFU": 6,
    "GiB": 5,
    "wait": 5,
    "FLOPs": 6,
}
"""Widths of the columns of a step's line; a negative one is aligned left. "experts" is the largest load of an expert over the mean, and
the block where it is largest; "wait" is the share of time spent waiting for data, "FLOPs" the share of the run's FLOPs spent so far."""
_ONLY_WITH_EXPERTS = "experts"
_LIVE_VIEW_ONLY = ("pos/s", "TFLOP/s", "MFU", "GiB", "wait")
"""Columns that a narrow terminal has no room for; the live view shows them."""
_LEFT_OUT_NEXT = ("FLOPs", "experts", "grad", "lr", "tok/s", "tokens", "K", "stage")
"""Columns that a still narrower terminal has no room for, the first one first."""


class Console(Callback):
    """Prints the progress of the run.

    Args:
        log_interval: number of steps between two lines.
        pauses: the evaluations and saves of the run, whose times the remaining time includes; None: it does not.
        next_steps: (what it does, command) for each command that is printed at the end of the plan.
        console: where to print; None: standard output.
    """

    def __init__(
        self,
        log_interval: int,
        pauses: Pauses | None = None,
        next_steps: Sequence[tuple[str, str]] = (),
        console: RichConsole | None = None,
    ) -> None:
        self._interval, self._pauses, self._next_steps = log_interval, pauses, next_steps
        self._console = console or make_console()
        self._start: RunStart | None = None
        self._live: Live | None = None
        self._state: LiveState | None = None
        self._trend = LossTrend()
        self._lines = 0
        self._width = line_width(self._console, _WIDE)
        self._columns = _columns(self._width, experts=False)
        self._narrow = len(self._columns) < len(_WIDTHS) - 1
        self._shows_to_go = self._width >= _WIDE

    def on_start(self, record: RunStart) -> None:
        """Opens the live view."""
        self._start = record
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()

    def on_step(self, record: StepRecord) -> None:
        """Updates the live view; prints a line if the interval is due or the plan is done."""
        assert self._start is not None
        self._trend.add(record.stage_index, record.loss)
        pauses = self._pauses.ahead(record.step, record.stage_index) if self._pauses is not None else (0.0, 0.0)
        before = self._state or LiveState(self._start, record, self._trend)
        self._state = dataclasses.replace(before, record=record, pauses=pauses)
        self._draw()
        if record.step % self._interval and record.step != self._start.total_steps:
            return
        worst = record.worst_block
        if self._lines % _HEAD_EVERY == 0:
            self._columns = _columns(self._width, experts=worst is not None)
            self._print(self._line({name: name for name in self._columns}) + ("  to go" if self._shows_to_go else ""))
        self._lines += 1
        ahead = outlook(self._start, record, pauses)
        cells = {
            "step": f"{record.step:,}",
            "stage": one_line(record.stage)[:10],
            "K": str(record.patch_size),
            "tokens": format_count(record.tokens),
            "loss": "skipped" if record.skipped else f"{record.loss:.4f}",
            "lr": f"{record.lr:.3g}",
            "grad": f"{record.grad_norm:.3f}",
            "experts": "-" if worst is None else _worst_cell(*worst),
            "tok/s": format_count(record.tokens_per_second),
            "pos/s": format_count(record.positions_per_second),
            "TFLOP/s": f"{record.tflops:.3g}" if record.tflops >= 0.01 else f"{record.tflops:.0e}",
            "MFU": "-" if record.mfu is None else f"{record.mfu:.1%}",
            "GiB": f"{record.memory_gib:.1f}",
            "wait": f"{record.data_seconds / max(record.step_seconds, 1e-9):.1%}",
            "FLOPs": f"{ahead.compute:.1%}",
        }
        self._print(self._line(cells) + (f"  {ahead.to_go()}" if self._shows_to_go else ""))

    def _line(self, cells: dict[str, str]) -> str:
        return " ".join(
            cells[name].rjust(_WIDTHS[name]) if _WIDTHS[name] > 0 else cells[name].ljust(-_WIDTHS[name]) for name in self._columns
        )

    def _print(self, *parts: str | tuple[str, str], whole: bool = False) -> None:
        """Prints a line of parts, each of which is a text or (text, style).

        With `whole`, a terminal breaks it at its last column, so that paths and commands can be copied from it; otherwise between words.
        """
        self._console.print(Text.assemble(*parts), soft_wrap=whole or None)

    def _print_at(self, step: int, title: str, text: str, whole: bool = False) -> None:
        """Prints what happened after a step; on a terminal, further lines are indented, so that no sample looks like another line."""
        if whole or not self._console.is_terminal:
            self._print(f"{step:>8,} ", (one_line(title), "bold"), one_line(text), whole=whole)
            return
        grid = Table.grid(padding=(0, 1))
        grid.add_column(justify="right", min_width=8)
        grid.add_column(overflow="fold")
        grid.add_row(f"{step:,}", Text.assemble((one_line(title), "bold"), one_line(text)))
        self._console.print(grid)

    def _draw(self) -> None:
        if self._live is not None and self._state is not None:
            self._live.update(live_view(self._state, self._console.width))

    def _show(self, **changes: object) -> None:
        """Changes what the live view shows; before the first step there is none."""
        if self._state is not None:
            self._state = dataclasses.replace(self._state, **changes)  # type: ignore[arg-type]
            self._draw()

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Prints the token loss and, in a patch stage, the patch loss; below them those of each corpus, if there are several."""
        if self._pauses is not None:
            self._pauses.add_evaluation(record.step, record.patch_size, record.seconds)
        self._show(evaluation=record)
        patch = "" if record.patch_size == 1 else f", patch loss {record.patch_loss:.4f} (K = {record.patch_size})"
        amount = f" on {format_count(record.eval_tokens)} held-out tokens in {format_duration(record.seconds)}"
        losses = f": token loss {record.token_loss:.4f} (K = 1){patch}"
        text = Text.assemble(f"{record.step:>8,} ", ("evaluation", "bold"), losses + ("" if self._narrow else amount))
        corpora = record.corpora if len(record.corpora) > 1 else {}
        longest = min(_NARROW_NAME if self._narrow else _WIDE_NAME, max((len(one_line(name)) for name in corpora), default=0))
        for name, part in corpora.items():
            patch = "" if record.patch_size == 1 else f", patch loss {part.patch_loss:.4f}"
            label = shortened(one_line(name), longest).ljust(longest)
            text.append(f"\n{'':>8} {label} {part.weight:>6.1%}  token loss {part.token_loss:.4f}{patch}")
        # All lines at once: whoever reads the log finds the evaluation complete.
        self._console.print(text, soft_wrap=True)

    def show_samples(self, step: int, texts: Sequence[str], seconds: float) -> None:
        """Prints texts that were generated after a step, and keeps the first one in the live view.

        Args:
            step: the step.
            texts: each prompt with its continuation.
            seconds: the time that they took.
        """
        if self._pauses is not None:
            self._pauses.add_samples(seconds)
        shown = [" ".join(text.split()) for text in texts]
        for text in shown:
            self._print_at(step, "sample", f": {text[:_SAMPLE]}")
        self._show(sample=shown[0] if shown else "")

    def on_switch(self, record: SwitchRecord) -> None:
        """Prints both stages."""
        stages = f"stage {record.from_stage} (K = {record.from_patch_size}) -> {record.to_stage} (K = {record.to_patch_size})"
        self._print_at(record.step, "switch", f": {stages} after {format_count(record.tokens)} tokens")

    def on_save(self, record: SaveRecord) -> None:
        """Prints the checkpoint's path, size and time."""
        if self._pauses is not None:
            self._pauses.add_save(record.step, record.stall_seconds)
        mebibytes = record.bytes / 2**20
        size = f"{mebibytes:,.0f} MiB" if mebibytes >= 10 else f"{mebibytes:.1f} MiB"
        stall = f", training waited {record.stall_seconds:.1f} s" if record.stall_seconds < record.seconds else ""
        self._print_at(record.step, "saved", f" {record.folder} ({size} in {record.seconds:.1f} s{stall})", whole=True)

    def on_event(self, event: Event) -> None:
        """Prints the kind of the event and its message."""
        self._print_at(event.step, event.kind, f": {event.message}", whole=True)

    def on_message(self, text: str) -> None:
        """Prints the sentence."""
        self._print(f"{'':>8} {one_line(text)}", whole=True)

    def on_end(self, record: RunEnd) -> None:
        """Prints why and after what the run ends; after the whole plan, also what to do with it."""
        done = record.reason == "done"
        duration = format_duration(record.seconds)
        self._show(ended=f"{'done' if done else f'stopped ({record.reason})'} after {duration}")
        self.close()
        amount = f"{format_count(record.tokens)} tokens read, {duration} since this start"
        self._print_at(record.step, "done" if done else "stopped", f"{'' if done else f' ({record.reason})'}: {amount}")
        if done and self._next_steps:
            self._print(("Next", "bold"))
            for name, command in self._next_steps:
                self._print(f"  {name:<8}  {one_line(command)}", whole=True)

    def close(self) -> None:
        """Closes the live view, whose last frame stays."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def _worst_cell(block: int, load: float) -> str:
    return f"{load:.1f} @{block}" if load < 100 else f"{load:.0f} @{block}"


def _columns(width: int, experts: bool) -> list[str]:
    """Returns the columns that a line of this width has room for, of a model with or without experts."""
    columns = [name for name in _WIDTHS if experts or name != _ONLY_WITH_EXPERTS]
    if _line_width(columns) > width:
        columns = [name for name in columns if name not in _LIVE_VIEW_ONLY]
    for name in _LEFT_OUT_NEXT:
        if name in columns and _line_width(columns) > width:
            columns.remove(name)
    return columns


def _line_width(columns: Sequence[str]) -> int:
    return sum(abs(_WIDTHS[name]) + 1 for name in columns)
