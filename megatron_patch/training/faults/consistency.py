"""Do ranks that must agree agree? Their programs, copies of weights, the samples of a step, a micro-batch's loss computed twice.

In: an engine and a step's micro-batches. Out: nothing, or a `CorruptionError` on every rank that names what differs and where.
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
_OWN = "local_rank"  # the launcher gives each rank another one


def _hosts(ranks: Sequence[int]) -> str:
    names = gather_objects(socket.gethostname())
    return ", ".join(f"rank {rank} on {names[rank]}" for rank in ranks)


def check_weights(engine: Engine) -> None:
    """Checks that ranks which hold the same parameters hold the same bits; every rank must call it.

    Raises:
        CorruptionError: they do not; the error names the parameters, the ranks and their hosts.
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
    """The same micro-batch gives the same loss twice, on every replica of the model.

    Raises:
        CorruptionError: it does not; with the ranks of the replicas where.
    """
    pairs = [cast("tuple[float, float]", pair) for pair in gather_objects((engine.local_loss(batch), engine.local_loss(batch)))]
    sick = [rank for rank, (first, again) in enumerate(pairs) if first != again and not (first != first and again != again)]
    if sick:
        hosts, (first, again) = _hosts(sick), pairs[sick[0]]
        raise CorruptionError(
            f"a micro-batch's loss is {first!r} and, computed again, {again!r}",
            "the same number",
            f"look for a sick device (its error counters, a burn-in test) at {hosts}; the same command goes on from the newest checkpoint",
        )


def check_programs(run: RunConfig) -> None:
    """All ranks run the same code, on the same versions of what it stands on, with the same options: nodes may have copies of their own.

    Raises:
        CorruptionError: they do not; it names what differs, and where.
    """
    mine = _program(run)
    digests = gather_objects(xxhash.xxh3_64(repr(mine).encode()).hexdigest())
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        parts = [cast("dict[str, str]", part) for part in gather_objects(mine)]
        hosts, other = _hosts([0, *others[:_SHOWN]]), parts[others[0]]
        names = [name for name in parts[0] if parts[0][name] != other.get(name)]
        shown = ", ".join(f"{name} is {parts[0][name]} and {other.get(name)}" for name in names[:_SHOWN])
        raise CorruptionError(
            f"ranks run different programs: {shown}",
            "one version of the program, of its libraries and of its options on all nodes",
            f"compare {hosts}" + (f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""),
        )


def _program(run: RunConfig) -> dict[str, str]:
    package = Path(__file__).parent.parent.parent
    digest = xxhash.xxh3_64()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    code = {"the code of megatron_patch": digest.hexdigest()}
    versions = {name: str(sys.modules[name].__version__) for name in ("torch", "deepspeed", "numpy")}
    options = {name: repr(value) for name, value in option_values(run.options).items() if name != _OWN}
    return {**code, **versions, **{f"option {name}": value for name, value in options.items()}}
