"""Callbacks of a run, one file each: console, metrics, events, charts (of TensorBoard, W&B, MLflow, Prometheus), samples, spans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_patch.config.resolve import RunConfig
from megatron_patch.model.generate import Sampling
from megatron_patch.training.callbacks.base import Callback, CallbackContext, CallbackFactory
from megatron_patch.training.callbacks.charts import Charts
from megatron_patch.training.callbacks.console import Console
from megatron_patch.training.callbacks.delivery import Service
from megatron_patch.training.callbacks.events import Events
from megatron_patch.training.callbacks.metrics import Metrics
from megatron_patch.training.callbacks.mlflow import MLflow
from megatron_patch.training.callbacks.profiler import NsightRange, Profiler, TorchTrace
from megatron_patch.training.callbacks.prometheus import PrometheusFile, PrometheusPort
from megatron_patch.training.callbacks.samples import SampleRequest, Samples
from megatron_patch.training.callbacks.spans import SpanLog
from megatron_patch.training.callbacks.tensorboard import TensorBoard
from megatron_patch.training.callbacks.wandb import WeightsAndBiases
from megatron_patch.training.next_steps import next_steps
from megatron_patch.training.pauses import Pauses
from megatron_patch.utils.units import parse_steps


def make_callbacks(context: CallbackContext, factories: Sequence[CallbackFactory] = ()) -> list[Callback]:
    """Returns this rank's callbacks: those that the run's options request, then those that the factories make.

    Of the former, only `Samples`, `SpanLog` and `Profiler` exist on ranks other than 0.

    Args:
        context: the run and this rank.
        factories: makers of further callbacks, called on every rank in this order.
    """
    run, save, grid, tokenizer = context.run, context.save, context.grid, context.tokenizer
    logging = run.options.logging
    callbacks: list[Callback] = []
    first = grid.rank == 0
    console = Console(logging.log_interval, Pauses(run.plan, run.options), next_steps(run)) if first else None
    if console is not None:
        callbacks.append(console)
        if save is not None:
            callbacks += [Metrics(save / "metrics.jsonl"), Events(save / "events.jsonl")]
        kept = save / "metrics.jsonl" if save is not None else None
        callbacks += [Charts(service, kept) for service in _services(run, save)]
    if tokenizer is not None:
        sampling = Sampling(logging.sample_temperature, logging.sample_top_p, seed=run.options.engine.seed)
        learned_positions = run.shape.learned_positions
        request = SampleRequest(logging.sample_prompts, logging.sample_tokens, sampling, learned_positions)
        path = save / "samples.jsonl" if save is not None else None
        show = console.show_samples if console is not None else None
        callbacks.append(Samples(context.logits, tokenizer, request, context.device, path, show))
    first_of_replica = grid.tensor_parallel_rank == grid.pipeline_parallel_rank == 0
    if logging.log_token_spans and save is not None and first_of_replica:
        callbacks.append(SpanLog(save / "spans", grid.rank, grid.data_parallel_rank))
    if logging.profile is not None and grid.rank in logging.profile_ranks:
        first_step, last_step = parse_steps(logging.profile, "--profile")
        tool: TorchTrace | NsightRange = NsightRange(logging.profile_shapes)
        if not logging.profile_nsys and save is not None:
            tool = TorchTrace(save / "profile", grid.rank, context.device, logging.profile_shapes)
        callbacks.append(Profiler(tool, first_step, last_step, speaks=first))
    for make_callback in factories:
        try:
            callbacks.append(make_callback(context))
        except BaseException:
            for callback in callbacks:
                callback.close()
            raise
    return callbacks


def _services(run: RunConfig, save: Path | None) -> Iterator[Service]:
    """Yields the services that the run's options request."""
    logging, options = run.options.logging, run.to_json()["options"]
    name = save.resolve().name if save is not None else ""
    if logging.tensorboard_dir is not None:
        yield TensorBoard(logging.tensorboard_dir)
    if logging.wandb_project is not None:
        yield WeightsAndBiases(logging.wandb_project, logging.wandb_exp_name, save, options)
    if logging.mlflow_experiment is not None:
        yield MLflow(logging.mlflow_experiment, logging.mlflow_tracking_uri, logging.mlflow_run_name or name or None, save, options)
    if logging.prometheus_file is not None:
        yield PrometheusFile(Path(logging.prometheus_file), name)
    if logging.prometheus_port is not None:
        yield PrometheusPort(logging.prometheus_port, logging.prometheus_address, name)
