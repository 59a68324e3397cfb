"""Listeners of a run, one file each: charts (TensorBoard, Weights & Biases), console, metrics, samples, spans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from megatron_patch.config.resolve import RunConfig
from megatron_patch.model.generate import Sampling
from megatron_patch.parallel.grid import Grid
from megatron_patch.tokenizers.base import Tokenizer
from megatron_patch.training.callbacks.base import Callback
from megatron_patch.training.callbacks.charts import Charts
from megatron_patch.training.callbacks.console import Console
from megatron_patch.training.callbacks.events import Events
from megatron_patch.training.callbacks.metrics import Metrics
from megatron_patch.training.callbacks.samples import SampleRequest, Samples
from megatron_patch.training.callbacks.spans import SpanLog
from megatron_patch.training.callbacks.tensorboard import TensorBoard
from megatron_patch.training.callbacks.wandb import WeightsAndBiases
from megatron_patch.utils.console import make_console


def make_callbacks(
    run: RunConfig,
    save: Path | None,
    grid: Grid,
    logits: Callable[[torch.Tensor], torch.Tensor],
    tokenizer: Tokenizer | None,
    device: torch.device,
) -> list[Callback]:
    """The listeners that a run asks for; all but samples and the span log live on rank 0.

    Args:
        run: the run.
        save: its folder.
        grid: this rank's place.
        logits: the engine's, for samples.
        tokenizer: for samples, where they are asked for.
        device: of this rank.
    """
    logging = run.options.logging
    callbacks: list[Callback] = []
    first = grid.rank == 0
    if first:
        callbacks.append(Console(logging.log_interval))
        if save is not None:
            callbacks += [Metrics(save / "metrics.jsonl"), Events(save / "events.jsonl")]
        if logging.tensorboard_dir is not None:
            callbacks.append(Charts(TensorBoard(logging.tensorboard_dir)))
        if logging.wandb_project is not None:
            shown = run.to_json()["options"]
            callbacks.append(Charts(WeightsAndBiases(logging.wandb_project, logging.wandb_exp_name, save, shown)))
    if tokenizer is not None:
        sampling = Sampling(logging.sample_temperature, logging.sample_top_p, seed=run.options.engine.seed)
        learned = run.shape.max_positions if run.shape.position_embedding == "learned" else None
        request = SampleRequest(logging.sample_prompts, logging.sample_tokens, sampling, learned)
        path = save / "samples.jsonl" if save is not None else None
        callbacks.append(Samples(logits, tokenizer, request, device, path, make_console() if first else None))
    reads_first = grid.tensor_parallel_rank == grid.pipeline_parallel_rank == 0
    if logging.log_token_spans and save is not None and reads_first:
        callbacks.append(SpanLog(save / "spans", grid.rank))
    return callbacks
