"""Reports what is in a run's checkpoints and whether they are valid, as plain values for a table or a JSON line.

In: a run's folder, or one of its step-N folders. Out: one dictionary per checkpoint. Nothing is changed and no lock is taken.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_patch.checkpoint.commit import MANIFEST, list_checkpoints, read_manifest, read_state, step_of, verify
from megatron_patch.errors import CheckpointError


def checkpoint_folders(path: Path) -> list[Path]:
    """Returns the checkpoints of a run's folder, newest first; for the folder of a checkpoint, only that folder.

    Raises:
        CheckpointError: there is no checkpoint, or the folder cannot be read.
    """
    try:
        folders = [path] if (path / MANIFEST).is_file() or step_of(path) is not None else list_checkpoints(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", "a folder that this user can read", "check the path") from error
    if not folders or not path.is_dir():
        raise CheckpointError(f"{path} contains no checkpoint", "a run's folder, or one of its step-N folders", "check the path")
    return folders


def describe(folder: Path, full: bool = False) -> dict[str, Any]:
    """Returns one checkpoint's summary.

    Args:
        folder: the folder of the checkpoint.
        full: compare checksums, which reads all data; else only sizes.

    Returns:
        folder, step, stage, patch_size, tokens, bytes, files, checked ("checksums" or "sizes"), valid (true if there are no problems) and
        problems. Values that cannot be read are None.
    """
    problems = verify(folder, full=full)
    line: dict[str, Any] = {"folder": str(folder), "step": step_of(folder), "stage": None, "patch_size": None, "tokens": None}
    line |= {"bytes": None, "files": None}
    try:
        entries = read_manifest(folder)
        line.update(bytes=sum(entry.size for entry in entries.values()), files=len(entries))
    except CheckpointError:
        pass
    try:
        state = read_state(folder)
        line.update(step=state.step, stage=state.stage_name, tokens=state.consumed_tokens)
        line["patch_size"] = _stage(state.plan, state.stage_index).get("patch_size")
    except CheckpointError as error:
        problems = problems or [error.what]
    return {**line, "checked": "checksums" if full else "sizes", "valid": not problems, "problems": problems}


def _stage(plan: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    stages = plan.get("stages")
    stage = stages[index] if isinstance(stages, list) and index < len(stages) else {}
    return stage if isinstance(stage, dict) else {}


def explain(folder: Path) -> dict[str, Any]:
    """Returns the settings of the run that wrote a checkpoint: model, layout, precision, stages, data, and the options that were given.

    Raises:
        CheckpointError: the trainer state cannot be read.
    """
    state = read_state(folder)
    layout = ("world_size", "tensor_parallel_size", "pipeline_parallel_size", "zero_stage", "precision")
    keys = ("name", "patch_size", "positions", "global_batch_size", "micro_batch_size", "steps", "optimizer", "lr_policy")
    stages = state.plan.get("stages")
    options, origins = state.config.get("options"), state.config.get("origins")
    given = origins if isinstance(origins, dict) and isinstance(options, dict) else {}
    return {
        "model": dict(state.model),
        "written_under": {name: state.engine.get(name) for name in layout if name in state.engine},
        "stages": [{key: stage.get(key) for key in keys if key in stage} for stage in stages or () if isinstance(stage, dict)]
        if isinstance(stages, list)
        else [],
        "stage_step": state.stage_step,
        "data": dict(state.data_fingerprint),
        "given_options": {name: options.get(name) for name in sorted(given) if name in options} if isinstance(options, dict) else {},
        "weights_only": state.weights_only,
    }


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns nested values as dotted names with short texts, for a table."""
    lines: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            lines |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for number, item in enumerate(value):
                lines[f"{prefix}{name}.{number}"] = " ".join(f"{key}={item[key]}" for key in item)
        else:
            lines[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value)
    return lines
