"""Reads a metrics file of any length in one pass.

In: the path of metrics.jsonl. Out: `MetricsFile`: its curves, thinned; where stages, starts, checkpoints and switches are; its totals.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_patch.errors import DataError
from megatron_patch.reporting.expert_map import ExpertMap
from megatron_patch.reporting.rows import (
    EVALUATION_COLUMNS,
    STEP_COLUMNS,
    InOrder,
    LeftOut,
    experts_problem,
    problem,
    read_rows,
    step_experts,
    step_values,
)
from megatron_patch.reporting.thinning import Thinning
from megatron_patch.utils.files import optional_file, reason

MOST_POINTS = 5_000
"""Largest number of steps, and of evaluations, that a report shows; see `Thinning`."""
_MOST_MARKS = 2_000
_MOST_CORPORA = 200
_LONGEST_NAME = 300
_STAGE, _TOKEN_LOSS = 1, EVALUATION_COLUMNS.index("token_loss")
_LOSS, _GRAD_NORM = STEP_COLUMNS.index("loss"), STEP_COLUMNS.index("grad_norm")
_WIDTH = len(STEP_COLUMNS)


class Places:
    """Tokens, cost and elapsed time of each step, in 32 bytes a step."""

    def __init__(self) -> None:
        self._steps, self._tokens = array("q"), array("q")
        self._costs, self._seconds = array("d"), array("d")

    def add(self, step: int, tokens: int, cost_tokens: float, seconds: float) -> None:
        """Takes the next step."""
        self._steps.append(step)
        self._tokens.append(tokens)
        self._costs.append(cost_tokens)
        self._seconds.append(seconds)

    def locate(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Returns step, tokens, cost tokens and elapsed time of a record by its step.

        All are 0 before the first step. Of a step that is missing, the tokens and the time are the record's own, and the cost is that of
        the step before.
        """
        step = record.get("step") or 0
        index = bisect_right(self._steps, step) - 1
        known = index >= 0 and self._steps[index] == step
        return {
            "step": step,
            "tokens": self._tokens[index] if known else record.get("tokens") or 0,
            "cost_tokens": self._costs[index] if index >= 0 else 0.0,
            "seconds_so_far": record.get("seconds_so_far", self._seconds[index] if known else 0.0),
        }


@dataclass
class Marks:
    """The last of many records of one kind.

    Args:
        count: how many there were.
        last: the last of them.
    """

    count: int = 0
    last: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_MOST_MARKS))

    def add(self, record: dict[str, Any]) -> None:
        """Takes the next record."""
        self.count += 1
        self.last.append(record)

    def shown(self, name: str, notes: list[str]) -> list[dict[str, Any]]:
        """Returns the records, and adds a note if there were more."""
        if self.count > len(self.last):
            notes.append(f"shows the last {len(self.last):,} of {self.count:,} {name}")
        return list(self.last)


@dataclass
class MetricsFile:
    """What a metrics file contains.

    Args:
        left_out: rows that cannot be used.
        steps: values of `STEP_COLUMNS` and the elapsed time, without the pauses before restarts.
        evaluations: values of `EVALUATION_COLUMNS`, the elapsed time, and the token losses of `corpora`, as far as they were known.
        experts: the load of experts by block.
        corpora: name and last weight of each corpus whose held-out loss is recorded, in the order of their appearance.
        more_corpora: whether further corpora are left out.
        places: the place of each step.
        stages: index, name, patch size, step, tokens, cost tokens and seconds at the start of each stage that has begun.
        starts: records of type "start".
        saves: records of type "save".
        switches: records of type "switch".
        start: the last record of type "start", or an empty one.
        last: values of the last step: `STEP_COLUMNS`, "cost", "time", "stage"; None if there is no step.
        state: "done", "stopped" (it ended before its last step) or "unfinished" (it is running, or was killed).
    """

    left_out: LeftOut
    steps: Thinning
    evaluations: Thinning
    experts: ExpertMap = field(default_factory=ExpertMap)
    corpora: dict[str, float | None] = field(default_factory=dict)
    more_corpora: bool = False
    places: Places = field(default_factory=Places)
    stages: list[dict[str, Any]] = field(default_factory=list)
    starts: Marks = field(default_factory=Marks)
    saves: Marks = field(default_factory=Marks)
    switches: Marks = field(default_factory=Marks)
    start: dict[str, Any] = field(default_factory=dict)
    last: tuple[Any, ...] | None = None
    state: str = "unfinished"

    def add_step(self, values: tuple[Any, ...], experts: tuple[Any, ...] | None, seconds: float) -> None:
        """Takes the next step in order: its values as `step_values` and `step_experts` return them, and the elapsed time."""
        self.places.add(values[0], values[3], values[4], seconds)
        before = (self.last[0], self.last[3], self.last[4]) if self.last is not None else (0, 0, 0.0)
        self.steps.add((*values[:_WIDTH], seconds))
        if not self.stages or self.stages[-1]["index"] != values[_STAGE]:
            step, tokens, cost_tokens = before
            self.stages.append(
                {
                    "index": values[_STAGE],
                    "name": values[-1],
                    "patch_size": values[2],
                    "step": step,
                    "tokens": tokens,
                    "cost_tokens": cost_tokens,
                    "seconds": self._seconds_before,
                }
            )
        if experts is not None:
            begin, end = (*before, self._seconds_before), (values[0], values[3], values[4], seconds)
            self.experts.add(values[_STAGE], values[2], begin, end, experts)
        self.last, self._seconds_before = values, seconds

    _seconds_before: float = 0.0

    def losses_of_corpora(self, record: Mapping[str, Any]) -> tuple[float | None, ...]:
        """Returns the token loss of each corpus in an evaluation, in the order of `corpora`, to which new ones are added."""
        parts = {name[:_LONGEST_NAME]: part for name, part in (record.get("corpora") or {}).items()}
        for name, part in parts.items():
            if name in self.corpora or len(self.corpora) < _MOST_CORPORA:
                self.corpora[name] = part.get("weight")
            else:
                self.more_corpora = True
        return tuple(parts.get(name, {}).get("token_loss") for name in self.corpora) if parts else ()

    def add_other(self, record: dict[str, Any]) -> None:
        """Takes the next record of another type than "step" and "evaluation", with the elapsed time in it."""
        kind = record["type"]
        if kind == "start":
            self.starts.add(record)
            self.start, self.state = record, "unfinished"
        elif kind == "end":
            self.state = "done" if record.get("reason") == "done" else "stopped"
        elif kind == "save":
            self.saves.add(record)
        elif kind == "switch":
            self.switches.add(record)


def loss_of_corpus(row: Sequence[Any], number: int) -> float | None:
    """Returns the token loss of a corpus, by its number in `MetricsFile.corpora`, in a row of `MetricsFile.evaluations`, or None."""
    losses: tuple[float | None, ...] = row[-1]
    return losses[number] if number < len(losses) else None


def read_metrics_file(path: Path, most_points: int = MOST_POINTS) -> MetricsFile:
    """Reads a metrics file; rows that cannot be used are left out.

    Args:
        path: the file.
        most_points: largest number of steps, and of evaluations, to keep.

    Raises:
        DataError: the file does not exist or cannot be read.
    """
    left_out = LeftOut(path.name)
    steps = Thinning(most_points, _STAGE, _LOSS, _GRAD_NORM)
    result = MetricsFile(left_out, steps, Thinning(most_points, _STAGE, _TOKEN_LOSS, _TOKEN_LOSS))
    try:
        if not optional_file(path):
            raise DataError(
                f"{path} does not exist", "the folder of a run, which contains metrics.jsonl", "give the folder that --save named"
            )
        _read(path, result, left_out)
    except OSError as error:
        raise DataError(f"cannot read {path}: {reason(error)}", "a readable file", "check the path") from error
    return result


def _read(path: Path, result: MetricsFile, left_out: LeftOut) -> None:
    steps, evaluations = InOrder(left_out, strict=True), InOrder(left_out, strict=False)
    elapsed, before = 0.0, None
    for line, record in read_rows(path, left_out):
        kind = record.get("type")
        values = step_values(record) if kind == "step" else None
        experts = step_experts(record) if values is not None else None
        reason = problem(record) if values is None else experts_problem(record) if experts is not None else None
        if reason is not None:
            left_out.add(line, reason)
            continue
        now = record.get("time")
        if now is not None:
            # The pause before a restart is not training time.
            if before is not None and kind != "start" and now > before:
                elapsed += now - before
            before = now
        seconds = round(elapsed, 3)
        if values is not None:
            if (ready := steps.push(line, (values[0], values[1], values[3], values[4]), (values, experts, seconds))) is not None:
                result.add_step(*ready)
        elif kind == "evaluation":
            row = (*(record.get(name) for name in EVALUATION_COLUMNS), seconds, result.losses_of_corpora(record))
            if (ready := evaluations.push(line, (row[0], row[1], row[3], row[4]), row)) is not None:
                result.evaluations.add(ready)
        else:
            result.add_other({**record, "seconds_so_far": seconds})
    if (ready := steps.rest()) is not None:
        result.add_step(*ready)
    if (ready := evaluations.rest()) is not None:
        result.evaluations.add(ready)
