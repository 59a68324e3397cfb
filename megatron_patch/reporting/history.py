"""The history of a run as one record.

In: the folder of --save with `metrics.jsonl` and, if they exist, `events.jsonl` and the newest checkpoint's `trainer_state.json`. Out:
`History`. Without an optional file, or with an incomplete line, the record omits only that part; `notes` then names what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.checkpoint.commit import list_checkpoints
from megatron_patch.checkpoint.trainer_state import STATE
from megatron_patch.errors import DataError
from megatron_patch.training.callbacks.base import STEP_METRICS
from megatron_patch.training.callbacks.metrics import read_metrics
from megatron_patch.utils.units import plural

STEP_COLUMNS = ("step", "stage_index", "patch_size", "tokens", "cost_tokens", "loss", *STEP_METRICS)
EVALUATION_COLUMNS = ("step", "stage_index", "patch_size", "tokens", "cost_tokens", "token_loss", "patch_loss", "eval_tokens")
MOST_POINTS = 5_000
"""Largest number of steps that a report shows; of a longer run it shows every n-th step."""

Columns = dict[str, list[Any]]
_NEEDED = {"step", "stage", "stage_index", "patch_size", "tokens", "cost_tokens"}


@dataclass(frozen=True)
class History:
    """The history of one run.

    Args:
        label: name of the run in the report.
        folder: the folder of --save.
        state: "done", "stopped" (it ended before its last step) or "unfinished" (it is running, or was killed).
        total_tokens: tokens that the complete run reads.
        total_steps: steps of the complete run.
        token_flops: FLOPs of one token in token-level training.
        whole_cost: planned FLOPs relative to token-level training on the same tokens.
        device: name of the devices.
        ranks: number of ranks.
        stages: one dict per stage that has begun: name, patch size, step, tokens, cost tokens and seconds at its start, and its blend.
        steps: columns `STEP_COLUMNS` and "seconds", the elapsed time without the pauses before restarts.
        evaluations: columns `EVALUATION_COLUMNS` and "seconds".
        checkpoints: step, tokens, cost tokens, duration, bytes and folder of each checkpoint.
        starts: step, tokens, cost tokens and elapsed time of each start and resume.
        events: step, tokens, time, name and text of each record of `events.jsonl`.
        options: every option by name; empty if no checkpoint could be read.
        given: names of the options that were given.
        blend: (corpus, share of the tokens) of the run.
        thinned: interval between the steps shown; 1 shows every step.
        notes: sentences that name what could not be read.
    """

    label: str
    folder: str
    state: str
    total_tokens: int
    total_steps: int
    token_flops: float
    whole_cost: float
    device: str
    ranks: int
    stages: list[dict[str, Any]]
    steps: Columns
    evaluations: Columns
    checkpoints: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    events: list[dict[str, Any]]
    options: dict[str, Any]
    given: list[str]
    blend: list[tuple[str, float]]
    thinned: int
    notes: list[str]


def labeled(runs: Sequence[Path], labels: Sequence[str] | None) -> list[tuple[Path, str | None]]:
    """Returns each run with its label, or with None if no labels are given.

    Raises:
        DataError: there are more or fewer labels than runs.
    """
    if labels is None:
        return [(run, None) for run in runs]
    if len(labels) != len(runs):
        raise DataError(
            f"--labels gives {plural(len(labels), 'label')} for {plural(len(runs), 'run')}",
            "one label per run",
            "give as many labels as folders",
        )
    return list(zip(runs, labels, strict=True))


def read_history(save: Path, label: str | None = None, most_points: int = MOST_POINTS) -> History:
    """Reads the folder of a run.

    Args:
        save: the folder that --save named.
        label: name of the run in the report; None uses the name of the folder.
        most_points: largest number of steps to keep; all evaluations are kept.

    Raises:
        DataError: the folder has no metrics, or the metrics contain no step.
    """
    path = save / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{path} does not exist", "the folder of a run, which contains metrics.jsonl", "give the folder that --save named")
    notes: list[str] = []
    records = _with_elapsed_time(read_metrics(path))
    broken = sum(1 for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()) - len(records)
    if broken:
        notes.append(f"skipped {plural(broken, 'incomplete line')} of metrics.jsonl")
    by_type: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_type.setdefault(str(record.get("type")), []).append(record)
    steps = [record for record in by_type.get("step", []) if record.keys() >= _NEEDED]
    if not steps:
        raise DataError(f"{path} contains no steps", "a run with at least one step", "wait for its first step")
    locator = _Locator(steps)
    options, given, plan = _configuration(save, notes)
    start = by_type.get("start", [{}])[-1]
    thinned = -(-len(steps) // max(1, most_points))
    return History(
        label=label or save.resolve().name,
        folder=str(save),
        state=_state(records),
        total_tokens=start.get("total_tokens") or steps[-1]["tokens"],
        total_steps=start.get("total_steps") or steps[-1]["step"],
        token_flops=start.get("token_flops") or 1.0,
        whole_cost=start.get("whole_cost") or steps[-1]["cost"],
        device=start.get("device", ""),
        ranks=start.get("ranks", 1),
        stages=_stages(steps, plan),
        steps=_columns(_thin(steps, thinned), (*STEP_COLUMNS, "seconds")),
        evaluations=_columns(by_type.get("evaluation", []), (*EVALUATION_COLUMNS, "seconds_so_far")),
        checkpoints=[
            {**locator.locate(r), "seconds": r.get("seconds"), "bytes": r.get("bytes"), "folder": Path(str(r.get("folder"))).name}
            for r in by_type.get("save", [])
        ],
        starts=[locator.locate(record) for record in by_type.get("start", [])],
        events=_events(save / "events.jsonl", locator),
        options=options,
        given=given,
        blend=_blend(options),
        thinned=thinned,
        notes=notes,
    )


def _with_elapsed_time(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the records with the elapsed time of the run added; pauses before restarts are excluded."""
    timed: list[dict[str, Any]] = []
    elapsed, before = 0.0, None
    for record in records:
        now = record.get("time")
        if isinstance(now, (int, float)):
            if before is not None and record.get("type") != "start":
                elapsed += max(0.0, now - before)
            before = now
        # "seconds" of other records, such as evaluations, is already their duration.
        name = "seconds" if record.get("type") == "step" else "seconds_so_far"
        timed.append({**record, name: round(elapsed, 3)})
    return timed


class _Locator:
    """Looks up the tokens, cost and elapsed time of a step.

    Args:
        steps: the run's step records.
    """

    def __init__(self, steps: Sequence[Mapping[str, Any]]) -> None:
        self._by_step = {record["step"]: record for record in steps}

    def locate(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Returns step, tokens, cost tokens and elapsed time of a record by its step; all are 0 before the first step."""
        step = record.get("step") or 0
        step_record = self._by_step.get(step, {})
        return {
            "step": step,
            "tokens": step_record.get("tokens", record.get("tokens", 0)),
            "cost_tokens": step_record.get("cost_tokens", 0.0),
            "seconds_so_far": record.get("seconds_so_far", step_record.get("seconds", 0.0)),
        }


def _columns(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Columns:
    """Returns one list per name; a value that a record lacks is None."""
    return {"seconds" if name == "seconds_so_far" else name: [record.get(name) for record in records] for name in names}


def _thin(records: Sequence[dict[str, Any]], every: int) -> list[dict[str, Any]]:
    """Returns every n-th record, and the first and the last of every stage."""
    if every == 1:
        return list(records)
    edges = {0, len(records) - 1}
    for index in range(1, len(records)):
        if records[index]["stage_index"] != records[index - 1]["stage_index"]:
            edges |= {index - 1, index}
    return [record for index, record in enumerate(records) if index % every == 0 or index in edges]


def _state(records: Sequence[Mapping[str, Any]]) -> str:
    last = max((index for index, record in enumerate(records) if record.get("type") in ("start", "end")), default=-1)
    if last < 0 or records[last]["type"] == "start":
        return "unfinished"
    return "done" if records[last].get("reason") == "done" else "stopped"


def _stages(steps: Sequence[Mapping[str, Any]], plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the stages that have begun, each with tokens, cost and time at its start."""
    planned = plan.get("stages", [])
    stages: list[dict[str, Any]] = []
    before: Mapping[str, Any] = {"step": 0, "tokens": 0, "cost_tokens": 0.0, "seconds": 0.0}
    for record in steps:
        index = record["stage_index"]
        if not stages or stages[-1]["index"] != index:
            blend = planned[index].get("blend") if index < len(planned) else None
            stages.append(
                {
                    "index": index,
                    "name": record["stage"],
                    "patch_size": record["patch_size"],
                    "step": before["step"],
                    "tokens": before["tokens"],
                    "cost_tokens": before["cost_tokens"],
                    "seconds": before["seconds"],
                    "blend": _named(blend) if blend else None,
                }
            )
        before = record
    return stages


def _configuration(save: Path, notes: list[str]) -> tuple[dict[str, Any], list[str], Mapping[str, Any]]:
    """Returns (options, names of the given ones, plan) from the newest checkpoint with a readable trainer state."""
    for folder in list_checkpoints(save):
        try:
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            return dict(state["config"]["options"]), sorted(state["config"]["origins"]), state["plan"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    notes.append("the configuration is unknown: no checkpoint could be read")
    return {}, [], {}


def _blend(options: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Returns (corpus, share) pairs of --data-path, which lists prefixes or alternates weights and prefixes."""
    values = [str(word) for word in options.get("data_path") or ()]
    try:
        pairs = [(values[index + 1], float(values[index])) for index in range(0, len(values) - 1, 2)] if len(values) > 1 else []
    except ValueError:
        pairs = []
    return _named(pairs or [(word, 1.0) for word in values])


def _named(pairs: Iterable[Sequence[Any]]) -> list[tuple[str, float]]:
    """Returns each corpus under the last part of its prefix, with its weight as a share of the sum."""
    rows = [(Path(str(prefix)).name, float(weight)) for prefix, weight in pairs]
    total = sum(weight for _, weight in rows) or 1.0
    return [(name, weight / total) for name, weight in rows]


def _events(path: Path, locator: _Locator) -> list[dict[str, Any]]:
    """Returns the events of a run, without those that metrics.jsonl also records."""
    if not path.is_file():
        return []
    events = []
    for record in read_metrics(path):
        if record.get("type") in ("start", "switch", "save") or record.get("reason") == "done":
            continue  # metrics.jsonl records these, too
        rest = {name: value for name, value in record.items() if name not in ("type", "time", "step")}
        text = record.get("message") or record.get("reason") or ", ".join(f"{name} {value}" for name, value in rest.items())
        events.append(
            {
                **locator.locate(record),
                "time": record.get("time"),
                "name": str(record.get("type") or "event"),
                "text": str(text),
            }
        )
    return events


def differing_options(histories: Sequence[History]) -> list[tuple[str, list[Any]]]:
    """Returns (name, value in each run) of every option that differs between runs; for one run, of every option that was given.

    The value is None in a run whose configuration is unknown. Options that name folders or experiments are excluded.
    """
    known = [history for history in histories if history.options]
    names = dict.fromkeys(name for history in known for name in history.options)
    rows = []
    for name in names:
        if name in ("save", "load", "local_rank", "wandb_exp_name", "tensorboard_dir"):
            continue
        values = [history.options.get(name) for history in histories]
        distinct = {json.dumps(history.options.get(name), sort_keys=True) for history in known}
        if len(distinct) > 1 or (len(histories) == 1 and name in histories[0].given):
            rows.append((name, values))
    return rows
