"""Losses of a model on data or text, and scores of tasks, as `megatron-patch evaluate` computes them.

In: a checkpoint or a loaded model. Out: a dictionary.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_patch.api.datasets import Paths, as_paths
from megatron_patch.api.language_model import LanguageModel, load_model
from megatron_patch.errors import ConfigError

_OF_THE_MODEL = {
    "bf16": "…, dtype=torch.bfloat16",
    "load": "CHECKPOINT",
    "tokenizer_type": "…, tokenizer_type=…",
    "tokenizer_model": "…, tokenizer_model=…",
    "tensor_model_parallel_size": "…), which holds all of it on one device",
    "pipeline_model_parallel_size": "…), which holds all of it on one device",
}


def evaluate(
    model: LanguageModel | str | os.PathLike[str],
    *,
    data_path: Paths | Sequence[str | float] | None = None,
    text: Paths | None = None,
    texts: Iterable[str] | None = None,
    tasks: str | Sequence[str] | None = None,
    patch_size: int = 1,
    **settings: Any,
) -> dict[str, Any]:
    """Evaluates a model on one kind of input.

    Args:
        model: a loaded model, or what `load_model` takes.
        data_path: dataset prefixes, or a weight before each: `[0.7, "web", 0.3, "code"]`.
        text: text files: .txt (one document), .jsonl, .parquet.
        texts: documents.
        tasks: names of tasks of lm-evaluation-harness.
        patch_size: K; 1 measures the token loss.
        settings: other flags of `megatron-patch evaluate` by their names with underscores: `seq_length`, `micro_batch_size`, `eval_tokens`,
            `overlap`, `num_fewshot` and others.

    Returns:
        The checkpoint and its step, and for data and text: `loss` in nats per token (also as `token_loss` at K = 1, else `patch_loss`),
        `perplexity`, `tokens`; for text also `bits_per_byte` and perplexities per byte and word; for tasks `tasks`.

    Raises:
        ConfigError: no or several kinds of input, or a setting that is unknown or not possible.
        DataError: the data or the tokenizer cannot be read, or is too short.
        CheckpointError: the checkpoint cannot be loaded.
    """
    from megatron_patch.cli import evaluate as tool

    given = {"data_path": data_path, "text": text, "texts": texts, "tasks": tasks}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ConfigError(f"evaluate of {' and '.join(named) or 'nothing'}", f"one of {', '.join(given)}", "give one of them")
    if isinstance(texts, str):
        raise ConfigError("texts is one text", "a list of texts", "write texts=[…]")
    for name in settings:
        if name in ("help", "h"):
            raise ConfigError(f"evaluate: unknown setting {name}", "flags of megatron-patch evaluate", f"remove {name}")
        if name in _OF_THE_MODEL:
            raise ConfigError(
                f"evaluate: {name} belongs to the model",
                "settings of the evaluation",
                f"load the model with load_model({_OF_THE_MODEL[name]})",
            )
    loaded = model if isinstance(model, LanguageModel) else load_model(model)
    words = ["--load", str(loaded.checkpoint), "--patch-size", str(patch_size), *loaded.tokenizer_flags]
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [] if value in (None, False) else [flag, str(value)]
    with contextlib.ExitStack() as stack:
        if texts is not None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            words += ["--text", _write(texts, Path(folder) / "texts.jsonl"), "--json-key", "text"]
        elif text is not None:
            words += ["--text", *as_paths(text)]
        elif data_path is not None:
            parts = [data_path] if isinstance(data_path, (str, os.PathLike)) else data_path
            words += ["--data-path", *(os.fspath(part) if isinstance(part, os.PathLike) else str(part) for part in parts)]
        elif tasks is not None:
            words += ["--tasks", tasks if isinstance(tasks, str) else ",".join(tasks)]
        result = tool.evaluate(tool.arguments().parse_args(words), loaded.loaded)
    if texts is not None:
        del result["text"]
    return result


def _write(texts: Iterable[str], path: Path) -> str:
    """Writes documents as lines of JSON, and returns the path."""
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")
    return str(path)
