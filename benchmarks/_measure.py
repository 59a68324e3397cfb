"""Measurements shared by the benchmarks: times of peers, peak memory, ceilings of the machine, tables, and results as JSON.

All peers run once per round, so that other load on the machine slows all of them; a result is the median over rounds. On a GPU each run is
timed with events between synchronizations, after a write that flushes the cache and a delay in which the host launches all kernels. The
result is the time of the GPU's work, as in a training step whose host runs ahead. Gaps count only if the work itself waits for the GPU.
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
# The GPU waits for the host this many times the launch time, between these limits in seconds.
_DELAY_FACTOR, _MIN_DELAY, _MAX_DELAY = 1.5, 1e-3, 1e-2


def processor() -> str:
    """Returns the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine(device: torch.device) -> dict[str, Any]:
    """Returns processor, GPU and software versions, which results record."""
    info = {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        info |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    else:
        info["threads"] = torch.get_num_threads()
    return info


class Timer:
    """Times work on a device.

    Args:
        device: device of the work.
        rounds: largest number of timed runs of each peer.
        seconds: no further round starts after this time for all peers together; None sets no limit.
        fewest: smallest number of rounds, which `seconds` does not reduce.
    """

    def __init__(self, device: torch.device, rounds: int, seconds: float | None = None, fewest: int = 5) -> None:
        self.device, self.rounds, self.seconds, self.fewest = device, rounds, seconds, fewest
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            self._flush = torch.empty(_FLUSH_BYTES // 4, device=device)
            torch.cuda._sleep(_CALIBRATION_CYCLES)
            self._cycles_per_second = _CALIBRATION_CYCLES / self._between_events(lambda: torch.cuda._sleep(_CALIBRATION_CYCLES))

    def _between_events(self, work: Work) -> float:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        work()
        last.record()
        torch.cuda.synchronize(self.device)
        return first.elapsed_time(last) / 1000

    def _launch_delay(self, work: Work) -> float:
        """Returns the seconds that the GPU must wait so that the host can launch all of the work."""
        if self._flush is None:
            return 0.0
        torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        work()
        host = time.perf_counter() - began
        torch.cuda.synchronize(self.device)
        return min(max(_DELAY_FACTOR * host, _MIN_DELAY), _MAX_DELAY)

    def _time(self, work: Work, delay: float) -> float:
        if self._flush is None:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        torch.cuda.synchronize(self.device)
        self._flush.zero_()
        torch.cuda._sleep(int(delay * self._cycles_per_second))
        return self._between_events(work)

    def medians(self, peers: Mapping[str, Work]) -> dict[str, float]:
        """Returns the median seconds of each peer over rounds in which all of them run."""
        delays = {}
        for name, work in peers.items():
            for _ in range(2):
                work()
            delays[name] = self._launch_delay(work)
        times: dict[str, list[float]] = {name: [] for name in peers}
        began = time.perf_counter()
        with _no_collection():
            for done in range(self.rounds):
                if self.seconds is not None and done >= self.fewest and time.perf_counter() - began > self.seconds:
                    break
                for name, work in peers.items():
                    times[name].append(self._time(work, delays[name]))
        return {name: statistics.median(values) for name, values in times.items()}

    def peak_bytes(self, work: Work) -> int:
        """Returns the peak of the memory that the work allocates in addition to what was allocated before."""
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
    """Disables Python's garbage collection, whose pauses are not part of the work."""
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
    """Suppresses the messages that the profiler's library prints at every start."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def ceilings(timer: Timer, dtype: torch.dtype, tiny: bool = False) -> dict[str, float]:
    """Measures the limits of the machine: copying (GB/s read plus written) and the product of large matrices (TFLOP/s).

    Args:
        timer: timer of the device.
        dtype: dtype of the matrices.
        tiny: use small tensors, which only test that the measurement runs.
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
    """Measures adding 1 to `numel` numbers in place (GB/s read plus written), the limit of a loss that overwrites its logits."""
    logits = torch.zeros(numel, device=timer.device, dtype=dtype)
    seconds = timer.medians({"in place": lambda: logits.add_(1)})["in place"]
    return {"in_place_gb_per_second": 2 * logits.numel() * logits.element_size() / seconds / 1e9}


def attention_ceiling(timer: Timer, dtype: torch.dtype, samples: int, heads: int, positions: int, size: int) -> float:
    """Measures torch's causal attention, forward and backward, in TFLOP/s.

    FLOPs are those of 7 products (arXiv 2205.14135) over half of the pairs of positions.

    Args:
        timer: timer of the device.
        dtype: dtype of queries, keys and values.
        samples: B.
        heads: number of heads.
        positions: T.
        size: size of a head.
    """
    shape = (samples, heads, positions, size)
    queries, keys, values = (torch.randn(shape, device=timer.device, dtype=dtype, requires_grad=True) for _ in range(3))

    def work() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        torch.autograd.grad(out, (queries, keys, values), out.detach())

    return 7 * samples * heads * positions**2 * size / timer.medians({"attention": work})["attention"] / 1e12


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table on the terminal; the first column is left-aligned."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=150, markup=False).print(table)


def not_finite(value: Any, name: str = "") -> list[str]:
    """Returns the names of the numbers in a figure that are NaN or infinite; names of nested numbers contain dots."""
    if isinstance(value, float):
        return [] if math.isfinite(value) else [name]
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return []
    return [bad for key, part in items for bad in not_finite(part, f"{name}.{key}".strip("."))]


def record(kind: str, **figure: Any) -> dict[str, Any]:
    """Appends one figure as a line of JSON to the file named by the environment variable FIGURES.

    The line is written at once, so a process that is killed afterwards loses nothing. Without FIGURES nothing is written.

    Args:
        kind: kind of the figure, such as "kernel" or "training".
        figure: its fields. Numbers that are NaN or infinite are written as null and named in `not_finite`, which fails the step
            (benchmarks/on_gpu.py).

    Returns:
        The figure as written.
    """
    bad = not_finite(figure)
    line: dict[str, Any] = {"kind": kind, "step": os.environ.get("STEP"), **_finite(figure)}
    if bad:
        line["not_finite"] = bad
        print(f"NaN or infinite in a figure of kind {kind}: {', '.join(bad)}", file=sys.stderr, flush=True)
    if path := os.environ.get("FIGURES"):
        # One write per line, because several processes append to the same file.
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return line


def _finite(value: Any) -> Any:
    """Returns the value with None in place of every number that JSON cannot represent."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value if isinstance(value, str | int | bool | None) else str(value)


def write_results(
    name: str, device: torch.device, results: Mapping[str, Any], verbose: bool = True, info: Mapping[str, Any] | None = None
) -> Path:
    """Writes results with command and machine to NAME-DEVICE-DATE.json.

    The folder is that of the environment variable RESULTS, else benchmarks/results.

    Args:
        name: name of the benchmark.
        device: device of the measurements.
        results: results to write.
        verbose: whether to print the path.
        info: result of `machine` from a process that had the device; None calls `machine` here.

    Returns:
        The path of the file.
    """
    today = date.today().isoformat()
    folder = Path(os.environ.get("RESULTS") or Path(__file__).parent / "results")
    output = folder / f"{name}-{device.type}-{today}.json"
    folder.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    info = machine(device) if info is None else info
    # Renamed when complete, so a killed process leaves the earlier file or the new one.
    draft = output.with_suffix(".part")
    draft.write_text(json.dumps({"date": today, "command": command, "machine": info, **results}, indent=1) + "\n")
    draft.replace(output)
    if verbose:
        print(f"wrote {os.path.relpath(output)}")
    return output
