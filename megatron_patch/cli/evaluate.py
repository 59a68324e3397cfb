"""Evaluates a checkpoint and prints the results as one line of JSON.

What it reads and how far it is goes to standard error.

On a tokenized dataset:
  python tools/evaluate.py --load CKPT --data-path PREFIX [--patch-size K]
On several datasets, with the loss of each and their weighted sum:
  python tools/evaluate.py --load CKPT --data-path 0.7 WEB 0.3 CODE
On raw text, per token, byte and word:
  python tools/evaluate.py --load CKPT --text FILE … [--patch-size K]
On tasks of lm-evaluation-harness:
  python tools/evaluate.py --load CKPT --tasks hellaswag,arc_easy
On several GPUs, independent of the layout that wrote the checkpoint:
  deepspeed tools/evaluate.py --tensor-model-parallel-size 8 …
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_patch.cli.command_line import ArgumentParser, add_layout, count, count_from_one
from megatron_patch.cli.evaluation_progress import EvaluationProgress
from megatron_patch.config.stage_spec import has_weights, parse_blend
from megatron_patch.data.collate import DocumentMasking
from megatron_patch.data.corpus import TokenCorpus, check_vocabulary, open_corpus
from megatron_patch.data.corpus_names import corpus_names
from megatron_patch.data.evaluation_data import evaluation_batches, held_out_starts, shares
from megatron_patch.engine.environment import is_first_rank
from megatron_patch.engine.inference import LoadedModel, open_model
from megatron_patch.errors import ConfigError, DataError
from megatron_patch.evaluation.harness import run_tasks
from megatron_patch.evaluation.text import read_documents, score_text
from megatron_patch.evaluation.wikitext import detokenize
from megatron_patch.model.inference_model import InferenceModel
from megatron_patch.raw_text.inputs import expand, inner_suffix, is_compressed
from megatron_patch.tokenizers.base import Tokenizer, tokenizer_of_checkpoint
from megatron_patch.utils.units import format_count, parse_count, plural


def arguments() -> ArgumentParser:
    """Returns the parser of the tool."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--load", required=True, help="folder of a run, or one of its step-N folders")
    source = parser.add_argument_group("data (one of)").add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data-path",
        nargs="+",
        metavar="PREFIX",
        help="tokenized datasets: one or more prefixes, or a weight before each: 0.7 web 0.3 code",
    )
    source.add_argument("--text", nargs="+", help="text files: .txt (one document), .jsonl or .parquet, also compressed")
    source.add_argument("--tasks", help="names of tasks, separated by commas")
    parser.add_argument("--patch-size", type=count_from_one, default=1, help="K; 1 measures the token loss (default: 1)")
    parser.add_argument("--seq-length", type=count_from_one, help="positions per sample or window (default: that of the run)")
    parser.add_argument("--micro-batch-size", type=count_from_one, default=8, help="samples per forward pass (default: 8)")
    parser.add_argument("--bf16", action="store_true", help="evaluate in bfloat16")
    parser.add_argument("--tokenizer-type", help="type of the tokenizer (default: that of the training data)")
    parser.add_argument("--tokenizer-model", help="file or folder of the tokenizer (default: that of the training data)")
    add_layout(parser)
    tokens = parser.add_argument_group("tokens")
    tokens.add_argument("--eval-tokens", default="all", help="number of tokens to read, divided equally among the datasets (default: all)")
    text = parser.add_argument_group("text")
    text.add_argument("--json-key", default="text", help="key of the text in .jsonl files (default: text)")
    text.add_argument(
        "--overlap", type=count, default=0, help="positions that a window shares with the previous one as context (default: 0)"
    )
    text.add_argument("--detokenize", choices=["wikitext"], help="remove WikiText's extra spaces before the model reads the text")
    text.add_argument(
        "--words",
        type=count_from_one,
        help="number of words of the original text, if the given text has been detokenized (default: words separated by whitespace)",
    )
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--task-data", type=Path, help="folder with the datasets of the tasks, named as on the hub")
    tasks.add_argument("--task-path", type=Path, help="folder with further tasks as YAML files")
    tasks.add_argument("--num-fewshot", type=count, help="examples before each question (default: that of the task)")
    tasks.add_argument("--limit", type=count, help="documents per task (default: all)")
    return parser


def main(argv: list[str]) -> None:
    """Runs the tool.

    Raises:
        ConfigError: a flag is wrong, or flags contradict each other.
        DataError: the data or the tokenizer cannot be read.
    """
    args = arguments().parse_args(argv)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    with open_model(args.load, dtype, args.tensor_model_parallel_size, args.pipeline_model_parallel_size) as loaded:
        result = evaluate(args, loaded)
    if is_first_rank():
        print(json.dumps(result))


def evaluate(args: argparse.Namespace, loaded: LoadedModel[InferenceModel]) -> dict[str, Any]:
    """Returns what the tool prints.

    Args:
        args: the parsed arguments.
        loaded: the model.

    Raises:
        ConfigError: flags contradict each other, or the model.
        DataError: the data or the tokenizer cannot be read.
    """
    if args.tasks is not None and args.patch_size != 1:
        raise ConfigError(
            f"--tasks with --patch-size {args.patch_size}", "1, because tasks are scored token by token", "remove --patch-size"
        )
    shape = loaded.model.shape
    positions = args.seq_length or int(loaded.options["seq_length"])
    if shape.position_embedding == "learned" and positions > shape.max_positions:
        raise ConfigError(
            f"--seq-length {positions}", f"1 to {shape.max_positions}, the learned positions of the model", "lower --seq-length"
        )
    result = {"checkpoint": str(loaded.checkpoint.folder), "step": loaded.checkpoint.state.step, "seq_length": positions}
    if args.tasks is not None:
        return result | _tasks(args, loaded, positions)
    return result | (_text(args, loaded, positions) if args.text is not None else _tokens(args, loaded, positions))


def _tokenizer(args: argparse.Namespace, loaded: LoadedModel[InferenceModel]) -> Tokenizer:
    return tokenizer_of_checkpoint(loaded.data_metadata or {}, args.tokenizer_type, args.tokenizer_model, loaded.model.shape.vocab_size)


def _loss_name(patch_size: int) -> str:
    return "token_loss" if patch_size == 1 else "patch_loss"


def _tasks(args: argparse.Namespace, loaded: LoadedModel[InferenceModel], positions: int) -> dict[str, Any]:
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    results = run_tasks(
        loaded.model,
        _tokenizer(args, loaded),
        names,
        positions,
        args.micro_batch_size,
        args.task_data,
        args.task_path,
        args.num_fewshot,
        args.limit,
        loaded.replicas,
    )
    return {"tasks": results}


def _text(args: argparse.Namespace, loaded: LoadedModel[InferenceModel], positions: int) -> dict[str, Any]:
    if not 0 <= args.overlap < positions:
        raise ConfigError(f"--overlap {args.overlap} with windows of {positions} positions", f"0 to {positions - 1}", "lower --overlap")
    documents = read_documents(args.text, args.json_key)
    rewrite = detokenize if args.detokenize == "wikitext" else str
    settings = (positions, args.patch_size, args.overlap, args.micro_batch_size)
    tokenizer, size = _tokenizer(args, loaded), _size(args.text)
    progress = EvaluationProgress(size, is_first_rank())
    progress.begin(f"evaluating {'text' if size is None else f'{size / 1e6:,.1f} MB of text'} at {_at(args, positions)}")
    score = score_text(loaded.model, tokenizer, documents, *settings, loaded.replicas, rewrite, progress.add)
    words = args.words or score.words
    return {
        "text": args.text,
        "patch_size": args.patch_size,
        _loss_name(args.patch_size): score.loss(),
        "loss": score.loss(),
        "perplexity": score.perplexity(score.tokens),
        "byte_perplexity": score.perplexity(score.bytes),
        "bits_per_byte": score.bits_per_byte(),
        "word_perplexity": score.perplexity(words),
        "word_perplexity_with_line_ends": score.perplexity(words + score.lines),
        "tokens": score.tokens,
        "bytes": score.bytes,
        "words": words,
        "lines": score.lines,
        "documents": score.documents,
        "overlap": args.overlap,
        "detokenize": args.detokenize,
    }


def _size(inputs: Sequence[str]) -> int | None:
    """Returns the bytes of text files, or None if some are compressed or tables, whose text is longer."""
    files = expand(inputs)
    if any(inner_suffix(file) == ".parquet" or is_compressed(file) or not Path(file).is_file() for file in files):
        return None
    return sum(Path(file).stat().st_size for file in files)


def _at(args: argparse.Namespace, positions: int) -> str:
    return f"K = {args.patch_size}, {plural(positions, 'position')} a sample, {plural(args.micro_batch_size, 'sample')} a batch"


def _tokens(args: argparse.Namespace, loaded: LoadedModel[InferenceModel], positions: int) -> dict[str, Any]:
    blend = parse_blend(args.data_path)
    words = [word for word, _ in blend]
    corpora = [open_corpus(word) for word in words]
    tokens = None if args.eval_tokens == "all" else parse_count(args.eval_tokens) // len(corpora)
    starts = [_starts(args, loaded, positions, word, corpus, tokens) for word, corpus in zip(words, corpora, strict=True)]
    total = sum(len(part) for part in starts) * positions * args.patch_size
    progress = EvaluationProgress(total, is_first_rank())
    names = f" of {plural(len(corpora), 'dataset')}" if len(corpora) > 1 else ""
    progress.begin(f"evaluating {format_count(total)} tokens{names} at {_at(args, positions)}")
    sums = [_loss_sum(args, loaded, positions, progress, *pair) for pair in zip(corpora, starts, strict=True)]
    labels = sum(count for _, count in sums)
    result = {"data_path": " ".join(args.data_path), "patch_size": args.patch_size}
    if len(corpora) == 1:
        return result | _loss(args.patch_size, sums[0][0] / labels, labels)
    weights = shares([weight if has_weights(args.data_path) else None for _, weight in blend], [count for _, count in sums])
    parts = {
        name: {"data_path": word, "weight": weight, **_loss(args.patch_size, loss_sum / count, count)}
        for name, word, weight, (loss_sum, count) in zip(corpus_names(words), words, weights, sums, strict=True)
    }
    return result | _loss(args.patch_size, sum(part["weight"] * part["loss"] for part in parts.values()), labels) | {"corpora": parts}


def _loss(patch_size: int, loss: float, labels: int) -> dict[str, Any]:
    return {_loss_name(patch_size): loss, "loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": labels}


def _starts(
    args: argparse.Namespace, loaded: LoadedModel[InferenceModel], positions: int, word: str, corpus: TokenCorpus, tokens: int | None
) -> npt.NDArray[np.int64]:
    """Returns the first token of each sample that is read of a corpus, at most `tokens` tokens or all of it."""
    check_vocabulary(corpus, loaded.model.shape.vocab_size)
    unit = positions * args.patch_size
    wanted = corpus.num_tokens if tokens is None else tokens
    starts = held_out_starts((0, corpus.num_tokens), unit, args.patch_size, wanted)
    if len(starts) == 0:
        raise DataError(
            f"{word} has {plural(corpus.num_tokens, 'token')}, but one sample needs {unit + args.patch_size:,}",
            "at least one sample",
            "lower --seq-length or --patch-size",
        )
    return starts


def _loss_sum(
    args: argparse.Namespace,
    loaded: LoadedModel[InferenceModel],
    positions: int,
    progress: EvaluationProgress,
    corpus: TokenCorpus,
    starts: npt.NDArray[np.int64],
) -> tuple[float, int]:
    """Returns the sum of the losses of the samples of a corpus over all ranks, and the number of scored labels."""
    model, replicas = loaded.model, loaded.replicas
    totals = torch.zeros(2, dtype=torch.float64, device=model.device)
    settings = (positions, args.patch_size, args.micro_batch_size, replicas.rank, replicas.size, DocumentMasking(), model.shape.vocab_size)
    with torch.no_grad():
        for batch in evaluation_batches(corpus, starts, positions * args.patch_size, *settings):
            sums = model(batch.input_ids.to(model.device), batch.labels.to(model.device))
            totals += torch.stack([part.double() for part in sums])
            progress.add(batch.input_ids.numel() * replicas.size)
    loss_sum, labels = replicas.sum(totals).tolist()
    return loss_sum, int(labels)
