"""Functions shared by the training benchmarks: random data, flags of a run with two stages, a run in this process, planned times.

These runs write no checkpoints. A benchmark measures with a `Callback`, or reads the metrics file of `_metrics_run.py`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import Timer, attention_ceiling, ceilings

from megatron_patch.config.resolve import RunConfig, load_config
from megatron_patch.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_patch.engine.deepspeed_config import EngineConfig, resolve_engine_config
from megatron_patch.engine.distributed import barrier, destroy_distributed, init_distributed
from megatron_patch.model.precision import DTYPES
from megatron_patch.planning.hardware import DEVICES, Hardware
from megatron_patch.planning.layout import Layout, layout_of
from megatron_patch.planning.memory import Memory, rank_memory
from megatron_patch.planning.timing import step_time
from megatron_patch.training.callbacks.base import Callback
from megatron_patch.training.faults.stop_requests import StopRequests
from megatron_patch.training.pretrain import make_watchdog
from megatron_patch.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
DOCUMENT = 1000


def write_corpus(prefix: Path, vocab: int, tokens: int) -> None:
    """Writes a dataset of at least `tokens` random ids, in documents of 1,000 tokens."""
    documents = -(-tokens // DOCUMENT)
    ids = np.random.default_rng(0).integers(0, vocab, documents * DOCUMENT, dtype=np.uint16)
    with IndexedDatasetWriter(str(prefix), np.dtype(np.uint16)) as writer:
        writer.append(ids, np.full(documents, DOCUMENT))
        writer.finish()


def stage_flags(prefix: Path, vocab: int, patch_sizes: Sequence[int], steps: int, samples: int, positions: int) -> list[str]:
    """Writes random data and returns the flags of a run over it, with the same positions per step in all stages.

    Args:
        prefix: prefix of the dataset to write.
        vocab: vocabulary size; ids are below it.
        patch_sizes: K of each stage; the stage is named "token" for K = 1, else "patch".
        steps: steps of each stage.
        samples: samples per step, over all ranks.
        positions: positions per sample.
    """
    write_corpus(prefix, vocab, samples * positions * sum(patch_sizes) * (steps + 1))
    stages = [
        {"name": "patch" if size > 1 else "token", "patch_size": size, "steps": steps, "batch": "constant-positions"}
        for size in patch_sizes
    ]
    return [
        *("--vocab-size", str(vocab), "--seq-length", str(positions), "--stages", json.dumps(stages)),
        *("--global-batch-size", str(samples), "--lr", "1e-4", "--split", "1,0,0", "--data-path", str(prefix), "--log-interval", "1000"),
    ]


def resolved(flags: Sequence[str], ranks: int = 1) -> tuple[RunConfig, EngineConfig]:
    """Returns the configuration of a run and of its engine."""
    run = load_config(list(flags), ranks)
    return run, resolve_engine_config(run.options.engine, run.options.schedule, run.origins, run.plan, ranks)


def train(run: RunConfig, engine_config: EngineConfig, make_callbacks: Callable[[Trainer], list[Callback]]) -> None:
    """Trains in this process, as pretrain_gpt_patch.py does, with further callbacks.

    Args:
        run: configuration of the run.
        engine_config: configuration of its engine.
        make_callbacks: returns the callbacks for a trainer whose model is built.
    """
    stops = StopRequests(run.options.safety)
    with make_watchdog(run) as watchdog:
        device = init_distributed()
        with Trainer(run, engine_config, device, stops, watchdog) as trainer:
            trainer.callbacks = [*trainer.callbacks, *make_callbacks(trainer)]
            trainer.train()
        barrier()
        destroy_distributed()


def measured_hardware(timer: Timer, run: RunConfig, engine_config: EngineConfig) -> tuple[Hardware, dict[str, float]]:
    """Measures the device and returns it in the form that the plan uses; links come from the plan's table.

    Args:
        timer: timer of the device.
        run: run whose precision, samples and heads the measurement uses.
        engine_config: configuration of its engine.

    Returns:
        The hardware, and the ceilings: `copy_gb_per_second`, `product_tflop_per_second`, `attention_tflop_per_second`.
    """
    dtype, shape, stage = DTYPES[engine_config.precision], run.shape, run.plan.stages[-1]
    limits = ceilings(timer, dtype)
    attention = attention_ceiling(timer, dtype, stage.micro_batch_size, shape.num_attention_heads, stage.positions, shape.head_size)
    cuda = timer.device.type == "cuda"
    known = next((entry for name, entry in DEVICES.items() if cuda and name in torch.cuda.get_device_name()), DEVICES["H100"])
    hardware = dataclasses.replace(
        known,
        name="this machine's",
        peak_tflops=limits["product_tflop_per_second"],
        memory_gb_per_second=limits["copy_gb_per_second"],
        matmul_efficiency=1.0,
        attention_efficiency=attention / limits["product_tflop_per_second"],
        fp32_slowdown=1.0,
    )
    return hardware, {**limits, "attention_tflop_per_second": attention}


def planned_seconds(run: RunConfig, engine_config: EngineConfig, device: Hardware) -> dict[str, float]:
    """Returns the planned seconds of a step, by stage."""
    layout = layout_of(run, engine_config)
    return {stage.name: step_time(run.shape, layout, stage, device).total for stage in run.plan.stages}


def planned_memory(run: RunConfig, engine_config: EngineConfig, device: torch.device) -> dict[str, Memory]:
    """Returns the planned memory of the first rank, by stage."""
    layout: Layout = layout_of(run, engine_config)
    layers = layout.layers_by_pipeline_rank(run.shape)[0]
    kind: Any = device.type
    return {stage.name: rank_memory(run.shape, layout, layers, 0, stage, kind) for stage in run.plan.stages}
