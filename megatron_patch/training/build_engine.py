"""From a run to its engine: this rank's part of the model with its initial weights, in the engine that its layout asks for."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_patch.config.resolve import RunConfig
from megatron_patch.engine.data_parallel import DataParallelEngine
from megatron_patch.engine.deepspeed_config import EngineConfig
from megatron_patch.engine.interface import Engine
from megatron_patch.model.gpt import GPTModel
from megatron_patch.parallel.groups import Groups
from megatron_patch.stages import Stage
from megatron_patch.training.faults.interruptible_compile import interruptible


def build_engine(
    run: RunConfig,
    settings: EngineConfig,
    stage: Stage,
    groups: Groups,
    device: torch.device,
    loading: bool,
    stopping: Callable[[], bool] = lambda: False,
) -> Engine:
    """Builds this rank's layers and the engine around them.

    Args:
        run: the model, the layout and the optimizer.
        settings: DeepSpeed's part of the run.
        stage: the stage to begin with.
        groups: this rank's place and process groups.
        device: this rank's device.
        loading: weights come from a checkpoint, and need no initial values.
        stopping: whether this rank has been sent a signal to stop.
    """
    options, grid = run.options.engine, groups.grid
    boundaries = run.pipeline_boundaries
    layers = range(boundaries[grid.pipeline_parallel_rank], boundaries[grid.pipeline_parallel_rank + 1])

    def build() -> GPTModel:
        parallel = groups.tensor_parallel(options.sequence_parallel)
        model = GPTModel(run.shape, options.recompute_granularity, options.operators, parallel, layers)
        if options.compile:
            model.compile_blocks(interruptible(stopping))
        return model

    seed = None if loading else options.seed
    if grid.pipeline_parallel_size == 1:
        return DataParallelEngine(build, seed, settings, run.options.schedule, stage, groups, device)
    # DeepSpeed takes seconds to import, and looks for an accelerator when it is.
    from megatron_patch.engine.pipeline_parallel import PipelineParallelEngine

    return PipelineParallelEngine(boundaries, build, seed, settings, run.options.schedule, stage, groups, device)
