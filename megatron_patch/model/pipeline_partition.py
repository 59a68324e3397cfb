"""The layers of each pipeline rank (no torch).

In: the weights of the embedding, the blocks and the head (parameters, FLOPs, or 1 for each block). Out: contiguous parts of the layers.
"""

from __future__ import annotations

import heapq
import itertools
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
        parts + 1 boundaries from 0 to L + 2: part i has the layers boundaries[i] to boundaries[i + 1] - 1.

    Raises:
        ConfigError: more pipeline ranks than layers.
    """
    embedding, *blocks, head = {
        "parameters": lambda: layer_parameters(shape),
        "flops": lambda: [round(flops) for flops in layer_flops(shape, positions)],
        "blocks": lambda: [0, *([1] * shape.num_layers), 0],
    }[balance]()
    if not 1 <= parts <= shape.num_layers + 1:
        raise ConfigError(
            f"--pipeline-model-parallel-size {parts} for {shape.num_layers} blocks and the head",
            f"1 to {shape.num_layers + 1}",
            "reduce --pipeline-model-parallel-size",
        )
    # Blocks with and without a window alternate, so each counts as their mean.
    block = round(sum(blocks) / len(blocks))
    counts = blocks_of_parts(embedding + block, block, head, shape.num_layers - 1, parts)
    # The embedding and its block are two more layers of the first part, the head is one of the last.
    counts[0] += 2
    counts[-1] += 1
    return list(itertools.accumulate(counts, initial=0))


def blocks_of_parts(first: int, block: int, last: int, blocks: int, parts: int) -> list[int]:
    """Divides equal blocks among parts, so that the heaviest part is as light as possible.

    Of all such divisions it returns the most even one (the least sum of squares), and of these the one whose later parts are lighter,
    because the first pipeline ranks wait least. Each block goes to the part that is the lightest so far: as all blocks weigh the same,
    no other order of choices gives a more even result.

    Args:
        first: weight that the first part has in addition to its blocks.
        block: weight of a block.
        last: weight that the last part has in addition to its blocks.
        blocks: number of blocks.
        parts: number of parts; those between the first and the last have at least one block each.

    Returns:
        The number of blocks of each part.
    """
    if parts == 1:
        return [blocks]
    counts = [0, *([1] * (parts - 2)), 0]
    lightest = [(first, 0), *((block, part) for part in range(1, parts - 1)), (last, parts - 1)]
    heapq.heapify(lightest)
    for _ in range(blocks - (parts - 2)):
        weight, part = lightest[0]
        counts[part] += 1
        heapq.heapreplace(lightest, (weight + block, part))
    return counts
