"""Prints the run: a live view on a terminal, and aligned lines everywhere."""

from __future__ import annotations

from rich.console import Console as RichConsole
from rich.live import Live
from rich.markup import escape

from megatron_patch.training.callbacks.base import Callback, EvaluationRecord, Event, RunEnd, RunStart, SaveRecord, StepRecord, SwitchRecord
from megatron_patch.training.callbacks.progress import LossTrend, live_view, outlook
from megatron_patch.utils.console import make_console, shortened
from megatron_patch.utils.units import format_count, format_duration

_HEAD_EVERY = 40  # lines
_WIDE, _NARROW = 160, 110
_WIDE_NAME, _NARROW_NAME = 80, 24  # longest name of a corpus
_WIDTHS = {
    "step": 8,
    "stage": -10,
    "K": 2,
    "tokens": 8,
    "loss": 8,
    "lr": 9,
    "grad": 7,
    "tok/s": 7,
    "pos/s": 7,
    "TFLOP/s": 7,
    "MFU": 6,
    "GiB": 5,
    "wait": 5,
    "FLOPs": 6,
}
"""Widths of the columns of a step's line; a negative one is aligned left. "wait" is the share of time spent waiting for data, "FLOPs" the
share of the run's FLOPs spent so far."""
_LIVE_VIEW_ONLY = ("pos/s", "TFLOP/s", "MFU", "GiB", "wait")
"""Columns that a narrow terminal has no room for; the live view shows them."""


class Console(Callback):
    """Prints the progress of the run.

    Args:
        log_interval: number of steps between two lines.
        console: where to print; None: standard output.
    """

    def __init__(self, log_interval: int, console: RichConsole | None = None) -> None:
        self._interval = log_interval
        self._console = console or make_console(markup=True)
        self._start: RunStart | None = None
        self._live: Live | None = None
        self._trend = LossTrend()
        self._evaluation: EvaluationRecord | None = None
        self._lines = 0
        width = self._console.width if self._console.is_terminal else _WIDE
        self._narrow = width < _NARROW
        self._columns = [name for name in _WIDTHS if not (self._narrow and name in _LIVE_VIEW_ONLY)]
        self._shows_to_go = width >= _WIDE

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
        if self._live is not None:
            self._live.update(live_view(self._start, record, self._trend, self._evaluation))
        if record.step % self._interval and record.step != self._start.total_steps:
            return
        if self._lines % _HEAD_EVERY == 0:
            self._console.print(self._line({name: name for name in self._columns}) + ("  to go" if self._shows_to_go else ""))
        self._lines += 1
        ahead = outlook(self._start, record)
        cells = {
            "step": f"{record.step:,}",
            "stage": record.stage[:10],
            "K": str(record.patch_size),
            "tokens": format_count(record.tokens),
            "loss": "skipped" if record.skipped else f"{record.loss:.4f}",
            "lr": f"{record.lr:.3g}",
            "grad": f"{record.grad_norm:.3f}",
            "tok/s": format_count(record.tokens_per_second),
            "pos/s": format_count(record.positions_per_second),
            "TFLOP/s": f"{record.tflops:.3g}",
            "MFU": "-" if record.mfu is None else f"{record.mfu:.1%}",
            "GiB": f"{record.memory_gib:.1f}",
            "wait": f"{record.data_seconds / max(record.step_seconds, 1e-9):.1%}",
            "FLOPs": f"{ahead.compute:.1%}",
        }
        self._console.print(escape(self._line(cells)) + (f"  {ahead.to_go()}" if self._shows_to_go else ""))

    def _line(self, cells: dict[str, str]) -> str:
        return " ".join(
            cells[name].rjust(_WIDTHS[name]) if _WIDTHS[name] > 0 else cells[name].ljust(-_WIDTHS[name]) for name in self._columns
        )

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Prints the token loss and, in a patch stage, the patch loss; below them those of each corpus, if there are several."""
        self._evaluation = record
        patch = "" if record.patch_size == 1 else f", patch loss {record.patch_loss:.4f} (K = {record.patch_size})"
        amount = f" on {format_count(record.eval_tokens)} held-out tokens in {format_duration(record.seconds)}"
        lines = [
            f"{record.step:>8,} [bold]evaluation[/bold]: token loss {record.token_loss:.4f} (K = 1){patch}"
            + ("" if self._narrow else amount)
        ]
        corpora = record.corpora if len(record.corpora) > 1 else {}
        longest = min(_NARROW_NAME if self._narrow else _WIDE_NAME, max(map(len, corpora), default=0))
        for name, part in corpora.items():
            patch = "" if record.patch_size == 1 else f", patch loss {part.patch_loss:.4f}"
            label = escape(shortened(name, longest).ljust(longest))
            lines.append(f"{'':>8} {label} {part.weight:>6.1%}  token loss {part.token_loss:.4f}{patch}")
        self._console.print("\n".join(lines))

    def on_switch(self, record: SwitchRecord) -> None:
        """Prints both stages."""
        self._console.print(
            f"{record.step:>8,} [bold]switch[/bold]: stage {escape(record.from_stage)} (K = {record.from_patch_size}) -> "
            f"{escape(record.to_stage)} (K = {record.to_patch_size}) after {format_count(record.tokens)} tokens"
        )

    def on_save(self, record: SaveRecord) -> None:
        """Prints the checkpoint's path, size and time."""
        mebibytes = record.bytes / 2**20
        size = f"{mebibytes:,.0f} MiB" if mebibytes >= 10 else f"{mebibytes:.1f} MiB"
        stall = f", training waited {record.stall_seconds:.1f} s" if record.stall_seconds < record.seconds else ""
        self._console.print(f"{record.step:>8,} saved {escape(record.folder)} ({size} in {record.seconds:.1f} s{stall})", soft_wrap=True)

    def on_event(self, event: Event) -> None:
        """Prints the kind of the event and its message."""
        self._console.print(f"{event.step:>8,} [bold]{event.kind}[/bold]: {escape(event.message)}", soft_wrap=True)

    def on_message(self, text: str) -> None:
        """Prints the sentence."""
        self._console.print(f"{'':>8} {escape(text)}", soft_wrap=True)

    def on_end(self, record: RunEnd) -> None:
        """Prints why and after what the run ends."""
        head = "[bold]done[/bold]" if record.reason == "done" else f"[bold]stopped[/bold] ({record.reason})"
        duration = format_duration(record.seconds)
        self._console.print(f"{record.step:>8,} {head}: {format_count(record.tokens)} tokens read, {duration} since this start")

    def close(self) -> None:
        """Closes the live view."""
        if self._live is not None:
            self._live.stop()
            self._live = None
