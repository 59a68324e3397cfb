"""The time of a step, **estimated** from counted FLOPs and traffic and from the efficiencies of the hardware.

In: model, layout, stage, hardware. Out: `StepTime`. For each micro-batch a pipeline rank computes its layers, reduces over its
tensor-parallel ranks and exchanges heads for positions (context parallelism) without overlap, and sends the result. The slowest pipeline
rank sets the pace; (p - 1) more micro-batches of it fill and drain the pipeline (Narayanan et al., arXiv 2104.04473, section 2.2). Gradient
communication partly overlaps the backward pass. The optimizer step reads and writes its states once. Muon's step exchanges matrices and
orthogonalizes them, without overlap.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import get_args

from megatron_patch.model.flops import attended_positions, attention_flops, block_matrices, last_part_attended, training_flops_per_position
from megatron_patch.model.shape import ModelShape
from megatron_patch.model.sharding import gathers_keys
from megatron_patch.planning.hardware import Hardware
from megatron_patch.planning.hidden_matrices import matrix_step
from megatron_patch.planning.layout import Layout
from megatron_patch.planning.memory import EXPERT_IMBALANCE, hidden_parameters, rank_parameters, saved_by_layers
from megatron_patch.planning.traffic import Kind, traffic
from megatron_patch.stages import Stage


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by part.

    Args:
        compute: computation of the slowest pipeline rank, over its micro-batches.
        tensor: its communication with tensor parallel ranks.
        pipeline: its sends to other pipeline ranks.
        bubble: filling and draining of the pipeline.
        data: communication of gradients and weights between data parallel ranks that the backward pass does not overlap.
        optimizer: the update of the weights.
        mfu: model FLOPs of the step over the peak FLOPs of all devices in that time.
        orthogonalization: Newton-Schulz steps of the rank that the others wait for; 0 if the optimizer needs no full matrices.
        matrices: exchange of matrices for this.
        context: exchange of heads for positions with context-parallel ranks; 0 without them.
        experts: exchange of positions with ranks of other experts; 0 without expert parallelism.
    """

    compute: float
    tensor: float
    pipeline: float
    bubble: float
    data: float
    optimizer: float
    mfu: float
    orthogonalization: float = 0.0
    matrices: float = 0.0
    context: float = 0.0
    experts: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of the step."""
        step = self.optimizer + self.orthogonalization + self.matrices
        return self.compute + self.tensor + self.context + self.experts + self.pipeline + self.bubble + self.data + step


def bubble_share(layout: Layout, stage: Stage) -> float:
    """Returns the smallest idle share of a pipeline: (p - 1) / (m + p - 1) for p pipeline ranks and m micro-batches; exact for 1F1B."""
    return (layout.pipeline - 1) / (stage.gradient_accumulation(layout.data) + layout.pipeline - 1)


def executed_flops(shape: ModelShape, layout: Layout, layers: range, positions: int) -> tuple[float, float]:
    """Returns the exact FLOPs that layers execute per position of a training step, summed over tensor parallel ranks.

    Model FLOPs are three times the forward pass. In addition, attention kernels recompute their scores in the backward pass (5 products
    after 2, arXiv 2205.14135), and full recomputation repeats each block's forward pass, without its last product where no norm reads that.

    Args:
        shape: shape of the model.
        layout: layout of the run, for its recomputation.
        layers: layers of a pipeline rank.
        positions: T; attention is counted as causal, and within the windows of its blocks.

    Returns:
        (matrix products, attention).
    """
    blocks = [layer - 1 for layer in layers if 1 <= layer <= shape.num_layers]
    matrices = [2.0 * block_matrices(shape, block) for block in blocks]
    head = 2 * shape.hidden_size * shape.vocab_size if shape.num_layers + 1 in layers else 0
    products = 3 * sum(matrices) + 3 * head
    if layout.recompute == "full":
        # With experts, the sum over a position's experts is not the product itself, which is computed again.
        unread = [block for block in blocks if not shape.norms_after and shape.experts_of(block) is None]
        products += sum(matrices) - 2.0 * shape.hidden_size * shape.ffn_hidden_size * len(unread)
    if shape.attention_softcap is not None:
        # Plain products, of all T x T scores.
        scores = 4 * shape.num_attention_heads * shape.head_size * positions * len(blocks)
        return products, scores * (3.0 + (layout.recompute != "none"))
    return products, attention_flops(shape, positions, blocks) * (3.5 + (layout.recompute != "none"))


def _expert_products(shape: ModelShape, layout: Layout, layers: range) -> float:
    """Returns the FLOPs of experts in `executed_flops`, if ranks hold different experts, so that they wait for the one with most to do."""
    experts = shape.experts
    if experts is None or layout.tensor * layout.experts == 1:
        return 0.0
    blocks = shape.expert_layers(layers)
    passes = 4 if layout.recompute == "full" else 3
    return passes * blocks * 2.0 * 3 * shape.hidden_size * experts.ffn_hidden_size * experts.top_k


def attention_imbalance(shape: ModelShape, layout: Layout, layers: range, stage: Stage) -> float:
    """Returns the attention that the slowest context-parallel rank computes in these layers, relative to the mean of the ranks.

    Ranks that exchange heads compute the same amount. Of those that gather keys and values, each computes attention for its own positions:
    the last has the most, up to 2 - 1/c times the mean without windows. The others wait for it in each block.

    Args:
        shape: shape of the model.
        layout: layout of the run.
        layers: layers of a pipeline rank.
        stage: the stage.
    """
    ranks, positions = stage.context_parallel_size, stage.positions
    windows = [shape.window_of(layer - 1) for layer in layers if 1 <= layer <= shape.num_layers]
    if not windows or shape.attention_softcap is not None or not gathers_keys(shape, layout.tensor, ranks, layout.context_exchange):
        return 1.0  # where scores are capped, all T of each position are computed
    last = sum(last_part_attended(positions, ranks, window) for window in windows)
    return last / sum(attended_positions(positions, window) for window in windows)


def optimizer_seconds(shape: ModelShape, layout: Layout, layers: range, hardware: Hardware) -> tuple[float, float]:
    """Returns the estimated seconds of the update and of its Newton-Schulz steps, without communication.

    The update is limited by the memory's bandwidth: AdamW moves 32 bytes for each parameter in one kernel. Muon's operators run one after
    another. For each element they move 12 bytes for the momentum, 12 for Nesterov's look-ahead, 8 for the decay, 12 for the sum and 4 for
    the rounded weight. The copy into the buffer moves 4 bytes and the element as it is sent; in bfloat16 so does the copy back.

    Newton-Schulz steps are matrix products, which reach the same share of the peak as those of the model, and copies: `baddbmm` copies its
    first operand, and a matrix is stacked, normalized, scaled and copied back.

    Args:
        shape: shape of the model.
        layout: layout of the run.
        layers: layers of a pipeline rank.
        hardware: devices.
    """
    bandwidth, e = hardware.memory_gb_per_second * 1e9, layout.element_bytes
    shards = layout.data if layout.zero_level else 1
    parameters, work = rank_parameters(shape, layout, layers), matrix_step(shape, layout, layers, hardware.node_devices)
    if work is None:
        return 32.0 * parameters / shards / bandwidth, 0.0
    optimizer, hidden = layout.optimizer, hidden_parameters(shape, layout, layers)
    moved = 36 + (12 if optimizer.nesterov else 0) + (4 + e) + (4 + e if e == 2 else 0)
    update = (32.0 * (parameters - hidden) + moved * hidden) / shards / bandwidth
    products = hardware.peak_tflops * 1e12 * hardware.matmul_efficiency / (hardware.fp32_slowdown if e == 4 else 1.0)
    copies = 2 * e * optimizer.newton_schulz_steps * (work.owned_elements + work.owned_squares)
    copies += (8 * e + 4 + (4 + e if e == 2 else 0)) * work.owned_elements
    return update, work.critical_flops * optimizer.newton_schulz_steps / products + copies / bandwidth


def step_time(shape: ModelShape, layout: Layout, stage: Stage, hardware: Hardware) -> StepTime:
    """Returns the estimated time of one optimizer step of a stage.

    Args:
        shape: shape of the model.
        layout: layout of the run.
        stage: the stage.
        hardware: devices and links.
    """
    micro_batches = stage.gradient_accumulation(layout.data)
    positions = micro_batches * stage.micro_batch_size * stage.rank_positions
    peak = hardware.peak_tflops * 1e12
    usable = peak / (hardware.fp32_slowdown if layout.precision == "fp32" else 1.0)
    passes = hardware.compiled_passes if layout.compiled else hardware.memory_passes
    slowest = (0.0, 0.0, 0.0, 0.0, 0.0)
    data, step = 0.0, (0.0, 0.0, 0.0)
    for layers in layout.layers_by_pipeline_rank(shape):
        products, attention = executed_flops(shape, layout, layers, stage.positions)
        products += (EXPERT_IMBALANCE - 1) * _expert_products(shape, layout, layers)
        attention *= attention_imbalance(shape, layout, layers, stage)
        seconds = products / hardware.matmul_efficiency + attention / hardware.attention_efficiency
        seconds *= positions / layout.tensor / usable
        # The memory bandwidth limits all operators that are not matrix products.
        moved = micro_batches * saved_by_layers(shape, dataclasses.replace(layout, recompute="none"), layers, stage)
        seconds += passes * moved / (hardware.memory_gb_per_second * 1e9)
        sent = dict.fromkeys(get_args(Kind), 0.0)
        for row in traffic(shape, layout, layers, stage, hardware):
            sent[row.kind] += row.seconds(hardware)
        slowest = max(slowest, (seconds, sent["tensor"], sent["pipeline"], sent["context"], sent["experts"]), key=sum)
        # ZeRO's communication overlaps the backward pass, which is two thirds of the computation.
        data = max(data, sent["data"] - min(hardware.overlap * sent["data"], 2 / 3 * seconds))
        step = max(step, (*optimizer_seconds(shape, layout, layers, hardware), sent["matrices"]), key=sum)
    bubble = sum(slowest) * (layout.pipeline - 1) / micro_batches
    update, orthogonalization, matrices = step
    total = sum(slowest) + bubble + data + sum(step)
    model = stage.positions_per_step * training_flops_per_position(shape, stage.positions)
    mfu = model / (total * peak * layout.ranks)
    compute, tensor, pipeline, context, experts = slowest
    return StepTime(compute, tensor, pipeline, bubble, data, update, mfu, orthogonalization, matrices, context, experts)
