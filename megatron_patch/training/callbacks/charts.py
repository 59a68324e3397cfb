"""Sends the numbers of a run to a chart service (TensorBoard, Weights & Biases, MLflow, Prometheus), under the same names everywhere.

In: records. Out: named values, delivered by a thread of the service (`Delivery`), for which training never waits.
"""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import Any

from megatron_patch.training.callbacks.base import (
    STEP_METRICS,
    Callback,
    EvaluationRecord,
    Event,
    RunEnd,
    RunStart,
    SaveRecord,
    StepRecord,
)
from megatron_patch.training.callbacks.delivery import Delivery, Service
from megatron_patch.training.faults.exit_protocol import print_stderr
from megatron_patch.utils.units import format_duration

_STEP_VALUES = (*STEP_METRICS, "cost", "cost_tokens", "patch_size")
_MOST_BLOCKS = 200
"""The most blocks that have a chart of their own."""
PATIENCE = 20.0
"""Seconds that a service is given to answer, each time that it is opened or closed; it delays no step."""
_LONGEST_END = 1.5 * PATIENCE  # seconds that the end of the run waits for a service


def named_values(record: StepRecord | EvaluationRecord) -> dict[str, float]:
    """Returns the numbers of a record by the names that all services show.

    These are the field names with the prefix "train/" or "eval/"; a training loss is named `token_loss` or `patch_loss`, so that no chart
    joins the two. The loss of one corpus of several is `eval/token_loss/NAME`. In a model with experts, `train/expert_load` is the load of
    the worst block and `train/expert_load/block_N` that of block N, `train/dead_experts` the number of dead experts in all blocks, and
    `train/router_entropy` the lowest of all blocks.
    """
    if isinstance(record, EvaluationRecord):
        corpora = record.corpora if len(record.corpora) > 1 else {}
        values = {"eval/token_loss": record.token_loss}
        values |= {f"eval/token_loss/{name}": part.token_loss for name, part in corpora.items()}
        if record.patch_size > 1:
            values["eval/patch_loss"] = record.patch_loss
            values |= {f"eval/patch_loss/{name}": part.patch_loss for name, part in corpora.items()}
        return values
    pairs = ((name, getattr(record, name)) for name in _STEP_VALUES)
    loss = "train/token_loss" if record.patch_size == 1 else "train/patch_loss"
    return {loss: record.loss, **{f"train/{name}": float(value) for name, value in pairs if value is not None}, **_of_experts(record)}


def _of_experts(record: StepRecord) -> dict[str, float]:
    if (worst := record.worst_block) is None:
        return {}
    values = {
        "train/expert_load": worst[1],
        "train/dead_experts": float(sum(record.dead_experts)),
        "train/router_entropy": min(filter(math.isfinite, record.router_entropy), default=math.nan),
    }
    blocks = list(zip(record.expert_blocks, record.expert_load, strict=True))[:_MOST_BLOCKS]
    return values | {f"train/expert_load/block_{block}": load for block, load in blocks}


class Charts(Callback):
    """Sends the records of a run to a service.

    Args:
        service: the service.
        kept: the metrics file of the run, or None.
        longest_end: the most seconds that the end of the run waits for the service.
    """

    def __init__(self, service: Service, kept: Path | None, longest_end: float = _LONGEST_END) -> None:
        self._service, self._delivery, self._longest_end = service, Delivery(service, kept), longest_end
        self._changed = threading.Condition()
        self._ending = False
        self._end: RunEnd | None = None
        self._deadline = 0.0
        self._thread: threading.Thread | None = None

    def on_start(self, record: RunStart) -> None:
        """Starts the thread, which opens the service."""
        self._delivery.begin(record)
        self._send(record)
        # A service that does not answer must not keep the process alive.
        self._thread = threading.Thread(target=self._work, daemon=True, name=self._service.name)
        self._thread.start()

    def on_step(self, record: StepRecord) -> None:
        """Sends a step."""
        self._send(record)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """Sends an evaluation."""
        self._send(record)

    def on_save(self, record: SaveRecord) -> None:
        """Sends a save, if the service shows saves."""
        self._send(record)

    def on_event(self, event: Event) -> None:
        """Sends an event, if the service shows events."""
        self._send(event)

    def on_end(self, record: RunEnd) -> None:
        """Begins to close the service, at the same time as the others."""
        self._send(record)
        self._begin_end(record)

    def close(self) -> None:
        """Waits for the service to take the last values, but not longer than `longest_end`."""
        if self._thread is None:
            return
        self._begin_end(None)
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        if self._thread.is_alive():
            print_stderr(
                f"{self._service.name} did not take the last values within {format_duration(self._longest_end)}; the run ends without it"
            )

    def _send(self, record: Any) -> None:
        if isinstance(record, self._service.records):
            self._delivery.put(record)
            with self._changed:
                self._changed.notify()

    def _begin_end(self, end: RunEnd | None) -> None:
        with self._changed:
            if not self._ending:
                self._ending, self._end, self._deadline = True, end, time.monotonic() + self._longest_end
            self._changed.notify()

    def _work(self) -> None:
        while not self._wait():
            self._delivery.attempt()
        self._delivery.finish(self._end)

    def _wait(self) -> bool:
        """Waits until there is something to do, and returns whether the run ends."""
        with self._changed:
            while not self._ending and (seconds := self._delivery.due()) != 0.0:
                self._changed.wait(seconds)
            return self._ending
