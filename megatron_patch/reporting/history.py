"""The history of a run as one record.

In: the folder of --save with `metrics.jsonl` and, if they exist, `events.jsonl` and the newest checkpoint's `trainer_state.json`. Out:
`History`. Without an optional file, or with a bad row, the record omits only that part; `notes` then names what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.checkpoint.commit import list_checkpoints
from megatron_patch.checkpoint.trainer_state import STATE
from megatron_patch.credentials import cleaned_record, without_credentials
from megatron_patch.data.corpus_names import corpus_names
from megatron_patch.errors import DataError
from megatron_patch.reporting.metrics_file import MOST_POINTS, Marks, Places, loss_of_corpus, read_metrics_file
from megatron_patch.reporting.rows import EVALUATION_COLUMNS, STEP_COLUMNS, LeftOut, read_rows
from megatron_patch.utils.console import one_line
from megatron_patch.utils.files import optional_file, read_json, reason
from megatron_patch.utils.units import plural

Columns = dict[str, list[Any]]
_LONGEST_TEXT = 300


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
        experts: the load of experts by block (`ExpertMap.as_record`); None of a run without experts.
        corpora: for each corpus that evaluations name: name, its last weight in the held-out loss, and token_loss at each evaluation.
        checkpoints: step, tokens, cost tokens, duration, bytes and folder of each checkpoint.
        starts: step, tokens, cost tokens and elapsed time of each start and resume.
        events: step, tokens, time, name and text of each record of `events.jsonl`.
        options: every option by name; empty if no checkpoint could be read.
        given: names of the options that were given.
        blend: (corpus, share of the tokens) of the run.
        thinned: consecutive steps of which only the last and the extremes are shown (`Thinning`); 1 shows every step.
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
    experts: dict[str, Any] | None
    corpora: list[dict[str, Any]]
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
    """Reads the folder of a run in one pass.

    Memory does not grow with the fields of the steps, of which `Thinning` keeps at most `most_points`; of each other step only the place
    (step, tokens, cost, time: 32 bytes) is kept, so that checkpoints and events are placed exactly.

    Args:
        save: the folder that --save named.
        label: name of the run in the report; None uses the name of the folder.
        most_points: largest number of steps, and of evaluations, to keep.

    Raises:
        DataError: the folder has no metrics, or the metrics contain no step.
    """
    path = save / "metrics.jsonl"
    run = read_metrics_file(path, most_points)
    if run.last is None:
        why = "".join(f"; {note}" for note in run.left_out.notes()[-1:])
        raise DataError(f"{path} contains no steps{why}", "a run with at least one step", "wait for its first step")
    notes = run.left_out.notes() + ([f"shows the first {len(run.corpora)} corpora"] if run.more_corpora else [])
    options, given, plan = _configuration(save, notes)
    evaluations = run.evaluations.rows()
    start, last = run.start, dict(zip((*STEP_COLUMNS, "cost", "time", "stage"), run.last, strict=True))
    return History(
        label=one_line(label or save.resolve().name),
        folder=one_line(str(save)),
        state=run.state,
        total_tokens=start.get("total_tokens") or last["tokens"],
        total_steps=start.get("total_steps") or last["step"],
        token_flops=start.get("token_flops") or 1.0,
        whole_cost=start.get("whole_cost") or last["cost"] or 0.0,
        device=start.get("device") or "",
        ranks=start.get("ranks") or 1,
        stages=[{**stage, "blend": _blend_of_stage(plan, stage["index"])} for stage in run.stages],
        steps=_columns(run.steps.rows(), (*STEP_COLUMNS, "seconds")),
        evaluations=_columns(evaluations, (*EVALUATION_COLUMNS, "seconds")),
        experts=run.experts.as_record(*_numbers_of_experts(options)),
        corpora=[
            {"name": one_line(name), "weight": weight, "token_loss": [loss_of_corpus(row, number) for row in evaluations]}
            for number, (name, weight) in enumerate(run.corpora.items())
        ],
        checkpoints=[
            {**run.places.locate(r), "seconds": r["seconds"], "bytes": r["bytes"], "folder": Path(r["folder"]).name}
            for r in run.saves.shown("checkpoints", notes)
        ],
        starts=[run.places.locate(record) for record in run.starts.shown("starts", notes)],
        events=_events(save / "events.jsonl", run.places, notes),
        options=options,
        given=given,
        blend=_blend(options),
        thinned=run.steps.rows_per_bin,
        notes=notes,
    )


def _columns(rows: Sequence[Sequence[Any]], names: Sequence[str]) -> Columns:
    """Returns one list per name."""
    return {name: [row[index] for row in rows] for index, name in enumerate(names)}


def _blend_of_stage(plan: Mapping[str, Any], index: int) -> list[tuple[str, float]] | None:
    """Returns the blend that the plan in a checkpoint gives to a stage; None if it gives none."""
    stages = plan.get("stages")
    stage = stages[index] if isinstance(stages, list) and index < len(stages) else None
    blend = stage.get("blend") if isinstance(stage, dict) else None
    return _named(blend) if isinstance(blend, list) and blend else None


def _configuration(save: Path, notes: list[str]) -> tuple[dict[str, Any], list[str], Mapping[str, Any]]:
    """Returns (options, names of the given ones, plan) from the newest checkpoint with a readable trainer state."""
    for folder in list_checkpoints(save):
        try:
            state = cleaned_record(read_json(folder / STATE))
            options, origins, plan = state["config"]["options"], state["config"]["origins"], state["plan"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if all(isinstance(part, dict) for part in (options, origins, plan)):
            return options, sorted(origins), plan
    notes.append("the configuration is unknown: no checkpoint could be read")
    return {}, [], {}


def _numbers_of_experts(options: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Returns (experts of a block, experts that a position uses); None if the options do not have both."""
    experts, top_k = options.get("num_experts"), options.get("moe_router_topk")
    known = type(experts) is int and type(top_k) is int and 1 <= top_k <= experts < 1 << 20
    return (experts, top_k) if known else (None, None)


def _blend(options: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Returns (corpus, share) pairs of --data-path, which lists prefixes or alternates weights and prefixes."""
    words = options.get("data_path")
    values = [str(word) for word in words] if isinstance(words, list) else []
    try:
        pairs = [(values[index + 1], float(values[index])) for index in range(0, len(values) - 1, 2)] if len(values) > 1 else []
    except ValueError:
        pairs = []
    return _named(pairs or [(word, 1.0) for word in values])


def _named(pairs: Iterable[Any]) -> list[tuple[str, float]]:
    """Returns each corpus under its short name, with its weight as a share of the sum; without what is no such pair."""
    rows = []
    for pair in pairs:
        prefix, weight = pair if isinstance(pair, (list, tuple)) and len(pair) == 2 else (None, None)
        if isinstance(prefix, str) and isinstance(weight, (int, float)) and 0 < weight < 1e30:
            rows.append((prefix, weight))
    total = sum(weight for _, weight in rows)
    names = corpus_names([prefix for prefix, _ in rows])
    return [(name, weight / total) for name, (_, weight) in zip(names, rows, strict=True)]


def _events(path: Path, places: Places, notes: list[str]) -> list[dict[str, Any]]:
    """Returns the events of a run, without those that metrics.jsonl also records; adds notes on rows that are left out."""
    try:
        if not optional_file(path):
            return []
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {reason(error)}")
        return []
    left_out, marks = LeftOut(path.name), Marks()
    for _, record in read_rows(path, left_out):
        if record.get("type") in ("start", "switch", "save") or record.get("reason") == "done":
            continue  # metrics.jsonl records these, too
        step, tokens, time = (record.get(name) for name in ("step", "tokens", "time"))
        rest = {name: value for name, value in record.items() if name not in ("type", "time", "step")}
        text = record.get("message") or record.get("reason") or ", ".join(f"{name} {value}" for name, value in rest.items())
        marks.add(
            {
                "step": step if type(step) is int and 0 <= step < 1 << 62 else 0,
                "tokens": tokens if type(tokens) is int and 0 <= tokens < 1 << 62 else 0,
                "time": time if isinstance(time, (int, float)) and 0 <= time < 1e11 else None,
                "name": str(record.get("type") or "event")[:_LONGEST_TEXT],
                "text": without_credentials(str(text))[:_LONGEST_TEXT],
            }
        )
    notes += left_out.notes()
    return [{**places.locate(event), **{key: event[key] for key in ("time", "name", "text")}} for event in marks.shown("events", notes)]


def differing_options(histories: Sequence[History]) -> list[tuple[str, list[Any]]]:
    """Returns (name, value in each run) of every option that differs between runs; for one run, of every option that was given.

    The value is None in a run whose configuration is unknown. Options that name folders or experiments are excluded.
    """
    known = [history for history in histories if history.options]
    names = dict.fromkeys(name for history in known for name in history.options)
    rows = []
    for name in names:
        if name in ("save", "load", "local_rank", "wandb_exp_name", "mlflow_run_name", "tensorboard_dir", "prometheus_file"):
            continue
        values = [history.options.get(name) for history in histories]
        distinct = {json.dumps(history.options.get(name), sort_keys=True) for history in known}
        if len(distinct) > 1 or (len(histories) == 1 and name in histories[0].given):
            rows.append((name, values))
    return rows
