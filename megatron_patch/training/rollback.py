"""Takes a run's folder back to the step that the run resumes from: later records are dropped, because they will be written again.

In: the folder and the progress to resume at. Out: metrics.jsonl, samples.jsonl and spans/rank-*.jsonl with each record once. Rank 0 does
this for the files of all ranks, also of ranks that the run no longer has. events.jsonl is a log and keeps everything.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from megatron_patch.errors import CheckpointError
from megatron_patch.stages import Progress
from megatron_patch.utils.files import LONGEST_LINE, bounded_lines, open_in_place, open_new, reason


def roll_back(folder: Path, step: int, progress: Progress) -> int | None:
    """Drops what the folder holds of steps after `step`, and returns the step of the last evaluation that is left, or None.

    Args:
        folder: the run's folder; files that do not exist are left out.
        step: the step that the run resumes from; 0 for a new run.
        progress: the same as progress. At the end of a stage its evaluation is kept, and the switch that follows is not.

    Raises:
        CheckpointError: a file cannot be read, or its replacement cannot be written.
    """
    evaluated: int | None = None

    def keep(record: dict[str, Any]) -> bool:
        nonlocal evaluated
        kind, at = record.get("type"), record.get("step", 0)
        if kind == "start":
            return True
        if not isinstance(at, int) or at > step or (kind == "switch" and at == step and progress.stage_step > 0):
            return False
        if kind == "evaluation":
            evaluated = at
        return True

    for path in [folder / "samples.jsonl", *sorted((folder / "spans").glob("rank-*.jsonl"))]:
        _filter(path, keep)
    evaluated = None
    _filter(folder / "metrics.jsonl", keep)
    return evaluated


def _filter(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drops the records of a file of JSON lines that are not to be kept, and lines that a kill left incomplete; replaces it atomically."""
    if not path.exists():
        return
    temporary = path.with_name(path.name + ".partial")
    try:
        with open_in_place(path, "rb") as source, open_new(temporary) as target:
            for line in bounded_lines(source, LONGEST_LINE):
                if line is None:
                    continue
                try:
                    record = orjson.loads(line)
                except orjson.JSONDecodeError:
                    continue
                if isinstance(record, dict) and keep(record):
                    target.write(line if line.endswith(b"\n") else line + b"\n")
            target.flush()
            os.fsync(target.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(
            f"cannot rewrite {path}: {reason(error)}",
            "a file of whole lines in a folder with free space",
            "free space, or repair the file; then restart the run",
        ) from error
