"""Do ranks that must agree agree? Copies of weights, the samples of a step, a micro-batch's loss computed twice.

In: an engine and a step's micro-batches. Out: nothing, or a `CorruptionError` on every rank that names what differs and where.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import cast

import xxhash

from megatron_patch.data.patch_dataset import PatchBatch
from megatron_patch.engine.distributed import gather_objects
from megatron_patch.engine.interface import Engine
from megatron_patch.errors import CorruptionError
from megatron_patch.parallel.grid import Grid

_SHOWN = 5


def _hosts(ranks: Sequence[int]) -> str:
    names = gather_objects(socket.gethostname())
    return ", ".join(f"rank {rank} on {names[rank]}" for rank in ranks)


def check_weights(engine: Engine) -> None:
    """Ranks that hold the same parameters hold the same bits.

    Raises:
        CorruptionError: they do not.
    """
    found = engine.disagreements()
    if found:
        shown = "; ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
        ranks = sorted({int(text.split(": rank ")[1].split()[0]) for text in found})
        raise CorruptionError(
            f"copies of weights differ: {shown}",
            "the same bits on all of them",
            f"test or leave out {_hosts(ranks)}; the same command goes on from the newest checkpoint",
        )


def check_batches(grid: Grid, batches: Sequence[PatchBatch]) -> None:
    """Ranks that share a model see the same samples.

    Raises:
        CorruptionError: they do not.
    """
    state = xxhash.xxh3_64()
    for batch in batches:
        state.update(batch.input_ids.cpu().numpy().tobytes())
        state.update(batch.labels.cpu().numpy().tobytes())
    parts = [cast("tuple[int, int]", part) for part in gather_objects((grid.data_parallel_rank, state.intdigest()))]
    first: dict[int, tuple[int, int]] = {}
    for rank, (replica, value) in enumerate(parts):
        earlier, expected = first.setdefault(replica, (rank, value))
        if value != expected:
            raise CorruptionError(
                f"rank {rank} reads other samples than rank {earlier}, with which it shares a model",
                "the same files on all nodes",
                "compare the datasets on their nodes (tools/inspect_dataset.py --diff)",
            )


def replay(engine: Engine, batch: PatchBatch) -> None:
    """The same micro-batch gives the same loss twice.

    Raises:
        CorruptionError: it does not.
    """
    losses = [engine.evaluate([batch]).loss for _ in range(2)]
    if losses[0] != losses[1] and not all(loss != loss for loss in losses):
        raise CorruptionError(
            f"a micro-batch's loss is {losses[0]!r} and, computed again, {losses[1]!r}",
            "the same number",
            "look for a sick device (its error counters, a burn-in test); the same command goes on from the newest checkpoint",
        )
