"""What the benchmarks share: peers timed in turn, peak memory, ceilings of the machine, tables, and results as JSON.

Peers take turns within each round, so that a busy neighbour slows all of them; the figure is the median of the rounds. On a GPU every run
is timed by events behind a write that empties its cache and a wait long enough for the host to have launched everything: what is measured
is the GPU's work, as in a training step whose host runs ahead.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

Work = Callable[[], object]
_FLUSH_BYTES = 256 << 20
# About a millisecond of a GPU that does nothing.
_AHEAD_CYCLES = 2_000_000


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
    """

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds = device, rounds
        self._flush = torch.empty(_FLUSH_BYTES // 4, device=device) if device.type == "cuda" else None

    def _once(self, work: Work) -> float:
        if self._flush is None:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        self._flush.zero_()
        torch.cuda._sleep(_AHEAD_CYCLES)
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        work()
        last.record()
        torch.cuda.synchronize(self.device)
        return first.elapsed_time(last) / 1000

    def medians(self, peers: Mapping[str, Work]) -> dict[str, float]:
        """Seconds of each peer: the median over rounds in which they take turns."""
        for work in peers.values():
            for _ in range(2):
                work()
        times: dict[str, list[float]] = {name: [] for name in peers}
        for _ in range(self.rounds):
            for name, work in peers.items():
                times[name].append(self._once(work))
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


def ceilings(timer: Timer, dtype: torch.dtype) -> dict[str, float]:
    """The machine's own limits, measured: copying (GB/s, read and written) and the product of large matrices (TFLOP/s)."""
    cuda = timer.device.type == "cuda"
    source = torch.empty((1 << 30) // 4 if cuda else (1 << 28) // 4, device=timer.device)
    target = torch.empty_like(source)
    source.zero_()
    size = 8192 if cuda else 3072
    first = torch.randn(size, size, device=timer.device, dtype=dtype)
    second = torch.randn(size, size, device=timer.device, dtype=dtype)
    times = timer.medians({"copy": lambda: target.copy_(source), "product": lambda: first @ second})
    return {
        "copy_gb_per_second": 2 * source.numel() * 4 / times["copy"] / 1e9,
        "product_tflop_per_second": 2 * size**3 / times["product"] / 1e12,
    }


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


def write_results(name: str, device: torch.device, results: Mapping[str, Any], tell: bool = True) -> Path:
    """Writes benchmarks/results/NAME-DEVICE-DATE.json, with the command and the machine; tells where."""
    today = date.today().isoformat()
    output = Path(__file__).parent / "results" / f"{name}-{device.type}-{today}.json"
    output.parent.mkdir(exist_ok=True)
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    output.write_text(json.dumps({"date": today, "command": command, "machine": machine(device), **results}, indent=1) + "\n")
    if tell:
        print(f"wrote {os.path.relpath(output)}")
    return output
