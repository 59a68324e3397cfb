"""Speeds of training runs that others have published, and what the plan says about the same runs.

In: the table below, a device. Out: tokens per second of each run as published and as planned, and the error. The efficiencies of
`hardware.py` are fitted to the runs marked `fitted`; the others are held out and show how far the plan may be from runs of another kind.

Only measured **tokens per second** are compared. Published utilizations are not used: programs count FLOPs differently (with all scores of
attention or only the causal half, with recomputation or without it). The plan counts every run in its own way, on both sides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_patch.model.shape import ModelShape
from megatron_patch.planning.hardware import DEVICES, Hardware
from megatron_patch.planning.layout import Layout
from megatron_patch.planning.timing import step_time
from megatron_patch.stages import Stage


def _llama(layers: int, hidden: int, groups: int, ffn: int, vocab: int) -> ModelShape:
    heads = hidden // 128
    return ModelShape(layers, hidden, heads, groups, 128, ffn, vocab, vocab, max_positions=1)


def _gpt(layers: int, hidden: int, heads: int, vocab: int, groups: int = 0, rotary: bool = False) -> ModelShape:
    shape = ModelShape(layers, hidden, heads, groups or heads, hidden // heads, 4 * hidden, vocab, vocab, max_positions=1)
    shape = dataclasses.replace(shape, normalization="LayerNorm", activation="gelu")
    return shape if rotary else dataclasses.replace(shape, position_embedding="learned", tie_embeddings=True)


SHAPES = {
    "Llama 3 8B": _llama(32, 4096, 8, 14336, 128256),
    "Llama 3 70B": _llama(80, 8192, 8, 28672, 128256),
    "Llama 3 405B": _llama(126, 16384, 8, 53248, 128256),
    "Llama 2 13B": _llama(40, 5120, 40, 13824, 32000),
    "Llama 2 70B": _llama(80, 8192, 8, 28672, 32000),
    "MPT 1B": _gpt(24, 2048, 16, 50368),
    "MPT 3B": _gpt(32, 2560, 20, 50368),
    "MPT 7B": _gpt(32, 4096, 32, 50368),
    "MPT 13B": _gpt(40, 5120, 40, 50368),
    "MPT 30B": _gpt(48, 7168, 64, 50368),
    "MPT 70B": _gpt(80, 8192, 64, 50368),
    "Nemotron-4 15B": _gpt(32, 6144, 48, 256000, 8, rotary=True),
    "Nemotron-4 340B": _gpt(96, 18432, 96, 256000, 8, rotary=True),
    "GPT-3 175B": _gpt(96, 12288, 96, 51200),
}
"""Models of the published runs; their positions are those of the run. Nemotron's squared ReLU costs the same matrix products as GELU."""


@dataclass(frozen=True)
class Source:
    """Where runs were published, and what is the same for all of them.

    Args:
        name: short name.
        where: repository and file.
        program: program, and its kind of data parallelism.
        fitted: whether the efficiencies are fitted to its runs.
        fused: whether its kernels join the small operators of a block, as `--compile` does here.
        communication_bytes: bytes of a gradient's element when data-parallel ranks sum it.
        hardware: figures of the machines that differ from the plan's table.
    """

    name: str
    where: str
    program: str
    fitted: bool
    fused: bool = False
    communication_bytes: int = 4
    hardware: dict[str, float] = field(default_factory=dict)


TITAN = Source(
    "torchtitan",
    "pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md; 405B: docs/performance.md; H100 of 96 GB HBM2e at 500 W",
    "FSDP2",
    fitted=True,
    hardware={"memory_gb_per_second": 2400},
)
TITAN_A100 = Source("torchtitan", "pytorch/torchtitan, docs/performance.md (2024)", "FSDP2", fitted=True)
FOUNDRY = Source("llm-foundry", "mosaicml/llm-foundry, scripts/train/benchmarking/README.md", "FSDP, Triton's attention", fitted=True)
FOUNDRY_PURE = dataclasses.replace(FOUNDRY, program="FSDP, Triton's attention, gradients summed in bfloat16", communication_bytes=2)
NEMO = Source(
    "NeMo",
    "NVIDIA/dgxc-benchmarking, nemotron/README_15b.md, nemotron/README_340b.md, nemo_megatron/README_175b.md, llama3.1/README_70b.md and "
    "README_405b.md (24.09 to 24.11)",
    "Megatron with Transformer Engine, ZeRO 1, all communication overlapped",
    fitted=False,
    fused=True,
    communication_bytes=2,
)
NEMO_GB200 = dataclasses.replace(
    NEMO,
    where="NVIDIA/dgxc-benchmarking, llama3.1/README.md; GB200, planned as a faster B200",
    hardware={"peak_tflops": 2500, "memory_gb_per_second": 8000},
)
TITAN_B200 = Source("torchtitan", "pytorch/torchtitan, docs/mxfp8.md (2025); B200 with limited power", "FSDP2", fitted=False)


@dataclass(frozen=True)
class PublishedRun:
    """A published run in bfloat16.

    Args:
        source: where it was published.
        model: key of `SHAPES`.
        gpu: key of `DEVICES`.
        devices: number of devices.
        positions: T, tokens of a sample.
        micro_batch: samples of one rank in one forward pass.
        batch: samples of a step.
        recomputed: share of the blocks' forward pass that the backward pass recomputes. torchtitan's "selective" recomputes every other
            block or every other matrix product: 0.5.
        speed: tokens per second and device, as published.
        compiled: whether torch.compile was used.
        tensor, pipeline: parallel sizes.
        chunks: parts of a pipeline rank's layers in an interleaved schedule, which divide its bubble; this program has no such schedule.
        context: ranks that share a sample. The plan counts them as data-parallel ranks.
    """

    source: Source
    model: str
    gpu: str
    devices: int
    positions: int
    micro_batch: int
    batch: int
    recomputed: float
    speed: float
    compiled: bool = False
    tensor: int = 1
    pipeline: int = 1
    chunks: int = 1
    context: int = 1

    @property
    def fitted(self) -> bool:
        """Whether the efficiencies are fitted to this run: long sequences are held out."""
        return self.source.fitted and self.positions <= 8192


def _seconds(step: float, run: PublishedRun) -> PublishedRun:
    return dataclasses.replace(run, speed=run.batch * run.positions / step / run.devices)


def _foundry() -> list[PublishedRun]:
    rows: list[tuple[str, int, int, int, int, float, float | None, float | None]] = [
        # model, devices, T, micro-batch, micro-batches of a step, recomputed, tokens per second of an H100 and of an A100
        ("MPT 70B", 64, 2048, 8, 4, 1, 1039, 410),
        ("MPT 70B", 32, 2048, 2, 16, 1, 882, 373),
        ("MPT 30B", 32, 2048, 14, 3, 1, 2308, None),
        ("MPT 30B", 8, 2048, 3, 21, 1, 2002, 916),
        ("MPT 30B", 8, 4096, 1, 21, 1, 1802, 814),
        ("MPT 30B", 8, 8192, 1, 21, 1, 1384, 574),
        ("MPT 13B", 64, 2048, 2, 1, 0, 4800, None),
        ("MPT 13B", 8, 2048, 2, 1, 0, 4792, None),
        ("MPT 13B", 8, 4096, 10, 3, 1, 4717, 2060),
        ("MPT 13B", 8, 16384, 3, 3, 1, 2985, 1431),
        ("MPT 7B", 8, 1024, 64, 2, 1, 10203, 4357),
        ("MPT 7B", 8, 2048, 6, 1, 0, 10643, None),
        ("MPT 7B", 8, 4096, 16, 2, 1, 8611, 3684),
        ("MPT 7B", 8, 8192, 8, 2, 1, 6935, 3206),
        ("MPT 7B", 8, 32768, 2, 2, 1, 3318, 1672),
        ("MPT 3B", 64, 2048, 6, 3, 0, 22525, None),
        ("MPT 3B", 8, 8192, 3, 6, 0, 16578, 7695),
        ("MPT 1B", 64, 2048, 20, 1, 0, 44402, None),
        ("MPT 1B", 8, 4096, 7, 4, 0, 38535, 17807),
        ("MPT 1B", 8, 16384, 2, 4, 0, 19649, 9956),
    ]
    return [
        PublishedRun(
            FOUNDRY_PURE if (gpu, model) == ("A100", "MPT 70B") else FOUNDRY,
            model,
            gpu,
            devices,
            positions,
            micro,
            micro * steps * devices,
            recomputed,
            speed,
        )
        for gpu, column in (("H100", 0), ("A100", 1))
        for model, devices, positions, micro, steps, recomputed, *speeds in rows
        if (speed := speeds[column]) is not None
    ]


PUBLISHED = (
    PublishedRun(TITAN, "Llama 3 8B", "H100", 8, 8192, 2, 16, 0.5, 5762),
    PublishedRun(TITAN, "Llama 3 8B", "H100", 8, 8192, 2, 16, 0.5, 6667, compiled=True),
    PublishedRun(TITAN, "Llama 3 8B", "H100", 128, 8192, 2, 256, 0.5, 5605),
    PublishedRun(TITAN, "Llama 3 8B", "H100", 128, 8192, 2, 256, 0.5, 6514, compiled=True),
    PublishedRun(TITAN, "Llama 3 405B", "H100", 128, 8192, 2, 32, 1, 109, tensor=8),
    PublishedRun(TITAN_A100, "Llama 3 8B", "A100", 64, 8192, 1, 64, 0.5, 2904),
    PublishedRun(TITAN_A100, "Llama 3 70B", "A100", 64, 8192, 1, 64, 1, 331),
    PublishedRun(TITAN_A100, "Llama 2 13B", "A100", 64, 4096, 2, 128, 0, 2162),
    PublishedRun(TITAN_A100, "Llama 2 13B", "A100", 64, 4096, 2, 128, 0.5, 1914),
    PublishedRun(TITAN_A100, "Llama 2 70B", "A100", 64, 4096, 1, 64, 0.5, 355),
    PublishedRun(TITAN_A100, "Llama 2 70B", "A100", 64, 4096, 2, 128, 1, 353),
    *_foundry(),
    _seconds(2.812, PublishedRun(NEMO, "Nemotron-4 15B", "H100", 16, 4096, 4, 64, 0, 0, tensor=4)),
    _seconds(2.887, PublishedRun(NEMO, "Nemotron-4 15B", "H100", 2048, 4096, 4, 8192, 0, 0, tensor=4)),
    _seconds(8.309, PublishedRun(NEMO, "GPT-3 175B", "H100", 128, 2048, 1, 256, 0, 0, tensor=4, pipeline=8, chunks=12)),
    _seconds(8.49, PublishedRun(NEMO, "GPT-3 175B", "H100", 2048, 2048, 1, 4096, 0, 0, tensor=4, pipeline=8, chunks=12)),
    _seconds(4.61, PublishedRun(NEMO, "Nemotron-4 340B", "H100", 128, 4096, 1, 32, 0, 0, tensor=8, pipeline=8, chunks=12)),
    _seconds(4.84, PublishedRun(NEMO, "Nemotron-4 340B", "H100", 2048, 4096, 1, 512, 0, 0, tensor=8, pipeline=8, chunks=12)),
    _seconds(14.72, PublishedRun(NEMO, "Llama 3 70B", "H100", 64, 8192, 1, 128, 0, 0, tensor=4, pipeline=4, chunks=5, context=2)),
    _seconds(14.92, PublishedRun(NEMO, "Llama 3 70B", "H100", 1024, 8192, 1, 2048, 0, 0, tensor=4, pipeline=4, chunks=5, context=2)),
    _seconds(17.2, PublishedRun(NEMO, "Llama 3 405B", "H100", 576, 8192, 1, 252, 0, 0, tensor=8, pipeline=9, chunks=7, context=2)),
    _seconds(9.479, PublishedRun(NEMO_GB200, "Llama 3 405B", "B200", 256, 8192, 1, 128, 0, 0, tensor=4, pipeline=8, chunks=8, context=2)),
    PublishedRun(TITAN_B200, "Llama 3 8B", "B200", 8, 8192, 1, 8, 0.5, 8307.5, compiled=True),
)


def planned_speed(run: PublishedRun, hardware: Hardware | None = None) -> float:
    """Returns the plan's tokens per second and device for a published run.

    Args:
        run: the run.
        hardware: device in place of the one of the plan's table; the figures of the run's machines replace its own.
    """
    device = dataclasses.replace(hardware or DEVICES[run.gpu], **run.source.hardware)
    zero = 1 if run.source.program.startswith("Megatron") else 3
    stage = Stage("token", 1, run.positions, run.micro_batch, run.batch, 1)
    layout = Layout(
        run.devices,
        run.tensor,
        run.pipeline,
        sequence_parallel=run.tensor > 1,
        zero_level=zero,
        compiled=run.compiled or run.source.fused,
        balance="flops",
        balance_positions=run.positions,
        communication_bytes=run.source.communication_bytes,
        prefetch_elements=1 << 40,  # FSDP gathers a whole block in one call
    )
    shape = dataclasses.replace(SHAPES[run.model], max_positions=run.positions)
    times = [step_time(shape, dataclasses.replace(layout, recompute=kind), stage, device) for kind in ("none", "full")]
    none, full = (time.total - time.bubble * (1 - 1 / run.chunks) for time in times)
    return run.batch * run.positions / (none + run.recomputed * (full - none)) / run.devices


def planned_error(run: PublishedRun, hardware: Hardware | None = None) -> float:
    """Returns the planned speed of a published run over the measured one, minus 1."""
    return planned_speed(run, hardware) / run.speed - 1


def spread(errors: Sequence[float]) -> tuple[float, float, float]:
    """Returns (mean, root mean square, largest by size) of relative errors."""
    return sum(errors) / len(errors), (sum(e * e for e in errors) / len(errors)) ** 0.5, max(errors, key=abs)
