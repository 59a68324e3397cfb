"""Parameters and FLOPs by formula (no torch): what the plan, the metrics and MFU count with.

A multiplication and an addition are two FLOPs; only matrix products count, as everywhere in the field. Compute belongs to positions, not
to tokens: averaging K embeddings and gathering K labels are no matrix products, so a position costs the same at every K.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from megatron_patch.model.parameters import block_parameters, parameters_of_layers
from megatron_patch.model.shape import ModelShape


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part, without the padding rows of the vocabulary."""

    embedding: int
    blocks: int
    final_norm: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.blocks + self.final_norm + self.head


def block_matrices(shape: ModelShape) -> int:
    """Elements of the matrices that each position is multiplied with in one block."""
    return sum(math.prod(size) for size in block_parameters(shape).values() if len(size) > 1)


def parameter_count(shape: ModelShape) -> ParameterCount:
    """Counts a model's parameters."""
    whole = parameters_of_layers(shape, vocabulary_rows=shape.vocab_size)

    def sum_of(part: str) -> int:
        return sum(math.prod(size) for name, size in whole.items() if name.startswith(part))

    return ParameterCount(sum_of("embedding."), sum_of("blocks."), sum_of("final_norm."), sum_of("head."))


def forward_flops_per_position(shape: ModelShape, positions: int, causal: bool = True) -> float:
    """FLOPs of the forward pass for one position of a sample, averaged over its positions.

    2·(matrices of all blocks + head) + attention's two products of scores and values, 4·heads·head_size·(positions attended to). A
    causal position attends to (T + 1) / 2 positions on average; with `causal` False to all T, as implementations without masks compute.

    Args:
        shape: the model.
        positions: T of the sample.
        causal: count only what the causal mask leaves.
    """
    attended = (positions + 1) / 2 if causal else positions
    attention = 4 * shape.num_attention_heads * shape.head_size * attended
    return 2 * (shape.num_layers * block_matrices(shape) + shape.hidden_size * shape.vocab_size) + shape.num_layers * attention


def layer_parameters(shape: ModelShape) -> list[int]:
    """Parameters of each layer in a pipeline: embedding, blocks, final norm with head.

    A tied head counts: the last stage holds a copy of the embedding.
    """
    count = parameter_count(shape)
    head = count.final_norm + shape.vocab_size * shape.hidden_size
    return [count.embedding, *([count.blocks // shape.num_layers] * shape.num_layers), head]


def layer_flops(shape: ModelShape, positions: int) -> list[int]:
    """FLOPs of each of these layers for one position of the forward pass, causal; see `forward_flops_per_position`."""
    attention = 2 * shape.num_attention_heads * shape.head_size * (positions + 1)
    block = 2 * block_matrices(shape) + attention
    return [0, *([block] * shape.num_layers), 2 * shape.hidden_size * shape.vocab_size]


def training_flops_per_position(shape: ModelShape, positions: int) -> float:
    """FLOPs of forward and backward for one position: three times the forward pass; recomputation is not counted."""
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
"""Dense bfloat16 (V100: float16) tensor-core peaks with float32 accumulation, of the makers' data sheets, TFLOP/s."""


def peak_flops(device_name: str) -> float | None:
    """Peak FLOP/s of a device by its name, or None where it is not in the table.

    Whole words of the name are compared (an RTX A4000 is no A40); the longest entry that fits decides.
    """
    words = set(re.findall(r"[0-9A-Za-z]+", device_name))
    fitting = [name for name in _PEAK_TFLOPS if words.issuperset(name.split())]
    return _PEAK_TFLOPS[max(fitting, key=len)] * 1e12 if fitting else None
