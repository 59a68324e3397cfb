"""How long a step takes: **estimates** from counted FLOPs and traffic and from what the hardware reaches.

In: model, layout, stage, hardware. Out: `StepTime`. A pipeline stage computes its layers for each micro-batch, sums over its tensor
ranks without overlap, and hands on; the slowest pipeline stage sets the pace, (p - 1) further turns of it fill and drain the pipeline
(Narayanan et al., arXiv 2104.04473, section 2.2); gradients travel partly behind the backward pass; the optimizer's step reads and writes
its states once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_patch.model.flops import block_matrices, layer_flops, training_flops_per_position
from megatron_patch.model.shape import ModelShape
from megatron_patch.planning.hardware import Hardware
from megatron_patch.planning.layout import Layout
from megatron_patch.planning.memory import rank_parameters, saved_by_layers
from megatron_patch.planning.traffic import traffic
from megatron_patch.stages import Stage

MEMORY_PASSES = 4
"""How often norms, rotations, activations and residual sums read or write what autograd saves, forward and backward: an estimate."""


@dataclass(frozen=True)
class StepTime:
    """One optimizer step, in seconds.

    Args:
        compute: of the slowest pipeline stage, over its micro-batches.
        tensor: its sums over tensor ranks.
        pipeline: its sends.
        bubble: filling and draining.
        data: gradients and weights over data-parallel ranks, as far as they do not hide.
        optimizer: the update.
        mfu: model FLOPs of the step over what all devices could do in its time.
    """

    compute: float
    tensor: float
    pipeline: float
    bubble: float
    data: float
    optimizer: float
    mfu: float

    @property
    def total(self) -> float:
        """The whole step."""
        return self.compute + self.tensor + self.pipeline + self.bubble + self.data + self.optimizer


def bubble_share(layout: Layout, stage: Stage) -> float:
    """Share of a step in which a pipeline idles at best: (p - 1) / (m + p - 1) for p stages and m micro-batches; exact for 1F1B."""
    return (layout.pipeline - 1) / (stage.gradient_accumulation(layout.data) + layout.pipeline - 1)


def executed_flops(shape: ModelShape, layout: Layout, layers: range, positions: int) -> tuple[float, float]:
    """FLOPs that a pipeline stage's layers execute for one position of a training step, all tensor ranks together; exact.

    Model FLOPs are three times the forward pass; attention kernels compute their scores again in the backward pass (5 products after 2,
    arXiv 2205.14135), and full recomputation repeats each block's forward pass but for its last product, whose result nobody needs.

    Args:
        shape: the model.
        layout: for what is recomputed.
        layers: of the pipeline stage.
        positions: T; attention is counted causal.

    Returns:
        (matrix products, attention).
    """
    flops = layer_flops(shape, positions)
    matrices = 2.0 * block_matrices(shape)
    attention = flops[1] - matrices
    again = layout.recompute == "full"
    down = 2.0 * shape.hidden_size * shape.ffn_hidden_size
    blocks = len([layer for layer in layers if 1 <= layer <= shape.num_layers])
    head = flops[-1] if shape.num_layers + 1 in layers else 0
    products = blocks * (3 * matrices + (matrices - down if again else 0)) + 3 * head
    return products, blocks * attention * (3.5 + (layout.recompute != "none"))


def step_time(shape: ModelShape, layout: Layout, stage: Stage, hardware: Hardware) -> StepTime:
    """The time of one optimizer step of a stage.

    Args:
        shape: the model.
        layout: the ranks.
        stage: of the run.
        hardware: devices and links.
    """
    micro_batches = stage.gradient_accumulation(layout.data)
    positions = micro_batches * stage.micro_batch_size * stage.positions
    peak = hardware.peak_tflops * 1e12
    usable = peak / (hardware.fp32_slowdown if layout.precision == "fp32" else 1.0)
    rates = {"node": hardware.node_gb_per_second, "network": hardware.network_gb_per_second}
    slowest = (0.0, 0.0, 0.0)
    data = update = 0.0
    for layers in layout.parts(shape):
        products, attention = executed_flops(shape, layout, layers, stage.positions)
        seconds = products / hardware.matmul_efficiency + attention / hardware.attention_efficiency
        seconds *= positions / layout.tensor / usable
        # Operators that are no matrix products go by the memory's bandwidth.
        moved = micro_batches * saved_by_layers(shape, dataclasses.replace(layout, recompute="none"), layers, stage)
        seconds += MEMORY_PASSES * moved / (hardware.memory_gb_per_second * 1e9)
        sent = {"tensor": 0.0, "pipeline": 0.0, "data": 0.0}
        for row in traffic(shape, layout, layers, stage, hardware):
            sent[row.kind] = row.bytes / (rates[row.link] * 1e9 * hardware.link_efficiency)
        slowest = max(slowest, (seconds, sent["tensor"], sent["pipeline"]), key=sum)
        # ZeRO's traffic hides behind the backward pass, two thirds of the computing, as far as there is such time.
        data = max(data, sent["data"] - min(hardware.overlap * sent["data"], 2 / 3 * seconds))
        owned = rank_parameters(shape, layout, layers) / (layout.data if layout.zero_stage else 1)
        update = max(update, 32.0 * owned / (hardware.memory_gb_per_second * 1e9))
    bubble = sum(slowest) * (layout.pipeline - 1) / micro_batches
    total = sum(slowest) + bubble + data + update
    model = stage.positions_per_step * training_flops_per_position(shape, stage.positions)
    return StepTime(*slowest, bubble, data, update, model / (total * peak * layout.ranks))
