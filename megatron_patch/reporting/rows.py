"""Reads metrics.jsonl and events.jsonl row by row, for reports and plots of runs of any length.

In: a file of a run, which may be damaged. Out: records whose fields have their types and ranges, and a note for each row that does not.

A row that cannot be used is left out and named by its line; all other rows are kept. A step whose number, stage, tokens or cost goes back
is such a row. If instead the row before it jumped ahead, which is seen when the next row continues below the jump, that one is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter, lt
from pathlib import Path
from typing import Any

import orjson

from megatron_patch.training.callbacks.base import STEP_METRICS
from megatron_patch.utils.files import LONGEST_LINE, bounded_lines, reason
from megatron_patch.utils.units import plural

STEP_COLUMNS = ("step", "stage_index", "patch_size", "tokens", "cost_tokens", "loss", *STEP_METRICS)
EVALUATION_COLUMNS = ("step", "stage_index", "patch_size", "tokens", "cost_tokens", "token_loss", "patch_loss", "eval_tokens")

EXPERT_COLUMNS = ("expert_blocks", "expert_load", "dead_experts", "router_entropy")
"""Fields of a step that have one value for each block with experts."""

_MOST_NOTES = 10
_MOST_BLOCKS = 1_024
_LARGEST_NUMBER = 1e39  # above every number in float32
_WORDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "missing"}


@dataclass(frozen=True)
class _Kind:
    """What a field may contain.

    Args:
        types: types of the value; the type of None if the field may be missing.
        low: smallest number.
        high: the numbers are below this one.
    """

    types: frozenset[type]
    low: float = 0
    high: float = 1 << 62

    def problem(self, name: str, value: Any) -> str | None:
        """Returns what is wrong with a value, as a clause, or None."""
        if type(value) not in self.types:
            return f"{name} is {_WORDS.get(type(value)) or repr(value)[:40]}"
        if isinstance(value, (int, float)) and not self.low <= value < self.high:
            return f"{name} is {repr(value)[:40]}"
        return None

    def problem_in_list(self, name: str, values: Any) -> str | None:
        """Returns what is wrong with a list of values, as a clause, or None."""
        if type(values) is not list:
            return f"{name} is {_WORDS.get(type(values)) or repr(values)[:40]}"
        # Most lists are sound, which is faster to see for all values at once.
        types = set(map(type, values))
        numbers = [value for value in values if value is not None] if _NONE in types else values
        if types <= self.types and (not numbers or (self.low <= min(numbers) and max(numbers) < self.high)):
            return None
        return next(found for value in values if (found := self.problem(f"a value of {name}", value)) is not None)


_NONE = type(None)
_COUNT = _Kind(frozenset({int}))
_MAYBE_COUNT = _Kind(frozenset({int, _NONE}))
_INDEX = _Kind(frozenset({int}), high=10_000)
_PATCH_SIZE = _Kind(frozenset({int}), low=1)
_AMOUNT = _Kind(frozenset({int, float}), high=_LARGEST_NUMBER)
_MAYBE_AMOUNT = _Kind(frozenset({int, float, _NONE}), high=_LARGEST_NUMBER)
_NUMBER = _Kind(frozenset({int, float, _NONE}), low=-_LARGEST_NUMBER, high=_LARGEST_NUMBER)
_TIME = _Kind(frozenset({int, float, _NONE}), high=1e11)  # seconds since 1970, up to the year 5138
_TEXT = _Kind(frozenset({str}))
_MAYBE_TEXT = _Kind(frozenset({str, _NONE}))
_PLACE = {"step": _COUNT, "stage_index": _INDEX, "patch_size": _PATCH_SIZE, "tokens": _COUNT, "cost_tokens": _AMOUNT}
_TOTALS = {
    **dict.fromkeys(("total_tokens", "total_steps", "ranks"), _MAYBE_COUNT),
    **dict.fromkeys(("token_flops", "whole_cost"), _MAYBE_AMOUNT),
    "device": _MAYBE_TEXT,
}
_STEP = {**_PLACE, "loss": _NUMBER, **dict.fromkeys(STEP_METRICS, _NUMBER), "cost": _NUMBER, "time": _TIME, "stage": _TEXT}
_EXPERTS = dict(zip(EXPERT_COLUMNS, (_INDEX, _MAYBE_AMOUNT, _COUNT, _NUMBER), strict=True))
_CORPUS = {"weight": _NUMBER, "token_loss": _NUMBER}
_FIELDS: dict[str, dict[str, _Kind]] = {
    "step": _STEP,
    "evaluation": {**_PLACE, "time": _TIME, "token_loss": _NUMBER, "patch_loss": _NUMBER, "eval_tokens": _MAYBE_AMOUNT},
    "start": {"time": _TIME, "step": _COUNT, **_TOTALS},
    "switch": {"time": _TIME, "step": _COUNT, "tokens": _COUNT},
    "save": {"time": _TIME, "step": _COUNT, "seconds": _AMOUNT, "bytes": _AMOUNT, "folder": _TEXT},
    "end": {"time": _TIME, "step": _MAYBE_COUNT, "reason": _MAYBE_TEXT},
}


@dataclass
class LeftOut:
    """The rows of one file that are left out.

    Args:
        name: name of the file.
        count: how many there are.
        first: sentences about the first of them.
        end: a sentence about why the rest of the file was not read; "" if all of it was.
    """

    name: str
    count: int = 0
    first: list[str] = field(default_factory=list)
    end: str = ""

    def add(self, line: int, reason: str) -> None:
        """Counts a row.

        Args:
            line: its line in the file, from 1.
            reason: why it is left out, as a clause.
        """
        self.count += 1
        if len(self.first) < _MOST_NOTES:
            self.first.append(f"{self.name}: line {line:,}: {reason}; row left out")

    def notes(self) -> list[str]:
        """Returns a sentence for each of the first rows, one for all others, and one about a rest that was not read."""
        more = self.count - len(self.first)
        others = [f"{self.name}: {plural(more, 'more row')} left out"] if more else []
        return [*self.first, *others, *([self.end] if self.end else [])]


def read_rows(path: Path, left_out: LeftOut) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the line and the record of each row that is a JSON object; the fields are not checked.

    Args:
        path: the file.
        left_out: gets the other rows, and the reason where the file cannot be read to its end.
    """
    line = 0
    with path.open("rb") as file:
        lines = bounded_lines(file, LONGEST_LINE)
        while True:
            line += 1
            try:
                text = next(lines, b"")
            except OSError as error:
                left_out.end = f"{path.name}: line {line:,}: {reason(error)}; the rest of the file is left out"
                return
            if text == b"":
                return
            if text is None:
                left_out.add(line, f"it has more than {LONGEST_LINE:,} bytes")
                continue
            complete = text.endswith(b"\n")
            try:
                record = orjson.loads(text)
            except ValueError:
                if text.strip():
                    left_out.add(line, "it is not valid JSON" if complete else "it is incomplete")
                continue
            if isinstance(record, dict):
                yield line, record
            else:
                left_out.add(line, "it is not a JSON object")


def problem(record: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with a record of metrics.jsonl, as a clause, or None; records of unknown types have no problem."""
    kind = record.get("type")
    if not isinstance(kind, str):
        return f"type is {_WORDS.get(type(kind)) or repr(kind)[:40]}"
    if (found := _first_problem(_FIELDS.get(kind, {}), record)) is not None:
        return found
    if kind == "step":
        return experts_problem(record)
    return _corpora_problem(record.get("corpora")) if kind == "evaluation" else None


def experts_problem(step: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with the load of experts in a step, which models without experts lack, or None."""
    if step_experts(step) is None:
        return None
    for name, allowed in _EXPERTS.items():
        if (found := allowed.problem_in_list(name, step.get(name))) is not None:
            return found
    lengths = [len(step[name]) for name in EXPERT_COLUMNS]
    if lengths.count(lengths[0]) < len(lengths) or lengths[0] > _MOST_BLOCKS:
        return f"the lists {', '.join(EXPERT_COLUMNS)} have {', '.join(map(str, lengths))} values"
    blocks = step["expert_blocks"]
    return None if all(map(lt, blocks, blocks[1:])) else "the numbers of expert_blocks are not in ascending order"


def step_experts(step: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Returns the values of a step in the order `EXPERT_COLUMNS`, not checked; None without any."""
    try:
        values: tuple[Any, ...] = _get_experts(step)
    except KeyError:
        values = tuple(step.get(name) for name in EXPERT_COLUMNS)
    return values if any(values) else None


_get_experts = itemgetter(*EXPERT_COLUMNS)


def _first_problem(fields: Mapping[str, _Kind], values: Mapping[str, Any]) -> str | None:
    return next((found for name, allowed in fields.items() if (found := allowed.problem(name, values.get(name))) is not None), None)


def _corpora_problem(corpora: Any) -> str | None:
    """Returns what is wrong with the losses of corpora in an evaluation, which runs of earlier versions lack, or None."""
    if corpora is not None and not isinstance(corpora, dict):
        return f"corpora is {_WORDS.get(type(corpora)) or repr(corpora)[:40]}"
    for name, part in (corpora or {}).items():
        found = _first_problem(_CORPUS, part) if isinstance(part, dict) else "it is not an object"
        if found is not None:
            return f"corpora, {name[:40]!r}: {found}"
    return None


_STEP_FIELDS = tuple(_STEP)
_get_step = itemgetter(*_STEP_FIELDS)
# By the types of a step's values: the values that are numbers with the widest range. Almost all steps have the same types.
_numbers_by_types: dict[tuple[type, ...], Any] = {}


def step_values(record: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Returns the values of a step in the order `STEP_COLUMNS`, "cost", "time", "stage"; None if `problem` finds one in these.

    The same check as `problem`, without that of experts, but fast enough for a million steps.
    """
    try:
        values: tuple[Any, ...] = _get_step(record)
    except KeyError:
        values = tuple(record.get(name) for name in _STEP_FIELDS)
    types = tuple(map(type, values))
    numbers = _numbers_by_types.get(types)
    if numbers is None:
        if not all(one in kind.types for one, kind in zip(types, _STEP.values(), strict=True)):
            return None
        numeric = [index for index, one in enumerate(types) if one in (int, float)]
        numbers = _numbers_by_types[types] = itemgetter(*numeric)
    found, time = numbers(values), values[-2]
    if min(found) < 0 or max(found) >= _COUNT.high or (time is not None and time >= _TIME.high):
        # Rare: only measured values may be negative or that large. All ranges are checked.
        return None if _first_problem(_STEP, record) is not None else values
    return values if values[1] < _INDEX.high and values[2] >= 1 else None


class InOrder:
    """Passes on records whose place in the run does not go back.

    Args:
        left_out: gets the records that do.
        strict: whether each record must have a larger step than the one before.
    """

    def __init__(self, left_out: LeftOut, strict: bool) -> None:
        self._left_out, self._strict = left_out, strict
        self._last: tuple[Any, ...] | None = None
        self._pending: tuple[int, tuple[Any, ...], Any] | None = None

    def _follows(self, place: tuple[Any, ...], before: tuple[Any, ...] | None) -> bool:
        return before is None or (
            place[0] >= before[0] + self._strict and place[1] >= before[1] and place[2] >= before[2] and place[3] >= before[3]
        )

    def push(self, line: int, place: tuple[Any, ...], item: Any) -> Any:
        """Takes the next record and returns an earlier one that is in order, or None.

        Args:
            line: line of the record.
            place: its step, stage index, tokens and cost tokens.
            item: what is returned later.
        """
        pending = self._pending
        if pending is None or self._follows(place, pending[1]):
            self._pending = (line, place, item)
            if pending is None:
                return None
            self._last = pending[1]
            return pending[2]
        if self._follows(place, self._last):
            self._left_out.add(pending[0], f"step {pending[1][0]:,} is followed by an earlier place of the run, step {place[0]:,}")
            self._pending = (line, place, item)
        else:
            self._left_out.add(line, f"step {place[0]:,} comes after step {pending[1][0]:,}")
        return None

    def rest(self) -> Any:
        """Returns the last record, or None."""
        return None if self._pending is None else self._pending[2]
