"""The cost of an optimizer step that needs full matrices, such as Muon's: operations, traffic and buffers.

In: the matrices of the blocks, layout. Out: `MatrixStep`. Everything is **counted** with the rules by which the optimizer itself chooses
the owner of each matrix (`optimizers.ownership`), applied to the spans that ZeRO and tensor parallelism leave on each rank.
tests/planning/test_hidden_matrices.py compares the result with the plan of every rank, tests/distributed/test_planned_muon.py with runs.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_patch.model.parameters import block_parameters, is_hidden_matrix
from megatron_patch.model.shape import ModelShape
from megatron_patch.model.sharding import shard_of
from megatron_patch.optimizers.ownership import (
    WAVE_LIMIT,
    HeldMatrix,
    SenderChoice,
    assign_owners,
    assign_waves,
    order_of_cost,
    orthogonalization_flops,
)
from megatron_patch.planning.layout import Layout

_Sizes = tuple[tuple[str, tuple[int, int], int | None], ...]
"""Name within the block, shape and sharded dimension of each matrix of a block."""
_Pieces = list[tuple[int, list[int]]]
"""(number of elements, ranks that hold them) of the spans of a matrix, in the order of its elements."""
_ALIGNMENT = 2
"""DeepSpeed pads a flat group to a multiple of this number of elements a rank."""


@dataclass(frozen=True)
class MatrixStep:
    """What the ranks that hold the same layers do in a step to update their hidden matrices as a whole.

    Args:
        ranks: number of these ranks.
        matrices: number of matrices.
        waves: number of exchanges in a step; each sends matrices to their owners and results back.
        flops: FLOPs of one Newton-Schulz step on all matrices.
        critical_flops: of these, those that the step waits for: the largest load of a rank in each wave, or over all waves without traffic.
        owned_elements: elements of the matrices that a rank owns; the largest number of all ranks.
        owned_squares: the same for the square of each matrix's smaller side.
        sent: elements that each rank sends to others.
        node: elements that a rank sends inside its node, or receives, whichever is more; the largest number of all ranks.
        network: the same between nodes.
        buffer_bytes: bytes that are allocated for this at once; the largest number of all ranks.
    """

    ranks: int
    matrices: int
    waves: int
    flops: float
    critical_flops: float
    owned_elements: int
    owned_squares: int
    sent: tuple[int, ...]
    node: int
    network: int
    buffer_bytes: int

    @property
    def load_factor(self) -> float:
        """FLOPs that the step waits for, relative to an even division among the ranks; at least 1."""
        return self.critical_flops * self.ranks / self.flops


def matrix_step(shape: ModelShape, layout: Layout, layers: range, node_devices: int = 8) -> MatrixStep | None:
    """Returns what a step does with the hidden matrices of some layers, or None if the optimizer needs no full matrices or there are none.

    Args:
        shape: the model.
        layout: the ranks and how the states are divided among them.
        layers: layers of a pipeline rank.
        node_devices: devices of a node.
    """
    if not layout.optimizer.full_matrices:
        return None
    blocks = range(max(layers.start, 1) - 1, min(layers.stop - 1, shape.num_layers))
    if not blocks:
        return None
    level = 1 if layout.zero_level == 2 else layout.zero_level  # ZeRO 1 and 2 divide a group alike
    sub_group = layout.sub_group_elements if level == 3 else 0
    order = _order_of_names(blocks)
    return _matrix_step(shape, order, layout.tensor, layout.data, level, sub_group, layout.element_bytes, node_devices)


@functools.lru_cache(maxsize=1024)
def _order_of_names(blocks: range) -> tuple[int, ...]:
    """Returns the position of each block among the sorted names of their matrices, by which ownership breaks ties.

    Most pipeline ranks with the same number of blocks have the same order, and so the same step.
    """
    by_name = sorted(blocks, key=lambda block: f"{block}.")
    return tuple(map(by_name.index, blocks))


def _block_matrices(shape: ModelShape, tensor: int) -> _Sizes:
    found = []
    for name, size in block_parameters(shape).items():
        if is_hidden_matrix(f"blocks.0.{name}", len(size)):
            rows, columns = size
            shard = shard_of(name, shape, 0, tensor)
            found.append((name, (rows, columns), None if shard is None else shard.dim))
    return tuple(found)


class _Division:
    """How the hidden matrices of a pipeline rank are divided among its ranks, which are numbered with tensor parallelism innermost."""

    def __init__(self, sizes: _Sizes, blocks: int, tensor: int, data: int, zero_level: int) -> None:
        self._tensor, self._data, self._level = tensor, data, zero_level
        self._local = [math.prod(size) // (tensor if dim is not None else 1) for _, size, dim in sizes]
        self._block = sum(self._local)
        self._partition = -(-blocks * self._block // (_ALIGNMENT * data)) * _ALIGNMENT
        self._peers = [[place * tensor + rank for rank in range(tensor)] for place in range(data)]
        self._copies = [[place * tensor + rank for place in range(data)] for rank in range(tensor)]

    def shares(self, number: int, block: int) -> dict[int, int]:
        """Returns data-parallel rank -> its elements of a matrix, or of each shard of it.

        Args:
            number: number of the matrix in its block.
            block: number of the block, from the first one of the pipeline rank.
        """
        numel = self._local[number]
        if self._level == 0:
            return dict.fromkeys(range(self._data), numel)
        if self._level == 3:
            part = -(-numel // self._data)
            return {place: min(part, numel - part * place) for place in range(self._data) if numel > part * place}
        start = block * self._block + sum(self._local[:number])
        places = range(start // self._partition, (start + numel - 1) // self._partition + 1)
        edges = [start, *(place * self._partition for place in places[1:]), start + numel]
        return {place: after - before for place, (before, after) in zip(places, itertools.pairwise(edges), strict=True)}

    def held(self, shares: dict[int, int]) -> dict[int, int]:
        """Returns rank -> its elements of a matrix."""
        return {rank: numel for place, numel in shares.items() for rank in self._peers[place]}

    def pieces(self, sharded: bool, shares: dict[int, int], numel: int) -> _Pieces:
        """Returns the pieces of a matrix that several ranks hold; none if every element has one holder."""
        if self._level == 0:
            return [(numel // self._tensor, ranks) for ranks in self._copies] if sharded else [(numel, list(itertools.chain(*self._peers)))]
        return [] if sharded or self._tensor == 1 else [(part, self._peers[place]) for place, part in shares.items()]


@functools.lru_cache(maxsize=1024)  # a search asks for the same ranks many times
def _matrix_step(
    shape: ModelShape, order: tuple[int, ...], tensor: int, data: int, zero_level: int, sub_group: int, element_bytes: int, devices: int
) -> MatrixStep:
    sizes = _block_matrices(shape, tensor)
    division, ranks = _Division(sizes, len(order), tensor, data, zero_level), tensor * data
    repeated = zero_level in (0, 3)  # each block is divided in the same way
    known: dict[int, tuple[dict[int, int], _Pieces]] = {}
    units: list[list[HeldMatrix]] = [[]]
    pieces: dict[str, _Pieces] = {}
    filled = 0
    for index, place in enumerate(order):
        for number, (end_of_name, size, dim) in enumerate(sizes):
            name = f"{place:06}.{end_of_name}"
            if not repeated or number not in known:
                shares = division.shares(number, index)
                known[number] = division.held(shares), division.pieces(dim is not None, shares, math.prod(size))
            held, pieces[name] = known[number]
            # ZeRO 3 steps its sub-groups one after the other; each has full parameters, as many as fit.
            if sub_group and filled >= sub_group:
                units.append([])
                filled = 0
            filled += max(held.values())
            units[-1].append(HeldMatrix(name, size, dim or 0, 1 if dim is None else tensor, held, {}))
    ledger = _Ledger(ranks, element_bytes, devices)
    for unit in units:
        unit.sort(key=order_of_cost)
        owners, _ = assign_owners(unit, ranks)
        senders = SenderChoice(ranks)
        for members in assign_waves(unit, owners, WAVE_LIMIT):
            ledger.add_wave([(matrix, owners[matrix.name], pieces[matrix.name]) for matrix in members], senders)
    return ledger.result()


class _Ledger:
    """Adds up what the waves of a step do."""

    def __init__(self, ranks: int, element_bytes: int, node_devices: int) -> None:
        self._ranks, self._e, self._devices = ranks, element_bytes, node_devices
        self._sent, self._received, self._sent_near, self._received_near = (np.zeros(ranks, np.int64) for _ in range(4))
        self._elements, self._squares = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
        self._load = np.zeros(ranks)
        self._vectors: dict[int, tuple[dict[int, int], np.ndarray]] = {}
        self._waves = self._matrices = self._peak = 0
        self._flops = self._critical = 0.0

    def _vector(self, held: dict[int, int]) -> np.ndarray:
        """Returns the elements that each rank holds as an array."""
        if id(held) not in self._vectors:
            vector = np.zeros(self._ranks, np.int64)
            vector[list(held)] = list(held.values())
            self._vectors[id(held)] = held, vector  # the dictionary is kept, so that no other one gets its id
        return self._vectors[id(held)][1]

    def add_wave(self, members: Sequence[tuple[HeldMatrix, int, _Pieces]], senders: SenderChoice) -> None:
        """Adds a wave.

        Args:
            members: each matrix with its owner and the pieces that several ranks hold.
            senders: chooses who sends such a piece.
        """
        gathered_out, gathered_in, returned_out, returned_in = (np.zeros(self._ranks, np.int64) for _ in range(4))
        load, buffers = np.zeros(self._ranks), np.zeros(self._ranks, np.int64)
        alike: dict[int, dict[tuple[tuple[int, int], int, int], int]] = {}
        for matrix, owner, pieces in members:
            numel, price = math.prod(matrix.shape), orthogonalization_flops(matrix.shape, 1)
            node = slice(owner // self._devices * self._devices, (owner // self._devices + 1) * self._devices)
            others = self._vector(matrix.held).copy()
            others[owner] = 0
            count, near = int(others.sum()), int(others[node].sum())
            returned_out[owner] += count
            returned_in += others
            self._sent_near[owner] += near
            self._received_near[node] += others[node]
            if not pieces:
                gathered_out += others
                gathered_in[owner] += count
                self._sent_near[node] += others[node]
                self._received_near[owner] += near
            for part, holders in pieces:
                if (source := senders.choose(owner, holders, part)) != owner:
                    gathered_out[source] += part
                    gathered_in[owner] += part
                    if source // self._devices == owner // self._devices:
                        self._sent_near[source] += part
                        self._received_near[owner] += part
            load[owner] += price
            self._flops += price
            buffers[owner] += numel
            self._elements[owner] += numel
            self._squares[owner] += min(matrix.shape) ** 2
            groups = alike.setdefault(owner, {})
            key = (matrix.shape, matrix.dim, matrix.shards)
            groups[key] = groups.get(key, 0) + 1
        self._matrices += len(members)
        self._waves += 1
        self._sent += gathered_out + returned_out
        self._received += gathered_in + returned_in
        if returned_in.any():  # all ranks wait for each other before and after the operations
            self._flush()
            self._critical += load.max()
        else:
            self._load += load
        self._note(self._e * int((buffers + gathered_out + gathered_in).max()))
        for owner, groups in alike.items():
            for (shape, _, _), number in groups.items():
                self._note(self._e * int(buffers[owner]) + orthogonalization_bytes(shape, number, self._e))
        self._note(self._e * int((buffers + returned_out + returned_in).max()))
        if self._e == 2:  # results are widened one after another
            self._note(2 * int((buffers + returned_in).max()) + 4 * max(math.prod(matrix.shape) for matrix, _, _ in members))

    def _note(self, allocated: int) -> None:
        self._peak = max(self._peak, allocated)

    def _flush(self) -> None:
        self._critical += self._load.max()
        self._load[:] = 0

    def result(self) -> MatrixStep:
        """Returns the sums."""
        self._flush()
        near = int(max(self._sent_near.max(), self._received_near.max()))
        far = int(max((self._sent - self._sent_near).max(), (self._received - self._received_near).max()))
        return MatrixStep(
            self._ranks,
            self._matrices,
            self._waves,
            self._flops,
            float(self._critical),
            int(self._elements.max()),
            int(self._squares.max()),
            tuple(map(int, self._sent)),
            near,
            far,
            self._peak,
        )


def orthogonalization_bytes(shape: tuple[int, int], number: int, element_bytes: int) -> int:
    """Returns the bytes that are allocated at once to orthogonalize a stack of matrices, with the stack itself.

    The normalized matrices are computed in float32 and rounded. A step keeps its input, its result and up to three square matrices.

    Args:
        shape: (rows, columns) of each matrix.
        number: number of matrices.
        element_bytes: bytes of an element.
    """
    stack, squares = number * math.prod(shape), number * min(shape) ** 2
    normalized = (4 + element_bytes if element_bytes == 2 else 4) * stack
    return element_bytes * stack + max(normalized, element_bytes * max(2 * stack + 2 * squares, stack + 3 * squares))
