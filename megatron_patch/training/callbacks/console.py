"""The run on the screen: a live view where there is a terminal, plain aligned lines elsewhere."""

from __future__ import annotations

from rich.console import Console as RichConsole
from rich.live import Live
from rich.markup import escape

from megatron_patch.training.callbacks.base import Callback, EvaluationRecord, Event, RunEnd, RunStart, SaveRecord, StepRecord, SwitchRecord
from megatron_patch.training.callbacks.progress import LossTrend, live_view, outlook
from megatron_patch.utils.console import make_console
from megatron_patch.utils.units import format_count, format_duration


class Console(Callback):
    """Tells a person how the run goes.

    Args:
        log_interval: steps between lines.
        console: where to; by default standard output.
    """

    def __init__(self, log_interval: int, console: RichConsole | None = None) -> None:
        self._interval = log_interval
        self._console = console or make_console()
        self._start: RunStart | None = None
        self._live: Live | None = None
        self._trend = LossTrend()
        self._evaluation: EvaluationRecord | None = None
        self._lines = 0
        # The live view tells it too; a narrow terminal would break the lines.
        self._tells_to_go = not self._console.is_terminal or self._console.width >= 160

    def on_start(self, record: RunStart) -> None:
        """Opens the live view."""
        self._start = record
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()

    def on_step(self, record: StepRecord) -> None:
        """Draws the live view anew; prints a line every so many steps."""
        assert self._start is not None
        self._trend.add(record.stage_index, record.loss)
        if self._live is not None:
            self._live.update(live_view(self._start, record, self._trend, self._evaluation))
        if record.step % self._interval and record.step != self._start.total_steps:
            return
        if self._lines % 40 == 0:
            self._console.print(
                f"{'step':>8} {'stage':<10} {'K':>2} {'tokens':>8} {'loss':>8} {'lr':>9} {'grad':>7} {'tok/s':>7} {'pos/s':>7} "
                f"{'TFLOP/s':>7} {'MFU':>6} {'GiB':>5} {'data':>5} {'spent':>6}" + ("  to go" if self._tells_to_go else "")
            )
        self._lines += 1
        ahead = outlook(self._start, record)
        waited = record.data_seconds / max(record.step_seconds, 1e-9)
        loss = "skipped" if record.skipped else f"{record.loss:8.4f}"
        mfu = "-" if record.mfu is None else f"{record.mfu:.1%}"
        self._console.print(
            f"{record.step:>8,} {record.stage:<10.10} {record.patch_size:>2} {format_count(record.tokens):>8} {loss:>8} {record.lr:>9.3g} "
            f"{record.grad_norm:>7.3f} {format_count(record.tokens_per_second):>7} {format_count(record.positions_per_second):>7} "
            f"{record.tflops:>7.3g} {mfu:>6} {record.memory_gib:>5.1f} {waited:>5.1%} {ahead.compute:>6.1%}"
            + (f"  {ahead.to_go()}" if self._tells_to_go else "")
        )

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Both losses, each by its name."""
        self._evaluation = record
        patch = "" if record.patch_size == 1 else f" · patch loss {record.patch_loss:.4f} (K = {record.patch_size})"
        self._console.print(
            f"{record.step:>8,} [bold]held out[/bold]: token loss {record.token_loss:.4f} (K = 1){patch} on "
            f"{format_count(record.eval_tokens)} tokens in {format_duration(record.seconds)}"
        )

    def on_switch(self, record: SwitchRecord) -> None:
        """Says that patches change."""
        self._console.print(
            f"{record.step:>8,} [bold]switch[/bold]: {record.from_stage} (K = {record.from_patch_size}) -> {record.to_stage} "
            f"(K = {record.to_patch_size}) after {format_count(record.tokens)} tokens"
        )

    def on_save(self, record: SaveRecord) -> None:
        """Says where."""
        stall = f", training waited {record.stall_seconds:.1f} s" if record.stall_seconds < record.seconds else ""
        self._console.print(f"{record.step:>8,} saved {record.folder} ({record.bytes / 2**20:,.0f} MiB in {record.seconds:.1f} s{stall})")

    def on_event(self, event: Event) -> None:
        """Says it."""
        self._console.print(f"{event.step:>8,} [bold]{event.kind}[/bold]: {escape(event.message)}")

    def on_message(self, text: str) -> None:
        """Prints it."""
        self._console.print(f"{'':>8} {text}")

    def on_end(self, record: RunEnd) -> None:
        """Says why."""
        self._console.print(
            f"{record.step:>8,} [bold]{record.reason}[/bold]: {format_count(record.tokens)} tokens, "
            f"{format_duration(record.seconds)} this time"
        )

    def close(self) -> None:
        """Leaves the screen in order."""
        if self._live is not None:
            self._live.stop()
            self._live = None
