"""Which rank orthogonalizes which matrix, and which spans the ranks exchange for that (no torch).

In: the spans of the hidden matrices that each rank holds. Out: this rank's `ExchangePlan`. Every rank computes the plan from the same
spans, so that sizes and order of all messages agree without further communication.

Each matrix has one **owner**. Every span of the matrix is sent to its owner by one of the ranks that hold it, and the result goes back to
all of them, so that copies on several ranks stay equal to the last bit. Ownership follows two aims: no rank computes much more than the
mean, and a matrix belongs to the rank that already holds most of it, which under ZeRO 1 and 2 often means that nothing is sent.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_patch.model.sharding import Shard

WAVE_LIMIT = 1 << 26
"""Number of elements that an owner collects, or sends, at a time."""
_SLACK = 1.05
"""Load of a rank, relative to the mean, up to which a matrix may go to the rank that holds most of it."""


@dataclass(frozen=True)
class MatrixSpan:
    """A span of a matrix, or of a tensor-parallel shard of it, that a rank holds.

    Args:
        name: the parameter's name.
        shape: (rows, columns) of the full matrix.
        shard: the tensor-parallel shard that contains the span; None if the matrix is not sharded.
        start: first element in the flattened shard.
        numel: number of elements.
        tensor: index of the tensor, among those that the optimizer steps together, that holds the span.
        offset: first element in that tensor, flattened.
    """

    name: str
    shape: tuple[int, int]
    shard: Shard | None
    start: int
    numel: int
    tensor: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Slice:
    """A contiguous part of one of the optimizer's tensors."""

    tensor: int
    offset: int
    numel: int


@dataclass(frozen=True)
class BufferSlice:
    """A contiguous part of the buffer in which an owner collects its matrices."""

    offset: int
    numel: int


@dataclass(frozen=True)
class OwnedMatrix:
    """A matrix in its owner's buffer, where its tensor-parallel shards lie one after another.

    Args:
        name: the parameter's name.
        shape: (rows, columns).
        dim: the dimension along which it is sharded; 0 without sharding.
        shards: number of shards.
        offset: first element in the buffer.
    """

    name: str
    shape: tuple[int, int]
    dim: int
    shards: int
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass
class Wave:
    """What a rank sends, receives and owns in one exchange; a step has several of them, so that buffers stay small.

    Args:
        ranks: number of ranks in the exchange.
        matrices: the matrices that this rank owns.
        numel: size of the buffer for them.
        sends: for each rank, the slices that go there, in the order of the message.
        receives: for each rank, where the spans of its message lie in the buffer. The results go back the same way.
        copies: spans of this rank's own matrices that it holds itself, as (slice, part of the buffer); their results stay here.
        returns: for each rank, the parts of the buffer whose results go there.
        arrivals: for each rank, the slices that its results belong to.
        exchanges: whether any rank sends anything to another one.
    """

    ranks: int
    matrices: list[OwnedMatrix] = field(default_factory=list)
    numel: int = 0
    sends: list[list[Slice]] = field(init=False)
    receives: list[list[BufferSlice]] = field(init=False)
    copies: list[tuple[Slice, BufferSlice]] = field(default_factory=list)
    returns: list[list[BufferSlice]] = field(init=False)
    arrivals: list[list[Slice]] = field(init=False)
    exchanges: bool = False

    def __post_init__(self) -> None:
        self.sends, self.arrivals = [[] for _ in range(self.ranks)], [[] for _ in range(self.ranks)]
        self.receives, self.returns = [[] for _ in range(self.ranks)], [[] for _ in range(self.ranks)]


@dataclass(frozen=True)
class ExchangePlan:
    """One rank's part in the exchanges of an optimizer step.

    Args:
        waves: the exchanges, in order; every rank has the same number of them.
        loads: floating-point operations of each rank.
        owners: name of each matrix -> its owner.
    """

    waves: list[Wave]
    loads: list[float]
    owners: dict[str, int]


@dataclass(frozen=True)
class HeldMatrix:
    """A matrix and who holds it.

    Args:
        name: the parameter's name.
        shape: (rows, columns).
        dim: the dimension along which it is sharded; 0 without sharding.
        shards: number of tensor-parallel shards.
        held: rank -> number of elements that it holds.
        spans: shard -> (first element, end, rank) of each span.
    """

    name: str
    shape: tuple[int, int]
    dim: int
    shards: int
    held: dict[int, int]
    spans: dict[int, list[tuple[int, int, int]]]


def orthogonalization_flops(shape: tuple[int, int], steps: int = 5) -> float:
    """Returns the floating-point operations of the Newton-Schulz steps on a matrix.

    With m the smaller and n the larger size, a step has one product of m·n by n·m, one of m·m by m·m, and one of m·m by m·n.
    """
    small, large = sorted(shape)
    return steps * (4 * small * small * large + 2 * small**3)


def collect_matrices(spans: Sequence[Sequence[MatrixSpan]]) -> list[HeldMatrix]:
    """Returns all matrices whose spans the ranks hold, the one that costs most first."""
    found: dict[str, HeldMatrix] = {}
    for rank, local in enumerate(spans):
        for span in local:
            dim, index, count = (0, 0, 1) if span.shard is None else (span.shard.dim, span.shard.index, span.shard.count)
            if (matrix := found.get(span.name)) is None:
                matrix = found[span.name] = HeldMatrix(span.name, span.shape, dim, count, {}, {})
            matrix.held[rank] = matrix.held.get(rank, 0) + span.numel
            matrix.spans.setdefault(index, []).append((span.start, span.start + span.numel, rank))
    return sorted(found.values(), key=order_of_cost)


def order_of_cost(matrix: HeldMatrix) -> tuple[float, str]:
    """Returns a key that sorts the matrix that costs most first."""
    return -orthogonalization_flops(matrix.shape), matrix.name


def assign_owners(matrices: Sequence[HeldMatrix], ranks: int) -> tuple[dict[str, int], list[float]]:
    """Returns the owner of each matrix and the load of each rank.

    Among the ranks that hold at least half as much of a matrix as the rank with the largest part, and whose load stays at most 5 % above
    the mean, the one with the largest part gets it. If there is none, a rank with the lowest load gets it, if possible one that holds a
    part. If all ranks hold the same, the lowest load decides.

    Args:
        matrices: in the order of `order_of_cost`.
        ranks: number of ranks.
    """
    loads = [0.0] * ranks
    limit = _SLACK * sum(orthogonalization_flops(matrix.shape) for matrix in matrices) / ranks
    lowest = [(0.0, rank) for rank in range(ranks)]  # a heap; entries of earlier loads are dropped when they come up
    owners = {}
    for matrix in matrices:
        price, held = orthogonalization_flops(matrix.shape), matrix.held
        while loads[lowest[0][1]] != lowest[0][0]:
            heapq.heappop(lowest)
        least, owner = lowest[0]
        most = max(held.values())
        # If all ranks hold the same, the rank with the lowest load is the right one in both cases.
        if len(held) < ranks or min(held.values()) < most:
            near = [rank for rank, numel in held.items() if 2 * numel >= most and loads[rank] + price <= limit]
            if near:
                owner = max(near, key=lambda rank: (held[rank], -loads[rank], -rank))
            elif equal := [rank for rank in held if loads[rank] == least]:
                owner = min(equal, key=lambda rank: (-held[rank], rank))
        owners[matrix.name] = owner
        loads[owner] += price
        heapq.heappush(lowest, (loads[owner], owner))
    return owners, loads


class SenderChoice:
    """Chooses which rank sends a span of a matrix to the matrix's owner.

    Args:
        ranks: number of ranks.
    """

    def __init__(self, ranks: int) -> None:
        self._sent = [0] * ranks

    def choose(self, owner: int, holders: Sequence[int], numel: int) -> int:
        """Returns the owner if it holds the span itself, else the holder that has sent least so far of what several ranks hold."""
        if owner in holders:
            return owner
        if len(holders) == 1:
            return holders[0]
        sender = min(holders, key=lambda holder: (self._sent[holder], holder))
        self._sent[sender] += numel
        return sender


def _cut_at_edges(spans: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, int, list[int]]]:
    """Yields (first element, end, ranks that hold it) of the pieces into which the edges of all spans cut a shard."""
    holders: dict[tuple[int, int], list[int]] = {}
    for start, end, rank in spans:
        holders.setdefault((start, end), []).append(rank)
    waiting = sorted(holders, reverse=True)
    active: list[tuple[int, int]] = []
    for first, last in itertools.pairwise(sorted({edge for span in holders for edge in span})):
        active = [span for span in active if span[1] > first]
        while waiting and waiting[-1][0] <= first:
            active.append(waiting.pop())
        yield first, last, sorted(rank for span in active for rank in holders[span])


def assign_waves(matrices: Sequence[HeldMatrix], owners: Mapping[str, int], limit: int) -> list[list[HeldMatrix]]:
    """Returns the matrices by wave: each owner collects at most `limit` elements in a wave, and sends as many, or it takes one matrix.

    Where many ranks hold copies (ZeRO 0), an owner sends more than it collects.
    """
    waves: list[list[HeldMatrix]] = []
    state: dict[int, tuple[int, int]] = {}  # owner -> (its current wave, elements in it)
    for matrix in matrices:
        owner = owners[matrix.name]
        numel = max(math.prod(matrix.shape), sum(matrix.held.values()) - matrix.held.get(owner, 0))
        wave, filled = state.get(owner, (0, 0))
        if filled and filled + numel > limit:
            wave, filled = wave + 1, 0
        state[owner] = (wave, filled + numel)
        while len(waves) <= wave:
            waves.append([])
        waves[wave].append(matrix)
    return waves


def plan_exchange(spans: Sequence[Sequence[MatrixSpan]], rank: int, wave_limit: int) -> ExchangePlan:
    """Returns what a rank owns, sends and receives.

    Args:
        spans: the spans of each rank, by rank.
        rank: the rank of the plan.
        wave_limit: number of elements that an owner collects, or sends, in one wave, unless it takes a single matrix.
    """
    ranks, matrices = len(spans), collect_matrices(spans)
    owners, loads = assign_owners(matrices, ranks)
    local: dict[tuple[str, int], list[MatrixSpan]] = {}
    for span in spans[rank]:
        local.setdefault((span.name, 0 if span.shard is None else span.shard.index), []).append(span)

    def slice_of(name: str, shard: int, first: int, last: int) -> Slice:
        (span,) = (span for span in local[name, shard] if span.start <= first and last <= span.start + span.numel)
        return Slice(span.tensor, span.offset + first - span.start, last - first)

    waves, senders = [], SenderChoice(ranks)
    for members in assign_waves(matrices, owners, wave_limit):
        wave = Wave(ranks)
        for matrix in members:
            owner, shard_numel = owners[matrix.name], math.prod(matrix.shape) // matrix.shards
            base = wave.numel
            if owner == rank:
                wave.matrices.append(OwnedMatrix(matrix.name, matrix.shape, matrix.dim, matrix.shards, base))
                wave.numel += math.prod(matrix.shape)
            for shard, first, last, holders in pieces(matrix):
                source = senders.choose(owner, holders, last - first)
                part = BufferSlice(base + shard * shard_numel + first, last - first)
                wave.exchanges = wave.exchanges or holders != [owner]
                held = slice_of(matrix.name, shard, first, last) if rank in holders else None
                if owner == rank:
                    if held is not None:
                        wave.copies.append((held, part))
                    else:
                        wave.receives[source].append(part)
                    for holder in holders:
                        if holder != rank:
                            wave.returns[holder].append(part)
                elif held is not None:
                    wave.arrivals[owner].append(held)
                    if source == rank:
                        wave.sends[owner].append(held)
        waves.append(wave)
    return ExchangePlan(waves, loads, owners)


def pieces(matrix: HeldMatrix) -> Iterator[tuple[int, int, int, list[int]]]:
    """Yields (shard, first element, end, ranks that hold it) of the pieces into which the spans cut a matrix."""
    shard_numel = math.prod(matrix.shape) // matrix.shards
    assert sorted(matrix.spans) == list(range(matrix.shards)), f"{matrix.name} lacks shards"
    for shard, spans in sorted(matrix.spans.items()):
        end = 0
        for first, last, holders in _cut_at_edges(spans):
            assert first == end, f"{matrix.name}: no rank holds element {end} of shard {shard}"
            end = last
            yield shard, first, last, holders
        assert end == shard_numel, f"{matrix.name}: shard {shard} has {end} of {shard_numel} elements"
