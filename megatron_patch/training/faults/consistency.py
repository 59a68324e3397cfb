"""Checks that ranks agree where they must: on program and options, weights of replicas, samples, and a loss that is computed twice.

In: an engine and a step's micro-batches. Out: nothing, or a `CorruptionError` on every rank that names what differs and on which node.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import xxhash

from megatron_patch.config.parsing import option_values
from megatron_patch.config.resolve import RunConfig
from megatron_patch.data.collate import PatchBatch
from megatron_patch.engine.distributed import gather_objects
from megatron_patch.engine.interface import Engine
from megatron_patch.errors import CorruptionError
from megatron_patch.parallel.grid import Grid

_SHOWN = 5
_PER_RANK = "local_rank"  # the launcher gives each rank another value


def _hosts(ranks: Sequence[int]) -> str:
    names = gather_objects(socket.gethostname())
    return ", ".join(f"rank {rank} on {names[rank]}" for rank in ranks)


def check_weights(engine: Engine) -> None:
    """Checks that ranks that hold the same parameters hold the same bits; every rank must call it.

    Raises:
        CorruptionError: the bits differ; the error names the parameters, the ranks and their hosts.
    """
    mismatches = engine.replica_mismatches()
    if not mismatches:
        return
    shown = "; ".join(f"{m.parameter}: rank {m.rank} differs from rank {m.reference_rank}" for m in mismatches[:_SHOWN])
    more = f" and {len(mismatches) - _SHOWN} more" if len(mismatches) > _SHOWN else ""
    raise CorruptionError(
        f"copies of weights differ between ranks: {shown}{more}",
        "the same bits on all ranks that hold a parameter",
        f"test or exclude {_hosts(sorted({m.rank for m in mismatches}))}, then run the same command: it resumes from the newest checkpoint",
    )


def check_batches(grid: Grid, batches: Sequence[PatchBatch], context_parallel_size: int = 1) -> None:
    """Checks that the ranks of a replica (one copy of the model), and replicas that share samples, read the same; every rank must call it.

    Args:
        grid: coordinates of this rank.
        batches: this rank's micro-batches of one step.
        context_parallel_size: replicas that share each sample. Whole samples are compared, not the parts of the ranks.

    Raises:
        CorruptionError: two ranks of a replica read different samples.
    """
    state = xxhash.xxh3_64()
    for batch in batches:
        state.update(batch.content_hash().to_bytes(8, "little"))
    local = grid.data_parallel_rank // context_parallel_size, state.intdigest()
    parts = [cast("tuple[int, int]", part) for part in gather_objects(local)]
    first: dict[int, tuple[int, int]] = {}
    for rank, (replica, value) in enumerate(parts):
        earlier, expected = first.setdefault(replica, (rank, value))
        if value != expected:
            raise CorruptionError(
                f"rank {rank} reads other samples than rank {earlier} of the same replica",
                "the same dataset files on all nodes",
                "compare the datasets on both nodes (tools/inspect_dataset.py --diff)",
            )


def replay(engine: Engine, batch: PatchBatch) -> None:
    """Checks that the loss of a micro-batch is the same when it is computed twice; every rank must call it.

    Args:
        engine: the engine with its current weights.
        batch: this rank's micro-batch.

    Raises:
        CorruptionError: a replica computed two different losses; its ranks and nodes are named.
    """
    pairs = [cast("tuple[float, float]", pair) for pair in gather_objects((engine.local_loss(batch), engine.local_loss(batch)))]
    differing = [rank for rank, (first, again) in enumerate(pairs) if first != again and not (first != first and again != again)]
    if differing:
        hosts, (first, again) = _hosts(differing), pairs[differing[0]]
        raise CorruptionError(
            f"the loss of a micro-batch is {first!r} and, computed again, {again!r}",
            "the same number",
            f"check the devices (error counters, burn-in test) of {hosts}; the same command resumes from the newest checkpoint",
        )


def check_programs(run: RunConfig) -> None:
    """Checks that all ranks run the same code and libraries with the same options, as each node may have its own installation.

    Every rank must call it.

    Args:
        run: this rank's run.

    Raises:
        CorruptionError: the programs differ; what differs and on which nodes is named.
    """
    local = _program(run)
    digests = gather_objects(xxhash.xxh3_64(repr(local).encode()).hexdigest())
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        parts = [cast("dict[str, str]", part) for part in gather_objects(local)]
        hosts, other = _hosts([0, *others[:_SHOWN]]), parts[others[0]]
        names = [name for name in parts[0] if parts[0][name] != other.get(name)]
        shown = ", ".join(f"{name} is {parts[0][name]} and {other.get(name)}" for name in names[:_SHOWN])
        raise CorruptionError(
            f"ranks run different programs: {shown}",
            "the same program, libraries and options on all nodes",
            f"compare {hosts}" + (f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""),
        )


def _program(run: RunConfig) -> dict[str, str]:
    """Returns what must be the same on all ranks: a digest of the code, versions of libraries, and the options."""
    package = Path(__file__).parent.parent.parent
    digest = xxhash.xxh3_64()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    code = {"the code of megatron_patch": digest.hexdigest()}
    versions = {name: str(sys.modules[name].__version__) for name in ("torch", "deepspeed", "numpy")}
    options = {name: repr(value) for name, value in option_values(run.options).items() if name != _PER_RANK}
    return {**code, **versions, **{f"option {name}": value for name, value in options.items()}}
