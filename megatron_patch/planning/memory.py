"""Memory of a rank by part, in bytes, at the fullest moment of a step.

In: model, layout, stage, pipeline stage. Out: `Memory`. Weights, optimizer states and saved activations are **counted**: they are what
DeepSpeed's engines keep and what torch's autograd saves for this model's operators, tensor by tensor (tests compare them with torch).
Gradients in flight, the loss, buffers and fragmentation are **estimated**: their sizes are known, their coincidence is not.

Two moments can be the fullest: the start of the backward pass of a step's last micro-batch, when all activations are alive beside the
gradients of those before it; and the optimizer's step, when gradients are reduced through flat copies.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from megatron_patch.model.parameters import parameters_of_layers, shard_numel
from megatron_patch.model.shape import ModelShape
from megatron_patch.model.sharding import shards_key_value
from megatron_patch.planning.layout import Layout
from megatron_patch.stages import Stage

LOSS_CHUNK_ROWS = 4096
"""Rows whose logits are in memory at once; the operator's own number (a test holds the two together)."""
FRAGMENTATION = 0.05
"""Allowance for the allocator's rounding and holes, as a share of everything else: an estimate, not a measurement."""
REDUCE_ELEMENTS = 500_000_000
"""Elements that DeepSpeed reduces in one flat copy where no bucket is configured."""
ZERO3_LIVE_ELEMENTS = 100_000_000
"""Weights that ZeRO 3 holds gathered beside those in use (its prefetch bucket and the small parameters that it never cuts)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by part.

    Args:
        weights: as the forward pass reads them.
        gradients: that outlive a micro-batch.
        optimizer: float32 master weights and both moments.
        activations: what autograd saves for the micro-batches in flight.
        loss: the head's gradient, and the logits of one chunk.
        buffers: flat copies for communication and the step.
        fragmentation: an allowance; see `FRAGMENTATION`.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    buffers: float
    fragmentation: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, f.name) for f in fields(self))

    def to_json(self) -> dict[str, float]:
        """Bytes by part, and the total."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"total": self.total}


COUNTED = frozenset({"weights", "optimizer", "activations"})
"""The parts that are counts; the others are estimates."""


def rank_parameters(shape: ModelShape, layout: Layout, layers: range) -> int:
    """Parameters of each rank that holds these layers, with its share of the vocabulary's padding; exact.

    All ranks that share a layer hold the same number: matrices are cut evenly, norms and undivided keys are held by all.
    """
    found = parameters_of_layers(shape, layers)
    return sum(shard_numel(name, size, shape, layout.tensor) for name, size in found.items())


def saved_by_block(shape: ModelShape, layout: Layout, samples: int, positions: int) -> int:
    """Bytes that autograd saves in one block for one micro-batch, without full recomputation; exact for fused attention.

    Per position: each norm saves its input and the normalised input (float32, then the activation's dtype) and a factor; each group of
    projections its input; attention its queries, keys, values, output and one float32 a head; the feed-forward layer its products.
    With sequence parallelism norms see a share of the positions; what enters a projection is whole again.

    Args:
        shape: the model.
        layout: tensor and sequence parallelism, precision, recomputation.
        samples: B of the micro-batch.
        positions: T.
    """
    e, t = layout.element_bytes, layout.tensor
    whole = samples * positions
    own = whole // t if layout.sequence_parallel else whole
    hidden = shape.hidden_size
    queries = shape.num_attention_heads * shape.head_size // t
    keys = shape.num_query_groups * shape.head_size // (t if shards_key_value(shape, t) else 1)
    used_keys = keys if shards_key_value(shape, t) else shape.head_size
    if shape.normalization == "RMSNorm":
        # In float32 the normalised input is not copied; in 16 bits a float32 copy of the input is saved instead of the input.
        norms = 2 * own * ((4 + e) * hidden + 4)
    else:
        norms = 2 * own * (e * hidden + 8)
    inputs = 2 * whole * e * hidden
    attention = whole * e * (2 * queries + 2 * used_keys)
    if layout.recompute != "selective":
        attention += whole * 4 * (shape.num_attention_heads // t)
    if shape.qk_norm:
        heads = (queries + used_keys) // shape.head_size
        attention += whole * heads * ((4 + e) * shape.head_size + 4)
    inner = whole * e * shape.ffn_hidden_size // t * (4 if shape.activation == "swiglu" else 2)
    return norms + inputs + attention + inner


def _residual(shape: ModelShape, layout: Layout, samples: int, positions: int) -> int:
    """Bytes of the hidden states between two layers."""
    share = layout.tensor if layout.sequence_parallel else 1
    return layout.element_bytes * samples * positions * shape.hidden_size // share


def saved_by_layers(shape: ModelShape, layout: Layout, layers: range, stage: Stage) -> int:
    """Bytes that autograd saves in these layers for one micro-batch of a stage; exact but for full recomputation's one open block."""
    samples, positions = stage.micro_batch_size, stage.positions
    blocks = len([layer for layer in layers if 1 <= layer <= shape.num_layers])
    each = saved_by_block(shape, layout, samples, positions)
    total = blocks * (_residual(shape, layout, samples, positions) if layout.recompute == "full" else each)
    if blocks and shape.position_embedding == "rope":
        total += 2 * layout.element_bytes * positions * shape.head_size
    if 0 in layers:
        total += 8 * samples * positions * stage.input_patch_size
        total += 8 * positions if shape.position_embedding == "learned" else 0
    if shape.num_layers + 1 in layers:
        own = samples * positions // (layout.tensor if layout.sequence_parallel else 1)
        e = layout.element_bytes
        rms = shape.normalization == "RMSNorm"
        total += own * ((4 + e) * shape.hidden_size + 4) if rms else own * (e * shape.hidden_size + 8)
        total += e * samples * positions * shape.hidden_size
    return total


def loss_bytes(shape: ModelShape, layout: Layout, stage: Stage, device: Literal["cuda", "cpu"] = "cuda") -> int:
    """Bytes of the head's gradient (float32, and its scaled copy) and of the logits of one chunk, whichever moment is the larger.

    On a CPU 16-bit operands of that gradient are copied to float32.
    """
    rows = min(LOSS_CHUNK_ROWS, stage.micro_batch_size * stage.positions)
    vocabulary = shape.vocab_size if layout.tensor == 1 else shape.padded_vocab_size // layout.tensor
    e = layout.element_bytes
    widened = 4 * rows * (vocabulary + shape.hidden_size) if device == "cpu" and e == 2 else 0
    gradient = 4 * vocabulary * shape.hidden_size
    return gradient + max(e * rows * vocabulary + widened, gradient + (e * vocabulary * shape.hidden_size if e == 2 else 0))


def micro_batches_in_flight(layout: Layout, stage: Stage, pipeline_rank: int) -> int:
    """Micro-batches whose activations a pipeline stage holds at once under 1F1B: as many as there are stages from it on."""
    return min(layout.pipeline - pipeline_rank, stage.gradient_accumulation(layout.data))


def _states(shape: ModelShape, layout: Layout, parameters: int) -> tuple[float, float, float]:
    """(weights, gradients that outlive a micro-batch, optimizer) in bytes."""
    p, d, e = parameters, layout.data, layout.element_bytes
    if layout.zero_stage == 0:
        return (4 + (2 if e == 2 else 0)) * p, 4 * p, 8 * p
    optimizer = 12 * p / d
    if layout.zero_stage == 1 and layout.precision == "bf16":
        return e * p, (4 + e) * p, optimizer
    if layout.zero_stage == 1:
        return e * p, e * p + 4 * p / d, optimizer
    # Seen in DeepSpeed 0.19.8: the sum so far, and a micro-batch's part twice; ZeRO 3 keeps one more.
    if layout.zero_stage == 2:
        return e * p, (4 + 2 * e) * p / d, optimizer
    return e * (p / d + min(p, ZERO3_LIVE_ELEMENTS)), (8 + 2 * e) * p / d, optimizer


def rank_memory(
    shape: ModelShape, layout: Layout, layers: range, pipeline_rank: int, stage: Stage, device: Literal["cuda", "cpu"] = "cuda"
) -> Memory:
    """Memory of each rank of a pipeline stage while it trains in a stage of the run.

    Args:
        shape: the model.
        layout: the ranks.
        layers: that the rank holds.
        pipeline_rank: which pipeline stage it is.
        stage: of the run.
        device: where it runs; see `loss_bytes`.
    """
    parameters = rank_parameters(shape, layout, layers)
    weights, gradients, optimizer = _states(shape, layout, parameters)
    alive = micro_batches_in_flight(layout, stage, pipeline_rank)
    activations = float(alive * saved_by_layers(shape, layout, layers, stage))
    residual = _residual(shape, layout, stage.micro_batch_size, stage.positions)
    if layout.recompute == "full":
        # The block that the backward pass has open.
        activations += saved_by_block(shape, layout, stage.micro_batch_size, stage.positions)
    loss = float(loss_bytes(shape, layout, stage, device)) if shape.num_layers + 1 in layers else 0.0
    # A pipeline keeps what came in and what goes out for each micro-batch in flight.
    buffers = float(2 * max(2, alive) * residual) if layout.pipeline > 1 else 2.0 * residual
    reduced = min(parameters, REDUCE_ELEMENTS)
    if layout.zero_stage > 1 or (layout.zero_stage == 1 and layout.precision != "bf16"):
        # Allocated whole, however small the model is.
        buffers += layout.element_bytes * layout.bucket_elements
    step = 0.0
    if layout.zero_stage == 1 and layout.precision == "bf16":
        step = 6.0 * reduced
    elif layout.zero_stage > 0:
        step = 4.0 * parameters / layout.data
    # The step comes when activations are gone: only what it needs beyond them counts.
    buffers += max(0.0, step - activations - loss - buffers)
    if layout.offload_optimizer:
        optimizer = 0.0
    if layout.offload_weights:
        weights = layout.element_bytes * min(parameters, ZERO3_LIVE_ELEMENTS)
    plain = Memory(weights, gradients, optimizer, activations, loss, buffers)
    return Memory(weights, gradients, optimizer, activations, loss, buffers, FRAGMENTATION * plain.total if device == "cuda" else 0.0)
