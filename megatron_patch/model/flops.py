"""Numbers of parameters and FLOPs by formula (no torch), for the plan, the metrics and MFU.

A multiplication and an addition are two FLOPs, and only matrix products are counted, as is usual. The cost depends on positions, not on
tokens: averaging K embeddings and gathering K labels are not matrix products, so a position costs the same at every K.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from megatron_patch.model.parameters import block_parameters, parameters_of_layers
from megatron_patch.model.shape import ModelShape


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters by part of the model, without the padding rows of the vocabulary."""

    embedding: int
    blocks: int
    final_norm: int
    head: int

    @property
    def total(self) -> int:
        """The number of all parameters."""
        return self.embedding + self.blocks + self.final_norm + self.head


def block_matrices(shape: ModelShape) -> int:
    """Returns the number of elements of all matrices of one block."""
    return sum(math.prod(size) for size in block_parameters(shape).values() if len(size) > 1)


def parameter_count(shape: ModelShape) -> ParameterCount:
    """Returns the numbers of parameters of a model."""
    sizes = parameters_of_layers(shape, vocabulary_rows=shape.vocab_size)

    def sum_of(part: str) -> int:
        return sum(math.prod(size) for name, size in sizes.items() if name.startswith(part))

    return ParameterCount(sum_of("embedding."), sum_of("blocks."), sum_of("final_norm."), sum_of("head."))


def forward_flops_per_position(shape: ModelShape, positions: int, causal: bool = True) -> float:
    """Returns the FLOPs of the forward pass for one position, averaged over the positions of a sample.

    They are 2 · (elements of all matrices of the blocks and the head), plus the two products of attention in each block,
    4 · heads · head_size · (positions attended to). With the causal mask, a position attends to (T + 1) / 2 positions on average.

    Args:
        shape: the model's shape.
        positions: T, positions of a sample.
        causal: True: count only the scores that the causal mask keeps; False: count all T for each position.
    """
    attended = (positions + 1) / 2 if causal else positions
    attention = 4 * shape.num_attention_heads * shape.head_size * attended
    return 2 * (shape.num_layers * block_matrices(shape) + shape.hidden_size * shape.vocab_size) + shape.num_layers * attention


def layer_parameters(shape: ModelShape) -> list[int]:
    """Returns the number of parameters of each pipeline layer: embedding, blocks, final norm with head.

    A tied head is counted, because the last pipeline rank holds a copy of the embedding.
    """
    count = parameter_count(shape)
    head = count.final_norm + shape.vocab_size * shape.hidden_size
    return [count.embedding, *([count.blocks // shape.num_layers] * shape.num_layers), head]


def layer_flops(shape: ModelShape, positions: int) -> list[int]:
    """Returns the FLOPs of each of these layers for one position of the causal forward pass; see `forward_flops_per_position`."""
    attention = 2 * shape.num_attention_heads * shape.head_size * (positions + 1)
    block = 2 * block_matrices(shape) + attention
    return [0, *([block] * shape.num_layers), 2 * shape.hidden_size * shape.vocab_size]


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
