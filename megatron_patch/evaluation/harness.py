"""Runs tasks of EleutherAI's lm-evaluation-harness, with task data from a local folder or from the Hugging Face hub.

In: names of tasks, and optionally a folder with one subfolder per dataset, named as on the hub (Rowan/hellaswag). Out: the results of the
harness.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_patch.errors import ConfigError, DataError
from megatron_patch.model.inference_model import InferenceModel
from megatron_patch.parallel.groups import SINGLE_REPLICA, Replicas
from megatron_patch.requirements import missing_package
from megatron_patch.tokenizers.base import Tokenizer


def find_local_dataset(folder: Path | None, path: str, name: str | None) -> tuple[str, str | None] | None:
    """Returns the arguments of `load_dataset` for a local copy of a hub dataset, or None without one.

    FOLDER/PATH/NAME is used if it exists, else FOLDER/PATH, which is a copy of the hub's repository or contains one file per split
    (test.jsonl, validation.parquet).

    Args:
        folder: folder with local datasets, or None.
        path: name of the dataset on the hub.
        name: name of its configuration, or None.

    Returns:
        (folder, configuration) for `load_dataset`, or None.
    """
    if folder is None:
        return None
    dataset = folder / path
    if name is not None and (dataset / name).is_dir():
        return str(dataset / name), None
    if not dataset.is_dir():
        return None
    has_configurations = (dataset / "README.md").is_file()
    return str(dataset), name if has_configurations else None


@contextlib.contextmanager
def _local_datasets_first(folder: Path | None) -> Iterator[None]:
    """Makes `datasets.load_dataset`, which loads all task data, look into the folder first and name what is missing."""
    import datasets

    original = datasets.load_dataset

    def load(path: str, name: str | None = None, **options: Any) -> Any:
        local = find_local_dataset(folder, path, name)
        try:
            return original(*local, **options) if local else original(path, name, **options)
        except Exception as error:
            source = local[0] if local else f"{folder / path} or from the hub" if folder else "the hub"
            raise DataError(
                f"cannot read task data {path}{f' ({name})' if name else ''} from {source}: {type(error).__name__}: {str(error)[:200]}",
                f"--task-data FOLDER with FOLDER/{path}: a copy of the dataset's repository, or one file per split, named after it",
                f"download it on a machine with a network: hf download {path} --repo-type dataset --local-dir FOLDER/{path}",
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
    """Runs tasks of the harness.

    Args:
        model: the model, in evaluation mode.
        tokenizer: tokenizer of the model.
        tasks: names of the tasks.
        max_length: longest request, in positions.
        batch: requests per forward pass.
        data: folder with local datasets, as `find_local_dataset` reads it.
        task_path: folder with further tasks as YAML files.
        shots: examples before each question; None uses the number of the task.
        limit: documents per task; None uses all.
        replicas: replicas of the model that divide the requests.

    Returns:
        Values by task and metric.

    Raises:
        ConfigError: the harness is not installed, a folder does not exist, or a task is unknown.
        DataError: the data of a task cannot be read, or the tokenizer has no end-of-document token.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from megatron_patch.evaluation.harness_model import HarnessModel
    except ImportError as error:
        raise missing_package("lm_eval", "--tasks") from error
    if tokenizer.eod_id is None:
        raise DataError(
            f"tokenizer {tokenizer.name} has no end-of-document token",
            "a tokenizer with such a token",
            "choose another one with --tokenizer-model",
        )
    for folder, flag in ((data, "--task-data"), (task_path, "--task-path")):
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"{flag} {folder} is not a folder", "an existing folder", "check the path")
    manager = TaskManager(include_path=str(task_path) if task_path else None)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError(
            f"--tasks {','.join(unknown)}: unknown to lm-eval",
            "names that `lm-eval ls tasks` lists",
            "check the names, or give --task-path",
        )
    with _local_datasets_first(data):
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
    """Returns the numeric metrics of a task without standard errors, and without the filter's name if it is "none"."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and "stderr" not in name and name != "sample_len"
    }
