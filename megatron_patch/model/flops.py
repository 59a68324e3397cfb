"""Numbers of parameters and FLOPs by formula (no torch), for the plan, the metrics and MFU.

A multiplication and an addition are two FLOPs, and only matrix products are counted, as is usual. The cost depends on positions, not on
tokens: averaging K embeddings and gathering K labels are not matrix products, so a position costs the same at every K.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_patch.model.parameters import block_parameters, parameters_of_layers, used_numel
from megatron_patch.model.shape import ModelShape


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters by part of the model, without the padding rows of the vocabulary.

    Args:
        embedding: embeddings of tokens and positions.
        blocks: all blocks.
        final_norm: the norm before the head.
        head: the head; 0 where it is tied.
        unused: parameters of the experts that one position does not choose; 0 in a model without experts.
    """

    embedding: int
    blocks: int
    final_norm: int
    head: int
    unused: int = 0

    @property
    def total(self) -> int:
        """The number of all parameters."""
        return self.embedding + self.blocks + self.final_norm + self.head

    @property
    def active(self) -> int:
        """The number of parameters that one position uses."""
        return self.total - self.unused


def block_matrices(shape: ModelShape, number: int) -> int:
    """Returns the number of elements of all matrices of a block, numbered from 0, that one position uses."""
    return sum(used_numel(name, size, shape) for name, size in block_parameters(shape, number).items() if len(size) > 1)


def _all_block_matrices(shape: ModelShape) -> int:
    return sum(block_matrices(shape, number) for number in range(shape.num_layers))


def parameter_count(shape: ModelShape) -> ParameterCount:
    """Returns the numbers of parameters of a model."""
    sizes = parameters_of_layers(shape, vocabulary_rows=shape.vocab_size)

    def sum_of(part: str) -> int:
        return sum(math.prod(size) for name, size in sizes.items() if name.startswith(part))

    unused = sum(math.prod(size) - used_numel(name, size, shape) for name, size in sizes.items())
    return ParameterCount(sum_of("embedding."), sum_of("blocks."), sum_of("final_norm."), sum_of("head."), unused)


def forward_flops_per_position(shape: ModelShape, positions: int, causal: bool = True) -> float:
    """Returns the FLOPs of the forward pass for one position, averaged over the positions of a sample.

    They are 2 · (elements of all matrices of the blocks and the head), plus the two products of attention in each block,
    4 · heads · head_size · (positions attended to); see `attended_positions`. Of experts, those count that a position chooses.

    Args:
        shape: the model's shape.
        positions: T, positions of a sample.
        causal: True: count only the scores that the causal mask, and the windows of blocks, keep; False: count all T for each position.
    """
    matrices = 2 * (_all_block_matrices(shape) + shape.hidden_size * shape.vocab_size)
    if not causal:
        return matrices + shape.num_layers * 4 * shape.num_attention_heads * shape.head_size * positions
    return matrices + attention_flops(shape, positions, range(shape.num_layers))


def attended_positions(positions: int, window: int | None = None) -> float:
    """Returns the number of positions that a position attends to, averaged over a sample.

    Without a window it is (T + 1) / 2. With a window of W below T positions, the first W positions attend to (W + 1) / 2 of them on
    average, and all others to W.

    Args:
        positions: T.
        window: W; None: no window.
    """
    if window is None or window >= positions:
        return (positions + 1) / 2
    return (window * (window + 1) / 2 + (positions - window) * window) / positions


def last_part_attended(positions: int, parts: int, window: int | None = None) -> float:
    """Returns to how many positions one of the last T / parts positions of a sample attends on average: those that most attend to.

    Args:
        positions: T.
        parts: equal parts of neighboring positions.
        window: W; None: no window.
    """
    before = positions - positions // parts
    attended = positions * attended_positions(positions, window) - before * attended_positions(before, window)
    return attended / (positions - before)


def attention_flops(shape: ModelShape, positions: int, blocks: Iterable[int]) -> float:
    """Returns the FLOPs of the two products of attention in blocks, for one position of the causal forward pass.

    Args:
        shape: the model's shape.
        positions: T, positions of a sample.
        blocks: numbers of the blocks, from 0.
    """
    attended = sum(attended_positions(positions, shape.window_of(block)) for block in blocks)
    return 4 * shape.num_attention_heads * shape.head_size * attended


def layer_parameters(shape: ModelShape) -> list[int]:
    """Returns the number of parameters of each pipeline layer: embedding, blocks, final norm with head.

    A tied head is counted, because the last pipeline rank holds a copy of the embedding.
    """
    count = parameter_count(shape)
    blocks = [sum(math.prod(size) for size in block_parameters(shape, number).values()) for number in range(shape.num_layers)]
    return [count.embedding, *blocks, count.final_norm + shape.vocab_size * shape.hidden_size]


def layer_flops(shape: ModelShape, positions: int) -> list[float]:
    """Returns the FLOPs of each of these layers for one position of the causal forward pass; see `forward_flops_per_position`."""
    blocks = [2 * block_matrices(shape, block) + attention_flops(shape, positions, [block]) for block in range(shape.num_layers)]
    return [0, *blocks, 2 * shape.hidden_size * shape.vocab_size]


def training_flops_per_position(shape: ModelShape, positions: int) -> float:
    """Returns the FLOPs of forward and backward pass for one position: three times the forward pass, without recomputation."""
    return 3 * forward_flops_per_position(shape, positions)


_PEAK_TFLOPS = {
    "GB300": 2500.0,
    "GB200": 2500.0,
    "B300": 2250.0,
    "B200": 2250.0,
    "GH200": 989.4,
    "H200": 989.4,
    "H200 NVL": 835.0,
    "H100": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H800": 989.4,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "L40S": 362.0,
    "V100": 125.0,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
"""Dense bfloat16 (V100: float16) tensor-core peaks in TFLOP/s, with float32 accumulation, from the vendors' data sheets."""


def peak_flops(device_name: str) -> float | None:
    """Returns the peak FLOP/s of a device by its name, or None if it is not in the table.

    Names are compared by full words (an RTX A4000 is not an A40); the longest matching entry is used.
    """
    words = set(re.findall(r"[0-9A-Za-z]+", device_name))
    fitting = [name for name in _PEAK_TFLOPS if words.issuperset(name.split())]
    return _PEAK_TFLOPS[max(fitting, key=len)] * 1e12 if fitting else None
