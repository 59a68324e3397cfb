"""Tasks of EleutherAI's lm-evaluation-harness on our model, with task data from a local folder where there is no network.

In: names of tasks, and a folder with one sub-folder a data set, named as the hub names it (Rowan/hellaswag). Out: the harness' results.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_patch.errors import ConfigError, DataError
from megatron_patch.model.inference_model import InferenceModel
from megatron_patch.parallel.groups import SINGLE_REPLICA, Replicas
from megatron_patch.tokenizers.base import Tokenizer


def local_data(folder: Path | None, path: str, name: str | None) -> tuple[str, str | None] | None:
    """Where a hub data set is on this machine.

    Args:
        folder: with the data sets, or None.
        path: as the hub names it.
        name: of its configuration.

    Returns:
        (folder, configuration) for `load_dataset`, or None where it is not there: FOLDER/PATH/NAME if there is one, else FOLDER/PATH, which
        is a copy of the hub's repository, or holds files named by split (test.jsonl, validation.parquet).
    """
    if folder is None:
        return None
    whole = folder / path
    if name is not None and (whole / name).is_dir():
        return str(whole / name), None
    if not whole.is_dir():
        return None
    has_configurations = (whole / "README.md").is_file()
    return str(whole), name if has_configurations else None


@contextlib.contextmanager
def _data_from(folder: Path | None) -> Iterator[None]:
    """All task data goes through `datasets.load_dataset`: it looks into the folder first, and tells what is missing."""
    import datasets

    original = datasets.load_dataset

    def load(path: str, name: str | None = None, **options: Any) -> Any:
        found = local_data(folder, path, name)
        try:
            return original(*found, **options) if found else original(path, name, **options)
        except Exception as error:
            where = f"in {found[0]}" if found else f"{folder / path if folder else 'a local folder'}, nor reached on the hub"
            raise DataError(
                f"task data {path}{f' ({name})' if name else ''} cannot be read {where}: {type(error).__name__}: {str(error)[:200]}",
                f"--task-data FOLDER with FOLDER/{path}: a copy of the data set's repository, or a file a split, named by it",
                f"fetch it where there is a network: hf download {path} --repo-type dataset --local-dir FOLDER/{path}",
            ) from error

    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = original


def run_tasks(
    model: InferenceModel,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    max_length: int,
    batch: int,
    data: Path | None = None,
    task_path: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    replicas: Replicas = SINGLE_REPLICA,
) -> dict[str, Any]:
    """Runs tasks.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        tasks: names.
        max_length: positions of a request.
        batch: requests of one forward pass.
        data: folder with data sets; see `local_data`.
        task_path: folder with more tasks as YAML files.
        shots: examples before each question; None: the task's own number.
        limit: documents of each task; None: all.
        copies: ranks that share out the requests.

    Returns:
        Task -> metric -> value.

    Raises:
        ConfigError: the harness is not installed, or a task is unknown.
        DataError: a task's data is not here, or a tokenizer without an end of document.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from megatron_patch.evaluation.harness_model import HarnessModel
    except ImportError as error:
        raise ConfigError("--tasks without lm-eval", "the extra [eval]", "pip install 'megatron_patch[eval]'") from error
    if tokenizer.eod_id is None:
        raise DataError(f"tokenizer {tokenizer.name} has no end of document", "a tokenizer with one", "give --tokenizer-model")
    for folder, flag in ((data, "--task-data"), (task_path, "--task-path")):
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"{flag} {folder} is no folder", "a folder", "check the path")
    manager = TaskManager(include_path=str(task_path) if task_path else None)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError(
            f"unknown tasks: {', '.join(unknown)}", "tasks of lm-eval (lm-eval ls tasks)", "check their names, or give --task-path"
        )
    with _data_from(data):
        result = simple_evaluate(
            HarnessModel(model, tokenizer, max_length, batch, replicas),
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=0,
        )
    assert result is not None
    return {task: _numbers(values) for task, values in result["results"].items()}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """The harness' metrics without its filters' names where there is no filter, and without what is no number."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and "stderr" not in name and name != "sample_len"
    }
