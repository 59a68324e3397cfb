"""Speeds of training runs that others have published, and what the plan says about the same runs.

In: the table below, a device. Out: tokens per second of each run as published and as planned, and the error. The efficiencies of
`hardware.py` are fitted to the runs marked `fitted`; the others are held out and show how far the plan may be from runs of another kind.

Only measured **tokens per second** are compared. Published utilizations are not used: programs count FLOPs differently (with all scores of
attention or only the causal half, with recomputation or without it). The plan counts every run in its own way, on both sides.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
        links: addresses of the documents.
        program: kind of data parallelism, device and year.
        fitted: whether the efficiencies are fitted to its runs.
        zero_level: ZeRO level that divides the model's states as the program does; FSDP is 3.
        fused: whether its kernels join the small operators of a block, as `--compile` does here.
        communication_bytes: bytes of a gradient's element when data-parallel ranks sum it.
        hardware: figures of the machines that differ from the plan's table.
        gpu: name of their device, if it is not in that table.
    """

    name: str
    links: tuple[str, ...]
    program: str
    fitted: bool
    zero_level: int = 3
    fused: bool = False
    communication_bytes: int = 4
    hardware: dict[str, Any] = field(default_factory=dict)
    gpu: str = ""

    def row(self) -> str:
        """Returns the source as a row of a table."""
        return f"| {self.name} | {self.program} | {', '.join(f'[{number}]({link})' for number, link in enumerate(self.links, start=1))} |"


_TITAN, _FOUNDRY, _NEMO = (
    f"https://github.com/{name}" for name in ("pytorch/torchtitan", "mosaicml/llm-foundry", "NVIDIA/dgxc-benchmarking")
)
# The documents as they were when they were read: some were changed or removed later.
_NEMO_BLOB, _NEMO_15B = f"{_NEMO}/blob/143b90dd91f9be958fed4773ae95d941a3356a82", f"{_NEMO}/blob/0b71cfda5163540778e2a3d2db59858bf62f96f7"
TITAN = Source(
    "torchtitan",
    (
        f"{_TITAN}/blob/31a17bfdb70bab6f62a13d21816a5339b911d6e3/benchmarks/llama3_h100_202412_torchtitan.md",
        f"{_TITAN}/commits/main/docs/performance.md",
    ),
    "FSDP2; H100 with 96 GB of HBM2e at 2.4 TB/s and 500 W (405B, second link: 94 GB); 2024",
    fitted=True,
    hardware={"memory_gb_per_second": 2400},
)
TITAN_A100 = Source(
    "torchtitan", (f"{_TITAN}/blob/041336434916bdc0f88c1f89fda176fd3c2092e4/docs/performance.md",), "FSDP2; A100; 2024", fitted=True
)
FOUNDRY = Source(
    "llm-foundry",
    (f"{_FOUNDRY}/blob/061f2c7ce64e655100286584a7629e2a09f827ba/scripts/train/benchmarking/README.md",),
    "FSDP, attention in Triton; the 70B model on A100 sums gradients in bfloat16; 2023",
    fitted=True,
)
FOUNDRY_PURE = dataclasses.replace(FOUNDRY, communication_bytes=2)
NEMO = Source(
    "NeMo",
    (
        f"{_NEMO_15B}/nemotron/README_15b.md",
        f"{_NEMO_15B}/nemo_megatron/README_175b.md",
        f"{_NEMO_BLOB}/nemotron/README_340b.md",
        f"{_NEMO_BLOB}/llama3.1/README_70b.md",
        f"{_NEMO_BLOB}/llama3.1/README_405b.md",
    ),
    "Megatron with Transformer Engine, ZeRO 1, tensor and data parallel communication overlapped; H100; 2024",
    fitted=False,
    zero_level=1,
    fused=True,
    communication_bytes=2,
)
NEMO_GB200 = dataclasses.replace(
    NEMO,
    links=(f"{_NEMO}/blob/14fb6ae60402b08f7ca26f2fa86a9408806d3b62/llama3.1/README.md",),
    program="as above, on GB200, planned as B200 with a peak of 2,500 TFLOP/s and 8 TB/s; 2025",
    hardware={"peak_tflops": 2500, "memory_gb_per_second": 8000},
    gpu="GB200",
)
TITAN_B200 = Source(
    "torchtitan",
    (f"{_TITAN}/blob/0d481060287f51bf3d783cb9bb501a0cff5e5427/docs/mxfp8.md",),
    "FSDP2; B200 with limited power; 2025",
    fitted=False,
)


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
        context: ranks that share a sample.
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
    stage = Stage("token", 1, run.positions, run.micro_batch, run.batch, 1, context_parallel_size=run.context)
    layout = Layout(
        run.devices,
        run.tensor,
        run.pipeline,
        sequence_parallel=run.tensor > 1,
        zero_level=run.source.zero_level,
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


def _spread(runs: Sequence[PublishedRun]) -> str:
    errors = [planned_error(run) for run in runs]
    mean, rms = sum(errors) / len(errors), (sum(error * error for error in errors) / len(errors)) ** 0.5
    return f"mean {mean:+.1%}, root mean square {rms:.1%}, largest {max(errors, key=abs):+.0%}"


@functools.cache
def _fitted_text(gpu: str) -> str:
    runs = [run for run in PUBLISHED if run.fitted and run.gpu == gpu]
    return f"{len(runs)} published runs of other programs on {gpu} ({_spread(runs)})" if runs else ""


def calibration(hardware: Hardware) -> str:
    """Returns a sentence on how the times of this device are known."""
    known = DEVICES.get(hardware.name)
    figures = ("peak_tflops", "matmul_efficiency", "attention_efficiency", "memory_passes", "compiled_passes", "overlap")
    if known is None or any(getattr(hardware, name) != getattr(known, name) for name in figures):
        return "Times follow from the figures of --ceilings."
    fitted = f"Times are fitted to {_fitted_text(hardware.name)}" if _fitted_text(hardware.name) else "Times assume the H100's efficiencies"
    return f"{fitted}; this program was not timed on a GPU. --published lists the runs."


def _row(run: PublishedRun) -> str:
    parts = [f"TP{run.tensor}"] if run.tensor > 1 else []
    parts += [f"PP{run.pipeline} in {run.chunks} chunks"] if run.pipeline > 1 else []
    parts += [f"CP{run.context}"] if run.context > 1 else []
    recomputed = {0: "none", 0.5: "half", 1: "all"}[run.recomputed]
    cells = [
        run.source.name,
        run.model,
        f"{run.devices:,} {run.source.gpu or run.gpu}",
        f"{run.positions:,}",
        f"{run.micro_batch} of {run.batch:,}",
        " ".join(parts) or "data parallel",
        recomputed,
        "fused" if run.source.fused else "yes" if run.compiled else "no",
        f"{run.speed:,.0f}",
        f"{planned_speed(run):,.0f}",
        f"{planned_error(run):+.1%}",
    ]
    return f"| {' | '.join(cells)} |"


def published_table() -> list[str]:
    """Returns the published runs, the plan's speeds and the errors as lines of Markdown."""
    titles = ["source", "model", "devices", "T", "micro-batch, batch", "layout", "recomputed", "compiled"]
    titles += ["tokens/s of a device", "planned", "error"]
    lines = []
    for title, kept in (("Fitted", True), ("Held out", False)):
        runs = [run for run in PUBLISHED if run.fitted is kept]
        lines += [f"{title}, {len(runs)} runs: {_spread(runs)}.", "", f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
        lines += [*map(_row, runs), ""]
    return [*lines, "| source | program | links |", "| --- | --- | --- |", *dict.fromkeys(run.source.row() for run in PUBLISHED)]
