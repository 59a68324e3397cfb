"""Small corpora and plans for tests of the stream."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from megatron_patch.data.corpus import TokenCorpus
from megatron_patch.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_patch.stages import Stage, StagePlan


def write_numbers(prefix: Path, tokens: int, start: int = 0, length: int = 37) -> str:
    """A corpus in which token i is start + i, in documents of `length` tokens."""
    with IndexedDatasetWriter(str(prefix), np.dtype(np.int32)) as writer:
        numbers = np.arange(start, start + tokens, dtype=np.int32)
        lengths = np.full(-(-tokens // length), length)
        lengths[-1] = tokens - length * (len(lengths) - 1)
        writer.append(numbers, lengths)
        writer.finish()
    return str(prefix)


def corpus_of(folder: Path, *sizes: int) -> TokenCorpus:
    """A corpus of shards in which token i is i."""
    prefixes, start = [], 0
    for number, size in enumerate(sizes):
        prefixes.append(write_numbers(folder / f"shard{number}-{start}", size, start))
        start += size
    return TokenCorpus(prefixes)


def plan_of(entries: list[tuple[int, int, str]], positions: int = 4, batch: int = 6, micro: int = 1, blend=None) -> StagePlan:
    """A plan of (patch size, least steps, side) entries; steps are raised so that every stage but the last ends on a block."""
    samples = [positions * (1 if side == "output" else k) for k, _, side in entries]
    block = math.lcm(*samples)
    stages = []
    for number, ((k, steps, side), sample) in enumerate(zip(entries, samples, strict=True)):
        unit = block // math.gcd(block, sample * batch)
        steps = -(-steps // unit) * unit
        stages.append(Stage(f"s{number}", k, positions, micro, batch, steps, side=side, blend=(blend or {}).get(number)))
    return StagePlan(tuple(stages), block)
