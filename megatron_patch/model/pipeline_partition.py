"""The layers of each pipeline rank (no torch).

In: the model's list of layers with a weight each (parameters, FLOPs, or 1 for each block). Out: contiguous parts of this list.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

from megatron_patch.errors import ConfigError
from megatron_patch.model.flops import layer_flops, layer_parameters
from megatron_patch.model.shape import ModelShape

Balance = Literal["parameters", "flops", "blocks"]


def pipeline_partition(shape: ModelShape, parts: int, balance: Balance, positions: int) -> list[int]:
    """Returns the layers (0: embedding, 1 to L: blocks, L + 1: final norm and head) of each pipeline rank.

    The first block stays with the embedding, because DeepSpeed's gradient norm deadlocks if a pipeline rank has no norm weights.

    Args:
        shape: the model's shape.
        parts: number of pipeline ranks.
        balance: the quantity to balance: parameters (memory), FLOPs (time), or the number of blocks.
        positions: positions of a sample, for the FLOPs.

    Returns:
        Boundaries, as `partition_layers` returns them.

    Raises:
        ConfigError: more pipeline ranks than layers.
    """
    weights = {
        "parameters": lambda: layer_parameters(shape),
        "flops": lambda: layer_flops(shape, positions),
        "blocks": lambda: [0, *([1] * shape.num_layers), 0],
    }[balance]()
    if parts > shape.num_layers + 1:
        raise ConfigError(
            f"--pipeline-model-parallel-size {parts} for {shape.num_layers} blocks and the head",
            f"1 to {shape.num_layers + 1}",
            "reduce --pipeline-model-parallel-size",
        )
    first, *inner = partition_layers([weights[0] + weights[1], *weights[2:]], parts)
    return [first, *(boundary + 1 for boundary in inner)]


def partition_layers(weights: Sequence[int], parts: int) -> list[int]:
    """Splits a list of layers into contiguous, non-empty parts, so that the heaviest part is as light as possible.

    Of all such partitions it returns the most even one (the least sum of squares), and of these the one whose later parts are lighter,
    because the first pipeline ranks wait least.

    Args:
        weights: weight of each layer.
        parts: number of parts.

    Returns:
        parts + 1 boundaries from 0 to len(weights): part i has the layers boundaries[i] to boundaries[i + 1] - 1.

    Raises:
        ConfigError: more parts than layers.
    """
    count = len(weights)
    if not 1 <= parts <= count:
        raise ConfigError(f"{parts} parts of {count} layers", f"1 to {count} parts", "change the number of parts")
    sums = list(itertools.accumulate(weights, initial=0))
    limit = _lightest_limit(weights, sums, parts)
    # best[i]: the least sum of squares of splitting the layers from i on into the remaining parts, and the end of the first of these.
    best: list[tuple[int, int] | None] = [None] * count + [(0, count)]
    tables = []
    for left in range(1, parts + 1):
        row: list[tuple[int, int] | None] = [None] * (count + 1)
        for start in range(count - left, -1, -1):
            for end in range(start + 1, count - left + 2):
                weight = sums[end] - sums[start]
                if weight > limit:
                    break
                rest = best[end]
                if rest is not None and (row[start] is None or weight * weight + rest[0] <= row[start][0]):  # type: ignore[index]
                    row[start] = (weight * weight + rest[0], end)
        best = row
        tables.append(row)
    boundaries = [0]
    for row in reversed(tables):
        step = row[boundaries[-1]]
        assert step is not None
        boundaries.append(step[1])
    return boundaries


def _lightest_limit(weights: Sequence[int], sums: Sequence[int], parts: int) -> int:
    """Returns the least weight that the heaviest part can have."""
    low, high = max(max(weights), -(-sums[-1] // parts)), sums[-1]
    while low < high:
        middle = (low + high) // 2
        if _parts_needed(weights, middle) <= parts:
            high = middle
        else:
            low = middle + 1
    return low


def _parts_needed(weights: Sequence[int], limit: int) -> int:
    needed, filled = 1, 0
    for weight in weights:
        if filled + weight > limit:
            needed, filled = needed + 1, 0
        filled += weight
    return needed
