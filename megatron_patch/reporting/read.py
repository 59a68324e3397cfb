"""From runs' folders to the data of a page.

In: folders with metrics.jsonl, and where they are there, events.jsonl and checkpoints with their configuration. Out: `RunData`, plain
values by columns. Torn and foreign lines are left out and counted; a run without any metrics is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_patch.errors import DataError

STEP_COLUMNS = (
    "step",
    "tokens",
    "cost_tokens",
    "loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "positions_per_second",
    "tflops",
    "mfu",
    "memory_gib",
    "patch_size",
    "stage_index",
)
EVALUATION_COLUMNS = ("step", "tokens", "cost_tokens", "token_loss", "patch_loss", "patch_size")
LONGEST = 4000
"""Points of a column; a longer run is thinned evenly, its first and last point kept."""


@dataclass(frozen=True)
class RunData:
    """One run.

    Args:
        name: of its folder, or what the user called it.
        steps: column -> values; "hours" is time at work, without what lies between an end and the next start.
        evaluations: the same of held-out losses.
        stages: in order: name, patch_size, and where it begins in tokens, cost_tokens and hours.
        saves: checkpoints: step, tokens, hours, bytes, seconds.
        events: time, what, and whatever else an event says, with the hours it fell in.
        options: the run's configuration, empty where no checkpoint has kept it.
        blend: (corpus, share) of the data.
        total_tokens: that the run will read.
        whole_cost: FLOPs of the plan over those of token-level training on the same tokens.
        device: name of the devices.
        ranks: how many.
        state: "done", "stopped" or "running".
        torn: lines that could not be read.
    """

    name: str
    steps: dict[str, list[Any]]
    evaluations: dict[str, list[Any]]
    stages: list[dict[str, Any]]
    saves: list[dict[str, Any]]
    events: list[dict[str, Any]]
    options: dict[str, Any]
    blend: list[tuple[str, float]]
    total_tokens: int
    whole_cost: float | None
    device: str
    ranks: int
    state: str
    torn: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(JSON objects of a file, lines that are none)."""
    found, torn = [], 0
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", "a readable file", "check the path") from error
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            torn += bool(line.strip())
            continue
        if isinstance(record, dict):
            found.append(record)
        else:
            torn += 1
    return found, torn


def _hours(records: Sequence[dict[str, Any]]) -> Iterator[float]:
    """Time at work up to each record: a start adds nothing, whatever time has passed since the record before it."""
    total, before = 0.0, None
    for record in records:
        now = record.get("time")
        if isinstance(now, int | float) and math.isfinite(now):
            if before is not None and record.get("type") != "start":
                total += max(0.0, now - before)
            before = now
        yield total / 3600


def _thin(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(rows) <= LONGEST:
        return rows
    return [rows[round(index * (len(rows) - 1) / (LONGEST - 1))] for index in range(LONGEST)]


def _columns(rows: list[dict[str, Any]], names: Sequence[str]) -> dict[str, list[Any]]:
    return {name: [row.get(name) for row in _thin(rows)] for name in (*names, "hours")}


def _configuration(folder: Path) -> dict[str, Any]:
    """The options in the newest checkpoint that says them."""
    for path in sorted(folder.glob("step-*/trainer_state.json"), reverse=True):
        try:
            options = json.loads(path.read_text(encoding="utf-8"))["config"]["options"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(options, dict):
            return options
    return {}


def _blend(options: dict[str, Any]) -> list[tuple[str, float]]:
    from megatron_patch.config.stage_request import parse_blend
    from megatron_patch.errors import ConfigError

    try:
        return list(parse_blend([str(word) for word in options.get("data_path") or ()]))
    except ConfigError:
        return []


def _stages(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    stages: list[dict[str, Any]] = []
    before: dict[str, Any] = {"tokens": 0, "cost_tokens": 0.0, "hours": 0.0, "step": 0}
    for record in records:
        if record.get("type") != "step":
            continue
        if not stages or stages[-1]["index"] != record.get("stage_index"):
            begins = {name: before.get(name) for name in ("tokens", "cost_tokens", "hours", "step")}
            stages.append(
                {"name": record.get("stage"), "patch_size": record.get("patch_size"), "index": record.get("stage_index"), **begins}
            )
        before = record
    return stages


def read_run(folder: Path, name: str | None = None) -> RunData:
    """Reads a run's folder.

    Raises:
        DataError: no metrics there, or no step in them.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{path} does not exist", "a run's folder with metrics.jsonl (what --save named)", "check the path")
    records, torn = _lines(path)
    for record, hours in zip(records, _hours(records), strict=True):
        record["hours"] = hours
    by_type: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_type.setdefault(str(record.get("type")), []).append(record)
    steps = by_type.get("step", [])
    if not steps:
        raise DataError(f"{path} holds no steps", "a run that has begun to train", "wait for its first step")
    start = by_type.get("start", [{}])[-1]
    events = _lines(folder / "events.jsonl")[0] if (folder / "events.jsonl").is_file() else []
    # Switches and checkpoints are shown by themselves.
    events = [event for event in events if event.get("type") not in ("switch", "save")]
    tokens_of = {record.get("step"): record.get("tokens") for record in steps}
    for event in events:
        earlier = [record["hours"] for record in records if record.get("time", math.inf) <= event.get("time", -math.inf)]
        event["hours"] = earlier[-1] if earlier else 0.0
        event.setdefault("tokens", tokens_of.get(event.get("step")))
    for save in by_type.get("save", []):
        save["tokens"] = tokens_of.get(save.get("step"))
    options = _configuration(folder)
    last = records[-1]
    state = ("done" if last.get("reason") == "done" else "stopped") if last.get("type") == "end" else "running"
    return RunData(
        name=name or folder.resolve().name,
        steps=_columns(steps, STEP_COLUMNS),
        evaluations=_columns(by_type.get("evaluation", []), EVALUATION_COLUMNS),
        stages=_stages(records),
        saves=[{key: save.get(key) for key in ("step", "tokens", "hours", "bytes", "seconds")} for save in by_type.get("save", [])],
        events=events,
        options=options,
        blend=_blend(options),
        total_tokens=int(start.get("total_tokens") or steps[-1].get("tokens") or 0),
        whole_cost=start.get("whole_cost"),
        device=str(start.get("device") or ""),
        ranks=int(start.get("ranks") or 1),
        state=state,
        torn=torn,
    )


def differing_options(runs: Sequence[RunData]) -> list[tuple[str, list[Any]]]:
    """(option, its value in each run) for options that are not the same in all runs whose configuration is known."""
    known = [run.options for run in runs if run.options]
    names = sorted({name for options in known for name in options})
    found = []
    for name in names:
        values = [json.dumps(options.get(name), sort_keys=True) for options in known]
        if len(set(values)) > 1:
            found.append((name, [run.options.get(name) if run.options else None for run in runs]))
    return found
