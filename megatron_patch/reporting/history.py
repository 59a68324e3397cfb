"""What a run left behind, in one record that needs no other file.

In: SAVE, with `metrics.jsonl`, and where they exist `events.jsonl` and the newest checkpoint's `trainer_state.json`. Out: `History`. A
missing file or a torn last line costs what was in it and a sentence in `notes`, never the rest.
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

STEP_COLUMNS = ("step", "stage_index", "patch_size", "tokens", "cost_tokens", "loss", *STEP_METRICS)
EVALUATION_COLUMNS = ("step", "stage_index", "patch_size", "tokens", "cost_tokens", "token_loss", "patch_loss", "eval_tokens")
MOST_POINTS = 5_000
"""Steps of a run that a report shows; of a longer run it shows every n-th."""

Columns = dict[str, list[Any]]
_NEEDED = {"step", "stage", "stage_index", "patch_size", "tokens", "cost_tokens"}


@dataclass(frozen=True)
class History:
    """A run.

    Args:
        label: what the report calls it.
        folder: SAVE.
        state: "done", "stopped" (it ended before its last step) or "unfinished" (it still runs, or was killed).
        total_tokens: that the whole run reads.
        total_steps: of the whole run.
        token_flops: FLOPs of one token at token level.
        whole_cost: planned FLOPs over those of token-level training on the same tokens.
        device: name of the devices.
        ranks: number of processes.
        stages: name, patch_size, tokens and cost_tokens at which it begins, for each stage that has begun; blend where it has its own.
        steps: a list for each of `STEP_COLUMNS` and "seconds": time that the run has taken so far, without the pauses between restarts.
        evaluations: the same for `EVALUATION_COLUMNS`.
        checkpoints: step, tokens, cost_tokens, seconds, bytes, folder of each.
        starts: the same places, for each time that the run was started or resumed.
        events: what `events.jsonl` tells: step and place, name, text.
        options: every option by its name, empty where no checkpoint tells it.
        given: names of the options that were given.
        blend: (corpus, weight) of the run.
        thinned: steps between two that are shown; 1: all are.
        notes: what could not be read.
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


def read_history(save: Path, label: str | None = None, most_points: int = MOST_POINTS) -> History:
    """Reads a run's folder.

    Args:
        save: the folder.
        label: by default the folder's name.
        most_points: steps to keep; all evaluations are kept.

    Raises:
        DataError: no metrics, or not one step in them.
    """
    path = save / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{path} does not exist", "a run's folder, which holds metrics.jsonl", "give the folder that --save named")
    notes: list[str] = []
    records = _clocked(read_metrics(path))
    broken = sum(1 for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()) - len(records)
    if broken:
        notes.append(f"{broken} torn line{'s' if broken > 1 else ''} of metrics.jsonl left out")
    by_type: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_type.setdefault(str(record.get("type")), []).append(record)
    steps = [record for record in by_type.get("step", []) if record.keys() >= _NEEDED]
    if not steps:
        raise DataError(f"{path} holds no steps", "a run that has taken at least one", "wait for its first step")
    places = _Places(steps)
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
            {**places.of(r), "seconds": r.get("seconds"), "bytes": r.get("bytes"), "folder": Path(str(r.get("folder"))).name}
            for r in by_type.get("save", [])
        ],
        starts=[places.of(record) for record in by_type.get("start", [])],
        events=_events(save / "events.jsonl", places),
        options=options,
        given=given,
        blend=_blend(options),
        thinned=thinned,
        notes=notes,
    )


def _clocked(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records, each with the time the run has taken so far; the pause before a restart does not count."""
    clocked: list[dict[str, Any]] = []
    elapsed, before = 0.0, None
    for record in records:
        now = record.get("time")
        if isinstance(now, (int, float)):
            if before is not None and record.get("type") != "start":
                elapsed += max(0.0, now - before)
            before = now
        # An evaluation has a "seconds" of its own: what it took.
        name = "seconds" if record.get("type") == "step" else "seconds_so_far"
        clocked.append({**record, name: round(elapsed, 3)})
    return clocked


class _Places:
    """Where in tokens, cost and time a step lies.

    Args:
        steps: the run's step records.
    """

    def __init__(self, steps: Sequence[Mapping[str, Any]]) -> None:
        self._by_step = {record["step"]: record for record in steps}

    def of(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The place of a record that names its step; before the first step everything is 0."""
        step = record.get("step") or 0
        at = self._by_step.get(step, {})
        return {
            "step": step,
            "tokens": at.get("tokens", record.get("tokens", 0)),
            "cost_tokens": at.get("cost_tokens", 0.0),
            "seconds_so_far": record.get("seconds_so_far", at.get("seconds", 0.0)),
        }


def _columns(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Columns:
    """Records as lists, one a name; what a record lacks is None."""
    return {"seconds" if name == "seconds_so_far" else name: [record.get(name) for record in records] for name in names}


def _thin(records: Sequence[dict[str, Any]], every: int) -> list[dict[str, Any]]:
    """Every n-th record, and the first and the last of every stage."""
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
    """The stages that have begun, each with the place of the step before its first."""
    planned = plan.get("stages", [])
    found: list[dict[str, Any]] = []
    before: Mapping[str, Any] = {"step": 0, "tokens": 0, "cost_tokens": 0.0, "seconds": 0.0}
    for record in steps:
        index = record["stage_index"]
        if not found or found[-1]["index"] != index:
            blend = planned[index].get("blend") if index < len(planned) else None
            found.append(
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
    return found


def _configuration(save: Path, notes: list[str]) -> tuple[dict[str, Any], list[str], Mapping[str, Any]]:
    """(options, names of those given, plan) by the newest checkpoint whose trainer state can be read."""
    for folder in list_checkpoints(save):
        try:
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            return dict(state["config"]["options"]), sorted(state["config"]["origins"]), state["plan"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    notes.append("no checkpoint tells the configuration")
    return {}, [], {}


def _blend(options: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(corpus, share) of --data-path: prefixes alone, or weights and prefixes in turn."""
    words = [str(word) for word in options.get("data_path") or ()]
    try:
        pairs = [(words[index + 1], float(words[index])) for index in range(0, len(words) - 1, 2)] if len(words) > 1 else []
    except ValueError:
        pairs = []
    return _named(pairs or [(word, 1.0) for word in words])


def _named(pairs: Iterable[Sequence[Any]]) -> list[tuple[str, float]]:
    """Corpora by the last part of their prefix, weights as shares of the whole."""
    rows = [(Path(str(prefix)).name, float(weight)) for prefix, weight in pairs]
    whole = sum(weight for _, weight in rows) or 1.0
    return [(name, weight / whole) for name, weight in rows]


def _events(path: Path, places: _Places) -> list[dict[str, Any]]:
    """What happened beside the steps: one line an event, with its type, perhaps its step, and what else it tells."""
    if not path.is_file():
        return []
    events = []
    for record in read_metrics(path):
        if record.get("type") in ("start", "switch", "save") or record.get("reason") == "done":
            continue  # metrics.jsonl has told these
        rest = {name: value for name, value in record.items() if name not in ("type", "time", "step")}
        text = record.get("message") or record.get("reason") or ", ".join(f"{name} {value}" for name, value in rest.items())
        events.append(
            {
                **places.of(record),
                "time": record.get("time"),
                "name": str(record.get("type") or "event"),
                "text": str(text),
            }
        )
    return events


def unlike_options(histories: Sequence[History]) -> list[tuple[str, list[Any]]]:
    """(name, its value in each run) of the options that are not the same in all; with one run, of those that were given.

    Runs whose configuration is not known have None. Where a run saves and whom it tells is no difference between runs.
    """
    known = [history for history in histories if history.options]
    names = dict.fromkeys(name for history in known for name in history.options)
    rows = []
    for name in names:
        if name in ("save", "load", "local_rank", "wandb_exp_name", "tensorboard_dir"):
            continue
        values = [history.options.get(name) for history in histories]
        written = {json.dumps(history.options.get(name), sort_keys=True) for history in known}
        if len(written) > 1 or (len(histories) == 1 and name in histories[0].given):
            rows.append((name, values))
    return rows
