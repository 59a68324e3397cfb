"""The run on the screen: a live bar with the switches marked where there is a terminal, plain aligned lines elsewhere."""

from __future__ import annotations

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from megatron_patch.console import make_console
from megatron_patch.training.callbacks.base import Callback, EvaluationRecord, Event, RunEnd, RunStart, SaveRecord, StepRecord, SwitchRecord
from megatron_patch.units import format_count, format_duration


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
        self._progress: Progress | None = None
        self._lines = 0

    def on_start(self, record: RunStart) -> None:
        """Starts the bar."""
        self._start = record
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=28), TextColumn("{task.fields[text]}"), console=self._console
            )
            self._progress.add_task("", total=record.total_tokens, completed=record.tokens, text="")
            self._progress.start()

    def _eta(self, record: StepRecord) -> str:
        """Time to the next switch and to the end, at the present speed (a later stage may be slower or faster in tokens)."""
        assert self._start is not None
        speed = max(record.tokens_per_second, 1e-9)
        switches = [tokens for tokens, _ in self._start.switches if tokens > record.tokens]
        end = format_duration((self._start.total_tokens - record.tokens) / speed)
        return f"switch in {format_duration((switches[0] - record.tokens) / speed)}" if switches else f"end in {end}"

    def on_step(self, record: StepRecord) -> None:
        """Moves the bar; prints a line every so many steps."""
        assert self._start is not None
        mfu = "" if record.mfu is None else f"  MFU {record.mfu:.1%}"
        if self._progress is not None:
            text = (
                f"{format_count(record.tokens)}/{format_count(self._start.total_tokens)}  loss {record.loss:.4f}  "
                f"{format_count(record.tokens_per_second)} tok/s{mfu}  {record.memory_gib:.1f} GiB  {self._eta(record)}"
            )
            task = self._progress.task_ids[0]
            self._progress.update(task, completed=record.tokens, text=text, description=f"{record.stage} (K={record.patch_size})")
        if record.step % self._interval and record.step != self._start.total_steps:
            return
        if self._lines % 40 == 0:
            self._console.print(
                f"{'step':>8} {'stage':<10} {'K':>2} {'tokens':>8} {'loss':>8} {'lr':>9} {'grad':>7} {'tok/s':>7} {'pos/s':>7} "
                f"{'TFLOP/s':>7} {'GiB':>5} {'data':>5}  to go"
            )
        self._lines += 1
        waited = record.data_seconds / max(record.step_seconds, 1e-9)
        loss = "skipped" if record.skipped else f"{record.loss:8.4f}"
        self._console.print(
            f"{record.step:>8,} {record.stage:<10.10} {record.patch_size:>2} {format_count(record.tokens):>8} {loss:>8} {record.lr:>9.3g} "
            f"{record.grad_norm:>7.3f} {format_count(record.tokens_per_second):>7} {format_count(record.positions_per_second):>7} "
            f"{record.tflops:>7.3g} {record.memory_gib:>5.1f} {waited:>5.1%}  {self._eta(record)}{mfu}"
        )

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Both losses, each by its name."""
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
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
