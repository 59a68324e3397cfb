"""Listeners of a run, one file each: console, metrics, spans, tensorboard, wandb."""

from __future__ import annotations

from pathlib import Path

from megatron_patch.config.resolve import RunConfig
from megatron_patch.training.callbacks.base import Callback
from megatron_patch.training.callbacks.console import Console
from megatron_patch.training.callbacks.metrics import Metrics
from megatron_patch.training.callbacks.spans import SpanLog
from megatron_patch.training.callbacks.tensorboard import TensorBoard
from megatron_patch.training.callbacks.wandb import WeightsAndBiases


def make_callbacks(run: RunConfig, save: Path | None, rank: int) -> list[Callback]:
    """The listeners that a run asks for; all but the span log live on rank 0."""
    logging = run.options.logging
    callbacks: list[Callback] = []
    if rank == 0:
        callbacks.append(Console(logging.log_interval))
        if save is not None:
            callbacks.append(Metrics(save / "metrics.jsonl"))
        if logging.tensorboard_dir is not None:
            callbacks.append(TensorBoard(logging.tensorboard_dir))
        if logging.wandb_project is not None:
            callbacks.append(WeightsAndBiases(logging.wandb_project, logging.wandb_exp_name, save, run.to_json()["options"]))
    if logging.log_token_spans and save is not None:
        callbacks.append(SpanLog(save / "spans", rank))
    return callbacks
