"""Builds the engine of a run: this rank's layers, inside the engine that the parallel layout needs, with their first weights.

In: a run and where it starts. Out: an `Engine` whose weights are initialized or loaded from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from megatron_patch.config.resolve import RunConfig
from megatron_patch.engine.data_parallel import DataParallelEngine
from megatron_patch.engine.deepspeed_config import EngineConfig
from megatron_patch.engine.deepspeed_engine import ModelSource
from megatron_patch.engine.interface import Engine
from megatron_patch.errors import ConfigError
from megatron_patch.model.gpt import GPTModel
from megatron_patch.model.own_model import build_own_model
from megatron_patch.parallel.groups import Groups
from megatron_patch.training.compile_cache import require_own_compile_cache
from megatron_patch.training.faults.interruptible_compile import interruptible
from megatron_patch.training.resume import StartPoint


def build_engine(
    run: RunConfig,
    engine_config: EngineConfig,
    start: StartPoint,
    groups: Groups,
    device: torch.device,
    stop_signalled: Callable[[], bool] = lambda: False,
) -> Engine:
    """Returns the engine that the run starts with.

    Args:
        run: the model, the layout and the optimizer.
        engine_config: DeepSpeed's part of the run.
        start: the stage to start in and the checkpoint to load, if any.
        groups: this rank's coordinates and process groups.
        device: the device of this rank.
        stop_signalled: whether this rank has received a signal to stop; compilers may fail then.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
    """
    engine = _make_engine(run, engine_config, start, groups, device, stop_signalled)
    if start.checkpoint is not None:
        engine.load(start.checkpoint.folder, start.resumed.engine if start.resumed is not None else None)
    return engine


def _make_engine(
    run: RunConfig,
    engine_config: EngineConfig,
    start: StartPoint,
    groups: Groups,
    device: torch.device,
    stop_signalled: Callable[[], bool],
) -> Engine:
    options, grid = run.options.engine, groups.grid
    boundaries = run.pipeline_boundaries
    layers = range(boundaries[grid.pipeline_parallel_rank], boundaries[grid.pipeline_parallel_rank + 1])

    parallel = groups.tensor_parallel(options.sequence_parallel)

    def build() -> nn.Module:
        model: nn.Module
        if run.own_model is not None:
            model = build_own_model(run.own_model, run.shape, parallel, engine_config.zero_level)
        else:
            model = GPTModel(run.shape, options.recompute_granularity, options.operators, parallel, layers, groups.experts)
        if options.compile:
            require_own_compile_cache()
            if not isinstance(model, GPTModel):
                raise ConfigError(
                    f"--compile with model={run.own_model.name if run.own_model else ''}, which is no GPTModel",
                    "--compile with GPTModel or a subclass of it, whose blocks are compiled one by one",
                    "remove --compile, and call torch.compile on parts of the model in the function that builds it",
                )
            model.compile_blocks(interruptible(stop_signalled))
        return model

    # Without a seed weights are not initialized: a checkpoint is loaded into them.
    seed = options.seed if start.checkpoint is None else None
    source = ModelSource(build, run.shape, parallel, seed, has_buffers=run.own_model is not None)
    if grid.pipeline_parallel_size == 1:
        return DataParallelEngine(source, engine_config, run.options.schedule, start.stage, groups, device)
    # DeepSpeed's pipeline module takes seconds to import and probes for an accelerator.
    from megatron_patch.engine.pipeline_parallel import PipelineParallelEngine

    return PipelineParallelEngine(boundaries, source, engine_config, run.options.schedule, start.stage, groups, device)
