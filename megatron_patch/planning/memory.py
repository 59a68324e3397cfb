"""Peak memory of a rank during a step, in bytes, by part.

In: model, layout, stage, pipeline rank. Out: `Memory`. Weights, optimizer states and saved activations are **counted**, tensor by tensor:
what DeepSpeed's engines keep and what torch's autograd saves for this model's operators (tests/planning/test_memory.py and
tests/distributed/test_memory.py compare them with torch). Gradients in flight, the loss, buffers and fragmentation are **estimated**: their
sizes are known, but not which of them are in memory at the same time.

The peak is at one of two moments: at the start of the backward pass of a step's last micro-batch, when all activations and the accumulated
gradients are in memory; or in the optimizer step, when gradients are reduced through flat copies and full matrices are orthogonalized.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, fields
from typing import Literal

from megatron_patch.model.expert_shape import ExpertShape
from megatron_patch.model.parameters import is_hidden_matrix, parameters_of_layers, shard_numel
from megatron_patch.model.shape import ModelShape
from megatron_patch.model.sharding import gathers_keys, heads_of_rank, is_expert_parameter
from megatron_patch.planning.hidden_matrices import matrix_step
from megatron_patch.planning.layout import Layout
from megatron_patch.stages import Stage

LOSS_CHUNK_ROWS = 4096
"""Rows whose logits are in memory at once. The loss operator uses the same number, which a test checks."""
FRAGMENTATION = 0.05
"""Allowance for the allocator's rounding and gaps, as a share of all other parts: an estimate, not a measurement."""
REDUCE_ELEMENTS = 500_000_000
"""Elements of several groups of parameters that DeepSpeed's optimizer for bfloat16 reduces in one flat copy."""
EXPERT_IMBALANCE = 1.2
"""Pairs of positions and experts of the rank that has most, relative to the mean, where ranks hold different experts: an allowance for
balanced training. It grows with the number of ranks, and is 1 to 4 where nothing balances the load."""
ZERO3_LIVE_ELEMENTS = 100_000_000
"""Weights that ZeRO 3 keeps gathered in addition to its shards: its prefetch bucket and the small parameters that it never shards."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by part.

    Args:
        weights: weights as the forward pass reads them.
        gradients: gradients that outlive a micro-batch.
        optimizer: float32 master weights and the optimizer's state: two float32 values for each parameter; Muon has one for elements of
            hidden matrices and two for all other parameters.
        activations: tensors that autograd saves for the micro-batches in flight.
        loss: gradient of the head, and the logits of one chunk.
        buffers: flat copies for communication and for the optimizer step.
        fragmentation: the allowance `FRAGMENTATION`.
        matrices: what the buffers of orthogonalization need on top of all that was freed before the step; 0 if the optimizer has none.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    buffers: float
    fragmentation: float = 0.0
    matrices: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return sum(getattr(self, f.name) for f in fields(self))

    def to_json(self) -> dict[str, float]:
        """Returns the bytes by part, and their total."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"total": self.total}


COUNTED_PARTS = frozenset({"weights", "optimizer", "activations"})
"""Parts of `Memory` that are counted exactly; the others are estimates."""


def rank_parameters(shape: ModelShape, layout: Layout, layers: range) -> int:
    """Returns the exact number of parameters of each rank that holds these layers, including its share of the vocabulary's padding.

    All tensor-parallel ranks of a layer hold the same number: matrices are sharded evenly; norms and unsharded keys are replicated.
    """
    return _sizes(shape, layout.tensor, layout.experts, layers).parameters


def expert_parameters(shape: ModelShape, layout: Layout, layers: range) -> int:
    """Returns how many of these are in experts that data-parallel ranks divide; 0 without expert parallelism."""
    return _sizes(shape, layout.tensor, layout.experts, layers).experts if layout.experts > 1 else 0


def hidden_parameters(shape: ModelShape, layout: Layout, layers: range) -> int:
    """Returns how many parameters of a rank with these layers are elements of hidden matrices, for which Muon keeps less state."""
    return _sizes(shape, layout.tensor, layout.experts, layers).hidden


@dataclass(frozen=True)
class _Sizes:
    """Elements of a rank's parameters: of all, of the largest tensor, of hidden matrices, of experts."""

    parameters: int
    largest: int
    hidden: int
    experts: int


@functools.lru_cache(maxsize=4096)  # a search asks for the same layers many times
def _sizes(shape: ModelShape, tensor: int, experts: int, layers: range) -> _Sizes:
    full = parameters_of_layers(shape, layers)
    sizes = {name: shard_numel(name, size, shape, tensor) // (experts if is_expert_parameter(name) else 1) for name, size in full.items()}
    hidden = sum(numel for name, numel in sizes.items() if is_hidden_matrix(name, len(full[name])))
    of_experts = sum(numel for name, numel in sizes.items() if is_expert_parameter(name))
    return _Sizes(sum(sizes.values()), max(sizes.values(), default=0), hidden, of_experts)


def sent_key_heads(shape: ModelShape, layout: Layout, context: int) -> int:
    """Returns the key heads of a rank that ranks of context parallelism exchange: where they share heads, each must get at least one."""
    _, heads = heads_of_rank(shape, layout.tensor)
    return heads if gathers_keys(shape, layout.tensor, context, layout.context_exchange) else max(heads, context)


def norm_bytes(shape: ModelShape, layout: Layout) -> int:
    """Returns the bytes that RMSNorm saves for each number: its input in float32 and the normalized input."""
    return 8 if shape.zero_centered_norms else 4 + layout.element_bytes


def softcap_bytes(shape: ModelShape, layout: Layout, samples: int, positions: int, context: int = 1) -> int:
    """Returns the bytes of T x T scores that a block saves where scores are capped: tanh, and weights in float32, rounded in 16 bits.

    Context-parallel ranks have all scores of a share of the heads, or a share of the scores of all heads.
    """
    e = layout.element_bytes
    return samples * (shape.num_attention_heads // layout.tensor) * context * positions**2 * (e + 4 + (e if e == 2 else 0))


def saved_by_block(shape: ModelShape, layout: Layout, stage: Stage, number: int) -> int:
    """Returns the bytes that autograd saves in one block for one micro-batch, without full recomputation; exact for fused attention.

    Per position, each norm saves its input and the normalized input (float32, then the activation's dtype) and a factor; each group of
    projections saves its input; attention saves its queries, keys, values, output and one float32 per head; the feed-forward layer saves
    its products (of experts, see `_saved_by_experts`). With sequence parallelism, norms see a share of the positions and projections see
    all of them. With context parallelism, attention has all positions of a share of the heads, as many values as before, but it saves
    copies of key heads fewer than ranks; and the output is saved in both forms. Ranks that gather keys and values save those of all
    positions.

    Args:
        shape: the model.
        layout: tensor and sequence parallelism, precision, recomputation.
        stage: the stage, with its micro-batch, the positions of a rank and the context-parallel size.
        number: number of the block, from 0.
    """
    samples, positions, context = stage.micro_batch_size, stage.rank_positions, stage.context_parallel_size
    e, t = layout.element_bytes, layout.tensor
    rows = samples * positions
    norm_rows = rows // t if layout.sequence_parallel else rows
    hidden = shape.hidden_size
    queries, attended_keys = (heads * shape.head_size for heads in heads_of_rank(shape, t))
    count = 2 * (shape.norms_before + shape.norms_after)
    if shape.normalization == "RMSNorm":
        # In float32 the normalized input is not copied; in 16 bits a float32 copy of the input is saved instead of the input.
        norms = count * (norm_rows * (norm_bytes(shape, layout) * hidden + 4) + (4 * hidden if shape.zero_centered_norms else 0))
    else:
        norms = count * norm_rows * (e * hidden + 8)
    inputs = 2 * rows * e * hidden
    gathers = gathers_keys(shape, t, context, layout.context_exchange)
    kept_keys = sent_key_heads(shape, layout, context) * shape.head_size
    if shape.attention_softcap is not None and layout.recompute != "selective":
        kept_keys = queries  # keys and values are repeated for each query head
    attention = rows * e * (2 * queries + 2 * kept_keys * (context if gathers else 1))
    if context > 1 and not gathers and layout.recompute != "selective":
        attention += rows * e * queries
    if layout.recompute != "selective" and shape.attention_softcap is not None:
        attention += softcap_bytes(shape, layout, samples, positions, context)
    elif layout.recompute != "selective":
        attention += rows * 4 * (shape.num_attention_heads // t)
    if shape.qk_norm:
        factors = 2 if shape.qk_norm_scope == "all" else (queries + attended_keys) // shape.head_size
        attention += rows * (norm_bytes(shape, layout) * (queries + attended_keys) + 4 * factors)
        attention += 2 * 4 * shape.head_size if shape.zero_centered_norms else 0
    if (experts := shape.experts_of(number)) is not None:
        return norms + inputs + attention + _saved_by_experts(shape, experts, layout, stage, rows)
    return norms + inputs + attention + rows * e * shape.ffn_hidden_size // t * (4 if shape.gated else 2)


def _saved_by_kind(shape: ModelShape, layout: Layout, layers: range, stage: Stage) -> list[tuple[int, int]]:
    """Returns (number of blocks, bytes that autograd saves in each of them) of the blocks with and without experts in these layers."""
    kinds: dict[bool, list[int]] = {}
    for layer in layers:
        if 1 <= layer <= shape.num_layers:
            kinds.setdefault(shape.experts_of(layer - 1) is not None, []).append(layer - 1)
    return [(len(blocks), saved_by_block(shape, layout, stage, blocks[0])) for blocks in kinds.values()]


def _saved_by_experts(shape: ModelShape, experts: ExpertShape, layout: Layout, stage: Stage, rows: int) -> int:
    """Returns the bytes that autograd saves in the feed-forward layer of a block with experts, without the input that others save too.

    Per position, the router saves its input in float32, its scores, the gradient of the balance terms and the choices; per pair of a
    position and an expert, the row, five inner activations, a weight, and two places in the order of pairs. Tensor-parallel ranks have
    equally many pairs on average.

    Args:
        shape: the model.
        experts: the experts.
        layout: tensor parallelism and precision.
        stage: the stage.
        rows: positions of the micro-batch.
    """
    e, t, k, inner = layout.element_bytes, layout.tensor, experts.top_k, experts.ffn_hidden_size
    balance = stage.expert_balance
    gradient = balance.aux_loss_coeff > 0 or balance.z_loss_coeff > 0
    router = rows * (4 * experts.count * (2 if gradient else 1) + 3 * 8 * k + (4 * (k + 1) if experts.renormalized else 0))
    pairs = rows * k // t
    routed = pairs * (e * (shape.hidden_size + 5 * inner) + 4) + 4 * experts.count // t
    shared = rows * e * experts.shared_ffn_hidden_size // t * 4
    if e == 4:
        return router + routed + shared
    # The router saves float32 copies of its input and its weight. Nothing else saves the input, unless there is a shared expert.
    copies = 4 * shape.hidden_size * (rows + experts.count)
    return router + routed + shared + copies - (0 if experts.shared_ffn_hidden_size else rows * e * shape.hidden_size)


def _residual(shape: ModelShape, layout: Layout, samples: int, positions: int) -> int:
    """Returns the bytes of the hidden states between two layers."""
    share = layout.tensor if layout.sequence_parallel else 1
    return layout.element_bytes * samples * positions * shape.hidden_size // share


def saved_by_layers(shape: ModelShape, layout: Layout, layers: range, stage: Stage) -> int:
    """Returns the bytes that autograd saves in these layers for one micro-batch of a stage.

    The number is exact, but with full recomputation it omits the block that the backward pass recomputes at the moment.
    """
    samples, positions = stage.micro_batch_size, stage.rank_positions
    blocks = len([layer for layer in layers if 1 <= layer <= shape.num_layers])
    if layout.recompute == "full":
        total = blocks * _residual(shape, layout, samples, positions)
    else:
        total = sum(number * saved for number, saved in _saved_by_kind(shape, layout, layers, stage))
    if blocks and shape.position_embedding == "rope":
        windows = [shape.window_of(layer - 1) for layer in layers if 1 <= layer <= shape.num_layers]
        tables = 1 if shape.windowed_rotary_base is None else len({window is None for window in windows})
        total += tables * 2 * layout.element_bytes * positions * shape.head_size
    if blocks and shape.attention_softcap is not None and layout.recompute == "none":
        # The masks; where samples hold several documents, each sample has its own.
        total += len({shape.window_of(layer - 1) for layer in layers if 1 <= layer <= shape.num_layers}) * positions**2
    if 0 in layers:
        total += 8 * samples * positions * stage.input_patch_size
        total += 8 * positions if shape.position_embedding == "learned" else 0
    if shape.num_layers + 1 in layers:
        norm_rows = samples * positions // (layout.tensor if layout.sequence_parallel else 1)
        e = layout.element_bytes
        rms = shape.normalization == "RMSNorm"
        width = norm_bytes(shape, layout) if rms else e
        total += norm_rows * (width * shape.hidden_size + (4 if rms else 8))
        total += 4 * shape.hidden_size if shape.zero_centered_norms else 0
        total += e * samples * positions * shape.hidden_size
    return total


def loss_bytes(shape: ModelShape, layout: Layout, stage: Stage, device: Literal["cuda", "cpu"] = "cuda") -> int:
    """Returns the bytes of the head's float32 gradient plus the larger of one chunk's logits and the gradient's scaled copy.

    On a CPU, 16-bit operands of that gradient are copied to float32.
    """
    rows = min(LOSS_CHUNK_ROWS, stage.micro_batch_size * stage.rank_positions)
    vocabulary = shape.vocab_size if layout.tensor == 1 else shape.padded_vocab_size // layout.tensor
    e = layout.element_bytes
    widened = 4 * rows * (vocabulary + shape.hidden_size) if device == "cpu" and e == 2 else 0
    gradient = 4 * vocabulary * shape.hidden_size
    chunks = 1 if shape.logit_softcap is None else 2
    return gradient + max(chunks * e * rows * vocabulary + widened, gradient + (e * vocabulary * shape.hidden_size if e == 2 else 0))


def micro_batches_in_flight(layout: Layout, stage: Stage, pipeline_rank: int) -> int:
    """Returns the number of micro-batches whose activations a pipeline rank holds at once under 1F1B.

    It is the number of pipeline ranks from this one to the last, at most the micro-batches of a step.
    """
    return min(layout.pipeline - pipeline_rank, stage.gradient_accumulation(layout.data))


def _bf16_optimizer(layout: Layout) -> bool:
    """Whether DeepSpeed uses its optimizer for bfloat16, which it does only for ZeRO 1 without offload."""
    return layout.zero_level == 1 and layout.precision == "bf16" and not layout.offload_optimizer


def _reduction(layout: Layout, parameters: int, largest: int) -> tuple[float, float]:
    """Returns the bytes with which gradients are reduced over data-parallel ranks: (during the backward pass, in the optimizer step).

    Args:
        layout: layout of the run.
        parameters: number of parameters of the rank.
        largest: number of elements of its largest tensor, which is reduced whole even if it is larger than a bucket.
    """
    e, c = layout.element_bytes, layout.communication_bytes
    if layout.zero_level == 0:
        return 0.0, 0.0
    if _bf16_optimizer(layout):
        # One flat float32 copy; groups of parameters that are larger are reduced in place. Another type needs a copy of its own.
        joined = parameters if parameters <= REDUCE_ELEMENTS else 0
        return 0.0, 4.0 * joined + (c * parameters if c != 4 else 0)
    # DeepSpeed allocates the full bucket even for a small model: ZeRO 1 of the accumulated float32 gradients, ZeRO 2 in the type of the
    # weights, with a copy in the type of the reduction, ZeRO 3 in the type of the reduction.
    reduced = min(parameters, max(layout.bucket_elements, largest))
    bucket = {1: 4.0, 2: e, 3: c}[layout.zero_level] * layout.bucket_elements
    return bucket + (c * reduced if layout.zero_level == 2 and c != e else 0), 4.0 * parameters / layout.data


def state_values(parameters: int, hidden: int, layout: Layout) -> int:
    """Returns the float32 values that the optimizer keeps for parameters, of which some are elements of hidden matrices."""
    return layout.optimizer.hidden_states * hidden + layout.optimizer.other_states * (parameters - hidden)


def _states(layout: Layout, parameters: int, hidden: int) -> tuple[float, float, float]:
    """Returns the bytes of (weights, gradients that outlive a micro-batch, optimizer)."""
    p, d, e = parameters, layout.data, layout.element_bytes
    state = 4 * state_values(parameters, hidden, layout)
    if layout.zero_level == 0:
        return (4 + (2 if e == 2 else 0)) * p, 4 * p, state
    optimizer = (4 * p + state) / d
    if _bf16_optimizer(layout):
        return e * p, (4 if layout.immediate_gradients else 4 + e) * p, optimizer
    if layout.zero_level == 1:
        return e * p, e * p + 4 * p / d, optimizer
    # Measured with DeepSpeed 0.19.8: the accumulated gradients, and a micro-batch's shard twice; ZeRO 3 keeps one more copy.
    if layout.zero_level == 2:
        return e * p, (4 + 2 * e) * p / d, optimizer
    return e * (p / d + min(p, ZERO3_LIVE_ELEMENTS)), (8 + 2 * e) * p / d, optimizer


def _imbalance_bytes(shape: ModelShape, layout: Layout, layers: range, stage: Stage) -> float:
    """Returns what the rank whose experts are chosen most saves on top of the mean: `EXPERT_IMBALANCE` in every block at once.

    With expert parallelism a block also holds the rows that it sends and receives at the moment.
    """
    experts, ranks = shape.experts, layout.tensor * layout.experts
    if experts is None or ranks == 1:
        return 0.0
    pairs = stage.micro_batch_size * stage.rank_positions * experts.top_k / layout.tensor
    blocks = shape.expert_layers(layers)
    saved = pairs * layout.element_bytes * (shape.hidden_size + 5 * experts.ffn_hidden_size)
    exchanged = 2 * pairs * layout.element_bytes * shape.hidden_size if layout.experts > 1 else 0.0
    return (EXPERT_IMBALANCE - 1) * saved * (1 if layout.recompute == "full" else blocks) + EXPERT_IMBALANCE * exchanged


def rank_memory(
    shape: ModelShape,
    layout: Layout,
    layers: range,
    pipeline_rank: int,
    stage: Stage,
    device: Literal["cuda", "cpu"] = "cuda",
    node_devices: int = 8,
) -> Memory:
    """Returns the peak memory of each rank with this pipeline rank while it trains in a stage.

    Args:
        shape: shape of the model.
        layout: layout of the run.
        layers: layers that the rank holds.
        pipeline_rank: index of the rank in its pipeline.
        stage: the stage.
        device: kind of device, which changes `loss_bytes` and the allowance for fragmentation.
        node_devices: devices of a node, among which Muon chooses the owners of matrices.
    """
    sizes = _sizes(shape, layout.tensor, layout.experts, layers)
    parameters, largest = sizes.parameters, sizes.largest
    divided = sizes.experts if layout.experts > 1 else 0
    weights, gradients, optimizer = _states(layout, parameters - divided, sizes.hidden - divided)
    if divided:
        # The states of experts are divided among the ranks that hold the same ones.
        same = dataclasses.replace(layout, ranks=layout.ranks // layout.experts)
        of_experts = _states(same, divided, divided)
        weights, gradients, optimizer = weights + of_experts[0], gradients + of_experts[1], optimizer + of_experts[2]
    in_flight = micro_batches_in_flight(layout, stage, pipeline_rank)
    activations = float(in_flight * saved_by_layers(shape, layout, layers, stage))
    samples, positions, context = stage.micro_batch_size, stage.rank_positions, stage.context_parallel_size
    residual = _residual(shape, layout, samples, positions)
    if layout.recompute == "full":
        # The backward pass recomputes one block at a time.
        activations += max((saved for _, saved in _saved_by_kind(shape, layout, layers, stage)), default=0)
    elif layout.recompute == "selective" and shape.attention_softcap is not None:
        activations += softcap_bytes(shape, layout, samples, positions, context)
    loss = float(loss_bytes(shape, layout, stage, device)) if shape.num_layers + 1 in layers else 0.0
    # A pipeline keeps the received input and the output of each micro-batch in flight.
    buffers = float(2 * max(2, in_flight) * residual) if layout.pipeline > 1 else 2.0 * residual
    if context > 1:
        # One exchange of queries, keys, values or outputs holds what it sends and what it receives; one that gathers, all gradients.
        heads = heads_of_rank(shape, layout.tensor)[0] + 2 * sent_key_heads(shape, layout, context)
        if gathers_keys(shape, layout.tensor, context, layout.context_exchange):
            heads = 2 * context * sent_key_heads(shape, layout, context)
        buffers += 2 * layout.element_bytes * samples * positions * heads * shape.head_size
    bucket, step = _reduction(layout, parameters, largest)
    buffers += bucket + _imbalance_bytes(shape, layout, layers, stage)
    # Activations are freed before the optimizer step, so only the excess over them adds to the peak.
    buffers += max(0.0, step - activations - loss - buffers)
    work = matrix_step(shape, layout, layers, node_devices)
    # The flat copies of DeepSpeed's optimizer for bfloat16 are freed before the update, those of the others after it.
    step = (0.0 if _bf16_optimizer(layout) else step) + (0 if work is None else work.buffer_bytes)
    matrices = max(0.0, step - activations - loss - buffers)
    if layout.offload_optimizer:
        optimizer = 0.0
    if layout.offload_weights:
        weights = layout.element_bytes * min(parameters, ZERO3_LIVE_ELEMENTS)
    parts = Memory(weights, gradients, optimizer, activations, loss, buffers, matrices=matrices)
    return dataclasses.replace(parts, fragmentation=FRAGMENTATION * parts.total if device == "cuda" else 0.0)
