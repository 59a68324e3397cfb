"""What the benchmarks share: peers timed in turn, peak memory, ceilings of the machine, tables, and results as JSON.

Peers take turns within each round, so that a busy neighbour slows all of them; the figure is the median of the rounds. On a GPU every run
is timed by events, between synchronisations, after a write that empties its cache and a wait in which the host launches everything: what
is measured is the GPU's work, as in a training step whose host runs ahead. Only work that waits for the GPU itself is timed with its gaps.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

Work = Callable[[], object]
_FLUSH_BYTES = 256 << 20
_CALIBRATION_CYCLES = 2_000_000
# How long the GPU waits for the host: this many times what launching took, within these seconds.
_AHEAD, _LEAST_AHEAD, _MOST_AHEAD = 1.5, 1e-3, 1e-2


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    described = {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        described |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    else:
        described["threads"] = torch.get_num_threads()
    return described


class Timer:
    """Times work on a device.

    Args:
        device: where it runs.
        rounds: how often each peer runs.
        seconds: no further round begins after so many seconds of all peers together; None: there is no such limit.
        fewest: rounds that run whatever they take.
    """

    def __init__(self, device: torch.device, rounds: int, seconds: float | None = None, fewest: int = 5) -> None:
        self.device, self.rounds, self.seconds, self.fewest = device, rounds, seconds, fewest
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            self._flush = torch.empty(_FLUSH_BYTES // 4, device=device)
            torch.cuda._sleep(_CALIBRATION_CYCLES)
            self._cycles_a_second = _CALIBRATION_CYCLES / self._between_events(lambda: torch.cuda._sleep(_CALIBRATION_CYCLES))

    def _between_events(self, work: Work) -> float:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        work()
        last.record()
        torch.cuda.synchronize(self.device)
        return first.elapsed_time(last) / 1000

    def _ahead_of(self, work: Work) -> float:
        """Seconds that the GPU waits before the work: enough for the host to launch all of it."""
        if self._flush is None:
            return 0.0
        torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        work()
        host = time.perf_counter() - began
        torch.cuda.synchronize(self.device)
        return min(max(_AHEAD * host, _LEAST_AHEAD), _MOST_AHEAD)

    def _once(self, work: Work, ahead: float) -> float:
        if self._flush is None:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        torch.cuda.synchronize(self.device)
        self._flush.zero_()
        torch.cuda._sleep(int(ahead * self._cycles_a_second))
        return self._between_events(work)

    def medians(self, peers: Mapping[str, Work]) -> dict[str, float]:
        """Seconds of each peer: the median over rounds in which they take turns."""
        ahead = {}
        for name, work in peers.items():
            for _ in range(2):
                work()
            ahead[name] = self._ahead_of(work)
        times: dict[str, list[float]] = {name: [] for name in peers}
        began = time.perf_counter()
        with _no_collection():
            for done in range(self.rounds):
                if self.seconds is not None and done >= self.fewest and time.perf_counter() - began > self.seconds:
                    break
                for name, work in peers.items():
                    times[name].append(self._once(work, ahead[name]))
        return {name: statistics.median(values) for name, values in times.items()}

    def peak_bytes(self, work: Work) -> int:
        """The most memory that work holds above what was held before."""
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            work()
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - before
        with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
        held = peak = 0
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        return peak


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's garbage collection, whose pauses are no part of the work."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler's own library prints at every start."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def ceilings(timer: Timer, dtype: torch.dtype, tiny: bool = False) -> dict[str, float]:
    """The machine's own limits, measured: copying (GB/s, read and written) and the product of large matrices (TFLOP/s).

    Args:
        timer: of the device.
        dtype: of the product.
        tiny: of small tensors, which show that it runs and no more.
    """
    cuda = timer.device.type == "cuda"
    source = torch.empty(1 << 18 if tiny else (1 << 30) // 4 if cuda else (1 << 28) // 4, device=timer.device)
    target = torch.empty_like(source)
    source.zero_()
    size = 64 if tiny else 8192 if cuda else 3072
    first = torch.randn(size, size, device=timer.device, dtype=dtype)
    second = torch.randn(size, size, device=timer.device, dtype=dtype)
    times = timer.medians({"copy": lambda: target.copy_(source), "product": lambda: first @ second})
    return {
        "copy_gb_per_second": 2 * source.numel() * 4 / times["copy"] / 1e9,
        "product_tflop_per_second": 2 * size**3 / times["product"] / 1e12,
    }


def in_place_ceiling(timer: Timer, dtype: torch.dtype, numel: int) -> dict[str, float]:
    """GB/s, read and written, of adding 1 to so many numbers in place: what a loss that overwrites its logits can reach."""
    logits = torch.zeros(numel, device=timer.device, dtype=dtype)
    seconds = timer.medians({"in place": lambda: logits.add_(1)})["in place"]
    return {"in_place_gb_per_second": 2 * logits.numel() * logits.element_size() / seconds / 1e9}


def attention_ceiling(timer: Timer, dtype: torch.dtype, samples: int, heads: int, positions: int, size: int) -> float:
    """TFLOP/s of torch's causal attention, forward and backward: 7 products (arXiv 2205.14135) over half of the positions' pairs.

    Args:
        timer: of the device.
        dtype: of queries, keys and values.
        samples: B.
        heads: of the queries.
        positions: T.
        size: of a head.
    """
    shape = (samples, heads, positions, size)
    queries, keys, values = (torch.randn(shape, device=timer.device, dtype=dtype, requires_grad=True) for _ in range(3))

    def work() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        torch.autograd.grad(out, (queries, keys, values), out.detach())

    return 7 * samples * heads * positions**2 * size / timer.medians({"attention": work})["attention"] / 1e12


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on the terminal."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=150).print(table)


def not_finite(value: Any, name: str = "") -> list[str]:
    """Names of the numbers in a figure that are NaN or infinite, nested ones with a dot."""
    if isinstance(value, float):
        return [] if math.isfinite(value) else [name]
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return []
    return [found for key, part in items for found in not_finite(part, f"{name}.{key}".strip("."))]


def record(kind: str, **figure: Any) -> dict[str, Any]:
    """Appends one figure, as one JSON line, to the file that FIGURES names, and writes it out at once.

    A process that is killed a moment later has lost nothing. Without FIGURES nothing is written.

    Args:
        kind: what the figure is of, such as "kernel" or "training".
        figure: its fields. Numbers that are NaN or infinite are written as null and named in `not_finite`, which fails the step
            (benchmarks/on_gpu.py).

    Returns:
        The figure as it was written.
    """
    bad = not_finite(figure)
    line: dict[str, Any] = {"kind": kind, "step": os.environ.get("STEP"), **_finite(figure)}
    if bad:
        line["not_finite"] = bad
        print(f"not finite in a figure of {kind}: {', '.join(bad)}", file=sys.stderr, flush=True)
    if path := os.environ.get("FIGURES"):
        # One write of one line: processes beside each other append to the same file.
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return line


def _finite(value: Any) -> Any:
    """The value as JSON can say it: null for a number that is NaN or infinite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value if isinstance(value, str | int | bool | None) else str(value)


def write_results(
    name: str, device: torch.device, results: Mapping[str, Any], tell: bool = True, described: Mapping[str, Any] | None = None
) -> Path:
    """Writes NAME-DEVICE-DATE.json, with the command and the machine, to the folder that RESULTS names, or to benchmarks/results.

    Args:
        name: of the benchmark.
        device: the results are of.
        results: what is written.
        tell: prints where.
        described: the machine, by a process that had the device; None: `machine` is asked.
    """
    today = date.today().isoformat()
    folder = Path(os.environ.get("RESULTS") or Path(__file__).parent / "results")
    output = folder / f"{name}-{device.type}-{today}.json"
    folder.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    described = machine(device) if described is None else described
    # Renamed into place: a process that is killed leaves the earlier file or this one.
    draft = output.with_suffix(".part")
    draft.write_text(json.dumps({"date": today, "command": command, "machine": described, **results}, indent=1) + "\n")
    draft.replace(output)
    if tell:
        print(f"wrote {os.path.relpath(output)}")
    return output
