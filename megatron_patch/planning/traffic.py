"""What ranks send each other in one optimizer step, by kind and by link; volumes are **counted**, per rank, one direction.

In: model, layout, stage. Out: `Traffic` rows. Collectives are counted as rings send them: an all-reduce of n bytes over r ranks sends
2·(r - 1)/r·n from each, a gather or scatter half of that. Ranks are numbered tensor innermost, then data, then pipeline, so a group stays
inside a node exactly when its last rank's number differs from its first's by less than the node's devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_patch.model.shape import ModelShape
from megatron_patch.planning.hardware import Hardware
from megatron_patch.planning.layout import Layout
from megatron_patch.planning.memory import rank_parameters
from megatron_patch.stages import Stage

Kind = Literal["tensor", "pipeline", "data"]


@dataclass(frozen=True)
class Traffic:
    """One kind of traffic of a rank in a step.

    Args:
        kind: the axis of the grid that talks.
        link: "node" inside a node, "network" between nodes.
        bytes: that a rank sends in one optimizer step.
    """

    kind: Kind
    link: Literal["node", "network"]
    bytes: float


def _link(stride: int, size: int, hardware: Hardware) -> Literal["node", "network"]:
    return "node" if stride * (size - 1) < hardware.node_devices and stride * size <= hardware.node_devices else "network"


def traffic(shape: ModelShape, layout: Layout, layers: range, stage: Stage, hardware: Hardware) -> list[Traffic]:
    """What each rank of a pipeline stage sends in one optimizer step.

    Args:
        shape: the model.
        layout: the ranks.
        layers: of the pipeline stage.
        stage: of the run.
        hardware: how many devices a node has.
    """
    micro_batches = stage.gradient_accumulation(layout.data)
    hidden = layout.element_bytes * stage.micro_batch_size * stage.positions * shape.hidden_size
    rows: list[Traffic] = []
    t, p, d = layout.tensor, layout.pipeline, layout.data
    if t > 1:
        blocks = len([layer for layer in layers if 1 <= layer <= shape.num_layers])
        # Forward and backward, each half of a block sums the hidden states once; full recomputation repeats all but the last of a block.
        sums = blocks * (4 + (1 if layout.recompute == "full" else 0))
        sums += (0 in layers) + (shape.num_layers + 1 in layers)
        loss = 4 * (2 + stage.labels_per_position) * stage.micro_batch_size * stage.positions if shape.num_layers + 1 in layers else 0
        rows.append(Traffic("tensor", _link(1, t, hardware), 2 * (t - 1) / t * micro_batches * (sums * hidden + loss)))
    if p > 1:
        ends = (0 not in layers) + (shape.num_layers + 1 not in layers)
        rows.append(Traffic("pipeline", _link(t * d, p, hardware), ends * micro_batches * hidden / t))
    if d > 1:
        parameters = rank_parameters(shape, layout, layers)
        e = layout.element_bytes
        # ZeRO 0 and 1 sum gradients (float32 where those of 16 bits accumulate in it), 1 and 2 gather the new weights; 3 gathers weights in
        # each forward and backward pass instead.
        share = (d - 1) / d * parameters
        volume = {0: 2 * 4 * share, 1: 2 * e * share + e * share, 2: micro_batches * e * share + e * share}.get(
            layout.zero_stage, micro_batches * 3 * e * share
        )
        rows.append(Traffic("data", _link(t, d, hardware), volume))
    return rows
