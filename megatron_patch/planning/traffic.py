"""The bytes that ranks send in one optimizer step, by parallelism and by link; **counted** per rank in one direction.

In: model, layout, stage. Out: `Traffic` rows. Collectives are counted as ring algorithms: in an all-reduce of n bytes over r ranks each
rank sends 2·(r - 1)/r·n, in a gather or scatter half of that. Ranks are numbered with tensor innermost, then data, then pipeline, so a
group stays inside a node exactly when the numbers of its first and last rank differ by less than the node's devices.

Rings pass through the ranks of a node one after the other and leave it once. Libraries lay one ring through each network port of the node
(NCCL's channels), so the ports of all ranks that a group has in a node carry its traffic together.

The exchange of hidden matrices (Muon) is no ring: each rank sends to each owner through its own port. What a rank sends or receives,
whichever is more, is counted for the busiest rank. Nor is the exchange of heads for positions (context parallelism): each rank sends each
other rank of its group an equal part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_patch.model.parameters import block_parameters
from megatron_patch.model.shape import ModelShape
from megatron_patch.model.sharding import gathers_keys
from megatron_patch.planning.hardware import Hardware
from megatron_patch.planning.hidden_matrices import matrix_step
from megatron_patch.planning.layout import Layout
from megatron_patch.planning.memory import expert_parameters, rank_parameters, sent_key_heads
from megatron_patch.stages import Stage

_LINKS: tuple[Literal["node", "network"], ...] = ("node", "network")
Kind = Literal["tensor", "context", "experts", "pipeline", "data", "matrices"]


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in a step for one kind of parallelism.

    Args:
        kind: kind of parallelism; "context" is the exchange of heads for positions in attention, "experts" that of positions for experts on
            other ranks, "matrices" that of an optimizer that needs full matrices.
        link: "node" inside a node, "network" between nodes.
        bytes: bytes that a rank sends in one optimizer step.
        ports: ranks of its group in one node, whose network ports share what leaves the node.
        ranks: ranks of its group.
        rounds: times that data pass once through all of them, for the latency; 0 if it does not matter.
    """

    kind: Kind
    link: Literal["node", "network"]
    bytes: float
    ports: int = 1
    ranks: int = 1
    rounds: int = 0

    def seconds(self, hardware: Hardware) -> float:
        """Returns the time of these bytes on a device's links, and of the hops from rank to rank."""
        node, network = hardware.node_gb_per_second, self.ports * hardware.network_gb_per_second
        rate = (node if self.link == "node" else min(node, network)) * 1e9 * hardware.link_efficiency
        hops = self.ranks - 1
        between = -(-self.ranks // self.ports) - 1 if self.link == "network" else 0
        latency = ((hops - between) * hardware.node_hop_microseconds + between * hardware.network_hop_microseconds) * 1e-6
        return self.bytes / rate + self.rounds * latency


def _link(stride: int, size: int, hardware: Hardware) -> Literal["node", "network"]:
    return "node" if stride * (size - 1) < hardware.node_devices and stride * size <= hardware.node_devices else "network"


def _context_traffic(shape: ModelShape, layout: Layout, layers: range, stage: Stage, hardware: Hardware) -> list[Traffic]:
    """Returns what a rank sends when ranks of context parallelism exchange heads for positions: queries, keys and values, and the output.

    Where they gather keys and values, each of its own goes to each other rank. The backward pass sends as much as the forward pass, which
    full recomputation repeats; selective recomputation keeps what was received.
    """
    t, c = layout.tensor, stage.context_parallel_size
    blocks = len([layer for layer in layers if 1 <= layer <= shape.num_layers])
    samples = stage.gradient_accumulation(layout.data) * stage.micro_batch_size
    queries, keys = shape.num_attention_heads // t, sent_key_heads(shape, layout, c)
    gathers = gathers_keys(shape, t, c, layout.context_exchange)
    heads = (3 if layout.recompute == "full" else 2) * (2 * keys * c if gathers else 2 * queries + 2 * keys)
    part = layout.element_bytes * blocks * samples * stage.rank_positions * heads * shape.head_size / c
    # The ranks of a group lie t apart; a group that begins in the middle of a node is not shorter there.
    near = min(c, max(1, hardware.node_devices // t))
    rows = [Traffic("context", "node", part * (near - 1))] if near > 1 else []
    return rows + ([Traffic("context", "network", part * (c - near))] if c > near else [])


def _expert_traffic(shape: ModelShape, layout: Layout, layers: range, stage: Stage, hardware: Hardware) -> list[Traffic]:
    """Returns what a rank sends when data-parallel ranks hold different experts, with an even load.

    Each pair of a position and an expert goes to the expert's rank and its result comes back; both passes do this, and full recomputation
    repeats the forward pass. Before each forward pass, ranks send the number of pairs of each expert.
    """
    experts, n, t = shape.experts, layout.experts, layout.tensor
    blocks = shape.expert_layers(layers)
    if experts is None or n == 1 or not blocks:
        return []
    micro_batches, forward_passes = stage.gradient_accumulation(layout.data), 2 if layout.recompute == "full" else 1
    pairs = stage.micro_batch_size * stage.rank_positions * experts.top_k / t
    # Two messages in each pass have hidden states, and one a float32 weight or its gradient.
    sent = (forward_passes + 1) * pairs * (2 * layout.element_bytes * shape.hidden_size + 4) + forward_passes * 8 * experts.count / t
    part = micro_batches * blocks * sent / n
    near = min(n, max(1, hardware.node_devices // t))
    rows = [Traffic("experts", "node", part * (near - 1))] if near > 1 else []
    return rows + ([Traffic("experts", "network", part * (n - near))] if n > near else [])


def traffic(shape: ModelShape, layout: Layout, layers: range, stage: Stage, hardware: Hardware) -> list[Traffic]:
    """Returns the bytes that each rank with these layers sends in one optimizer step.

    Args:
        shape: shape of the model.
        layout: layout of the run.
        layers: layers of a pipeline rank.
        stage: the stage.
        hardware: the hardware, whose number of devices per node is used.
    """
    micro_batches = stage.gradient_accumulation(layout.data)
    hidden = layout.element_bytes * stage.micro_batch_size * stage.rank_positions * shape.hidden_size
    rows: list[Traffic] = []
    t, p, d = layout.tensor, layout.pipeline, layout.data
    if t > 1:
        blocks = len([layer for layer in layers if 1 <= layer <= shape.num_layers])
        # Each half of a block reduces the hidden states once in the forward and once in the backward pass. Full recomputation repeats the
        # forward reductions, the last one of a block only if a norm reads it.
        repeated = 2 if shape.norms_after else 1
        sums = blocks * (4 + (repeated if layout.recompute == "full" else 0))
        sums += (0 in layers) + (shape.num_layers + 1 in layers)
        # Norms over all heads reduce one float32 for each position, for queries and for keys, in each pass.
        reads = 2 * (2 + (1 if layout.recompute == "full" else 0)) if shape.qk_norm and shape.qk_norm_scope == "all" else 0
        squares = 4 * blocks * reads * stage.micro_batch_size * stage.rank_positions
        loss = 4 * (2 + stage.labels_per_position) * stage.micro_batch_size * stage.rank_positions if shape.num_layers + 1 in layers else 0
        rows.append(Traffic("tensor", _link(1, t, hardware), 2 * (t - 1) / t * micro_batches * (sums * hidden + squares + loss)))
    if stage.context_parallel_size > 1:
        rows += _context_traffic(shape, layout, layers, stage, hardware)
    rows += _expert_traffic(shape, layout, layers, stage, hardware)
    if p > 1:
        ends = (0 not in layers) + (shape.num_layers + 1 not in layers)
        rows.append(Traffic("pipeline", _link(t * d, p, hardware), ends * micro_batches * hidden / t))
    if d > 1:
        parameters = rank_parameters(shape, layout, layers)
        weight, gradient = layout.element_bytes, layout.communication_bytes
        # DeepSpeed 0.19.8 all-reduces gradients: ZeRO 0 and 1 once a step, ZeRO 2 after each micro-batch (its default reduces the shards of
        # all ranks in one call). ZeRO 3 scatters them after each micro-batch, and gathers the weights in each forward and backward pass;
        # ZeRO 1 and 2 gather the new weights once.
        each = {
            0: 2 * gradient,
            1: 2 * gradient + weight,
            2: micro_batches * 2 * gradient + weight,
            3: micro_batches * (gradient + 2 * weight),
        }[layout.zero_level]
        # Experts that data-parallel ranks divide are reduced among the ranks with the same ones.
        divided, same = expert_parameters(shape, layout, layers), d // layout.experts
        volume = each * ((d - 1) / d * (parameters - divided) + (same - 1) / same * divided)
        buckets = -(-parameters // layout.bucket_elements)
        gathers = 0
        for layer in layers:
            if 1 <= layer <= shape.num_layers:
                matrices = [math.prod(size) for size in block_parameters(shape, layer - 1).values() if len(size) > 1]
                gathers += min(len(matrices), -(-sum(matrices) // (t * layout.prefetch_elements)))
        rounds = {0: 2 * buckets, 1: 3 * buckets, 2: (2 * micro_batches + 1) * buckets, 3: micro_batches * (buckets + 2 * gathers)}
        ports = max(1, min(d, hardware.node_devices // t))
        rows.append(Traffic("data", _link(t, d, hardware), volume, ports, d, rounds[layout.zero_level]))
    work = matrix_step(shape, layout, layers, hardware.node_devices)
    if work is not None and work.ranks > 1:
        sent = {link: float(layout.element_bytes * elements) for link, elements in (("node", work.node), ("network", work.network))}
        # A row of zero bytes shows that the exchange sends nothing.
        rows += [Traffic("matrices", link, sent[link]) for link in _LINKS if sent[link] or (link == "node" and not any(sent.values()))]
    return rows
