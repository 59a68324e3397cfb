"""Shows the newest numbers of a run to Prometheus: in a file for node_exporter's textfile collector, or at a port.

In: records. Out: Prometheus' text format. A number has the name that all services show, with "megatron_patch_" before it and "_" for "/";
the label `run` is the run, `stage` the stage, `corpus` one corpus of several, and `block` one block with experts. What a resumed run may
repeat is a gauge; counters count since the start of this process.
"""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_patch.requirements import missing_package
from megatron_patch.training.callbacks.base import EvaluationRecord, Event, RunEnd, RunStart, SaveRecord, StepRecord
from megatron_patch.training.callbacks.charts import named_values
from megatron_patch.training.callbacks.delivery import Timed
from megatron_patch.utils.files import open_new

_PREFIX = "megatron_patch_"
_RECORDS = (RunStart, StepRecord, EvaluationRecord, SaveRecord, Event)


class Numbers:
    """The newest numbers of a run, a collector of prometheus_client.

    Args:
        run: name of the run.

    Raises:
        ConfigError: the package prometheus-client is not installed.
    """

    def __init__(self, run: str) -> None:
        try:
            from prometheus_client import core, exposition
        except ImportError as error:
            raise missing_package("prometheus_client", "Prometheus") from error
        self._core: Any = core
        self._text: Any = exposition.generate_latest
        self._run = run
        self._lock = threading.Lock()
        self._newest: dict[type, Timed] = {}
        self._steps: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._events: Counter[str] = Counter()
        self._read = self._evaluations = self._saves = 0
        self._last: Timed | None = None
        self._running = True

    def add(self, records: Sequence[Timed]) -> None:
        """Takes records, in order; those that it has taken before are left out."""
        again = next((index + 1 for index, timed in enumerate(records) if timed is self._last), 0)
        with self._lock:
            for timed in records[again:]:
                self._add(timed.record)
                self._newest[type(timed.record)] = self._last = timed

    def end(self) -> None:
        """Takes the end of the run."""
        self._running = False

    def _add(self, record: Any) -> None:
        if isinstance(record, RunStart):
            self._read = record.tokens
        elif isinstance(record, StepRecord):
            self._steps[record.stage] += 1
            self._skipped[record.stage] += record.skipped
            self._tokens[record.stage] += record.tokens - self._read
            self._read = record.tokens
        elif isinstance(record, EvaluationRecord):
            self._evaluations += 1
        elif isinstance(record, SaveRecord):
            self._saves += 1
        elif isinstance(record, Event):
            self._events[record.kind] += 1

    def collect(self) -> Iterator[Any]:
        """Yields the metrics in the form of prometheus_client."""
        with self._lock:
            yield from list(self._metrics())

    def _metrics(self) -> Iterator[Any]:
        start, step = self._newest.get(RunStart), self._newest.get(StepRecord)
        yield self._gauge("running", "1 while the run trains, 0 after its end", [({}, float(self._running))])
        if start is not None:
            yield self._gauge("total_steps", "optimizer steps of the full plan", [({}, start.record.total_steps)])
            yield self._gauge("total_tokens", "tokens of the full plan", [({}, start.record.total_tokens)])
        for timed in (step, self._newest.get(EvaluationRecord)):
            if timed is not None:
                yield from self._named_values(timed.record)
        if step is not None:
            stage = {"stage": step.record.stage}
            yield self._gauge("step", "number of the newest step in the run", [(stage, step.record.step)])
            yield self._gauge("tokens", "tokens read so far in the run", [(stage, step.record.tokens)])
        for name, kind, what in (
            ("last_step", StepRecord, "end of the newest step"),
            ("last_evaluation", EvaluationRecord, "end of the newest evaluation"),
            ("last_save", SaveRecord, "time at which the newest checkpoint was committed"),
        ):
            if (timed := self._newest.get(kind)) is not None:
                yield self._gauge(f"{name}_timestamp_seconds", f"{what}, seconds since 1970", [({}, timed.time)])
        yield self._counter("steps", "optimizer steps of each stage since this start", self._steps, "stage")
        yield self._counter("skipped_steps", "of these, steps that left the weights unchanged", self._skipped, "stage")
        yield self._counter("read_tokens", "tokens read in each stage since this start", self._tokens, "stage")
        yield self._counter("events", "events of each kind since this start", self._events, "kind")
        yield self._counter("evaluations", "evaluations since this start", {"": self._evaluations})
        yield self._counter("saves", "checkpoints committed since this start", {"": self._saves})

    def _named_values(self, record: StepRecord | EvaluationRecord) -> Iterator[Any]:
        families: dict[str, list[tuple[dict[str, str], float]]] = {}
        for name, value in named_values(record).items():
            group, field, *part = name.split("/", 2)
            labels = {"stage": record.stage}
            if part:
                labels |= {"corpus": part[0]} if group == "eval" else {"block": part[0].removeprefix("block_")}
            families.setdefault(f"{group}_{field}", []).append((labels, value))
        for name, samples in families.items():
            yield self._gauge(name, _meaning(type(record), name.partition("_")[2]), samples)

    def _gauge(self, name: str, meaning: str, samples: Sequence[tuple[dict[str, str], float]]) -> Any:
        family = self._core.GaugeMetricFamily(_PREFIX + name, meaning)
        for labels, value in samples:
            family.add_sample(_PREFIX + name, {"run": self._run, **labels}, value)
        return family

    def _counter(self, name: str, meaning: str, counts: dict[str, int] | Counter[str], label: str = "") -> Any:
        family = self._core.CounterMetricFamily(_PREFIX + name, meaning)
        for key, count in counts.items():
            family.add_sample(f"{_PREFIX}{name}_total", {"run": self._run} | ({label: key} if label else {}), count)
        return family

    def text(self) -> bytes:
        """Returns the numbers in Prometheus' text format."""
        result: bytes = self._text(self)
        return result


_OF_EXPERTS = {
    "expert_load": "choices of a block's most used expert over the mean of its experts; without a label block, of the worst block",
    "dead_experts": "experts, in all blocks, that no position of the step chose",
    "router_entropy": "lowest mean entropy of the scores of a block's router, in nats",
}


def _meaning(kind: type, field: str) -> str:
    """Returns what a field means, from the docstring of its record."""
    if field in _OF_EXPERTS:
        return _OF_EXPERTS[field]
    name = "loss" if kind is StepRecord and field in ("token_loss", "patch_loss") else field
    found = re.search(rf"^ +{name}: (.+)$", kind.__doc__ or "", re.MULTILINE)
    return found[1].rstrip(".") if found is not None else name


class PrometheusFile:
    """A `Service` that keeps a file for node_exporter's textfile collector, whose content is replaced as a whole.

    Args:
        path: path of the file; the collector reads names that end in .prom.
        run: name of the run.
    """

    records: tuple[type, ...] = _RECORDS

    def __init__(self, path: Path, run: str) -> None:
        self.name = f"--prometheus-file {path}"
        self._path, self._numbers = path, Numbers(run)

    def open(self, start: RunStart | None) -> None:
        """Creates the folder."""
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, records: Sequence[Timed]) -> None:
        """Replaces the file."""
        self._numbers.add(records)
        self._write()

    def _write(self) -> None:
        # No name that the collector reads, and one that no other run uses.
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.partial")
        try:
            with open_new(temporary) as file:
                file.write(self._numbers.text())
            os.replace(temporary, self._path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def abandon(self) -> None:
        """Does nothing: no file is open."""

    def close(self, end: RunEnd | None) -> None:
        """Replaces the file by one that says that the run has ended."""
        self._numbers.end()
        self._write()


class PrometheusPort:
    """A `Service` that answers Prometheus at a port.

    Args:
        port: the port.
        address: address to listen at.
        run: name of the run.
    """

    records: tuple[type, ...] = _RECORDS

    def __init__(self, port: int, address: str, run: str) -> None:
        self.name = f"--prometheus-port {port}"
        self._numbers = Numbers(run)
        self._port, self._address = port, address
        self._server: Any = None

    def open(self, start: RunStart | None) -> None:
        """Starts to listen."""
        from prometheus_client import exposition

        self._server, _ = exposition.start_http_server(self._port, self._address, self._numbers)

    def add(self, records: Sequence[Timed]) -> None:
        """Takes the numbers that the next request gets."""
        self._numbers.add(records)

    def abandon(self) -> None:
        """Does nothing: only a port that could not be opened fails."""

    def close(self, end: RunEnd | None) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()
