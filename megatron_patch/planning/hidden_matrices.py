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


@dataclass(frozen=True)
class _Matrix:
    """A hidden matrix of a block, or the expert with a certain number among those of each tensor-parallel rank.

    Args:
        name: name within the block.
        shape: (rows, columns) of the full matrix.
        dim: the sharded dimension; None: it is not sharded.
        parameter: elements of a rank's shard of the parameter that contains it.
        before: elements of the block's parameters before this one, on each rank.
        offset: first element in the parameter.
        is_expert: whether each tensor-parallel rank has another such matrix, whole.
    """

    name: str
    shape: tuple[int, int]
    dim: int | None
    parameter: int
    before: int
    offset: int = 0
    is_expert: bool = False

    def local(self, tensor: int) -> int:
        """Returns the elements of a rank's shard of it."""
        return math.prod(self.shape) // (tensor if self.dim is not None else 1)


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
    experts = tuple(shape.experts_of(block) is not None for block in blocks)
    return _matrix_step(shape, order, experts, layout.tensor, layout.data, level, sub_group, layout.element_bytes, node_devices)


@functools.lru_cache(maxsize=1024)
def _order_of_names(blocks: range) -> tuple[int, ...]:
    """Returns the position of each block among the sorted names of their matrices, by which ownership breaks ties.

    Most pipeline ranks with the same number of blocks have the same order, and so the same step.
    """
    by_name = sorted(blocks, key=lambda block: f"{block}.")
    return tuple(map(by_name.index, blocks))


def _block_matrices(shape: ModelShape, tensor: int, number: int) -> tuple[list[_Matrix], int]:
    """Returns the hidden matrices of a block, numbered from 0, and the elements of all of them on each rank."""
    found: list[_Matrix] = []
    before = 0
    for name, size in block_parameters(shape, number).items():
        if not is_hidden_matrix(f"blocks.{number}.{name}", len(size)):
            continue
        rows, columns = size[-2:]
        shard = shard_of(name, shape, 0, tensor)
        numel = math.prod(size) // (1 if shard is None else shard.count)
        if len(size) == 2:
            found.append(_Matrix(name, (rows, columns), None if shard is None else shard.dim, numel, before))
        else:
            offsets = range(0, numel, rows * columns)
            found += [_Matrix(name, (rows, columns), None, numel, before, offset, is_expert=True) for offset in offsets]
        before += numel
    return found, before


class _Division:
    """How the hidden matrices of a pipeline rank are divided among its ranks, which are numbered with tensor parallelism innermost.

    Args:
        numel: elements of all hidden matrices on each rank.
        tensor: tensor-parallel ranks.
        data: data-parallel ranks.
        zero_level: ZeRO level; 2 counts as 1.
    """

    def __init__(self, numel: int, tensor: int, data: int, zero_level: int) -> None:
        self._tensor, self._data, self._level = tensor, data, zero_level
        self._partition = -(-numel // (_ALIGNMENT * data)) * _ALIGNMENT
        self._peers = [[place * tensor + rank for rank in range(tensor)] for place in range(data)]
        self._copies = [[place * tensor + rank for place in range(data)] for rank in range(tensor)]

    def shares(self, matrix: _Matrix, block_start: int) -> dict[int, int]:
        """Returns data-parallel rank -> its elements of a matrix, or of each shard of it.

        Args:
            matrix: the matrix.
            block_start: elements of all hidden matrices of earlier blocks, on each rank.
        """
        numel = matrix.local(self._tensor)
        if self._level == 0:
            return dict.fromkeys(range(self._data), numel)
        if self._level == 3:
            start, partition = matrix.offset, -(-matrix.parameter // self._data)
        else:
            start, partition = block_start + matrix.before + matrix.offset, self._partition
        places = range(start // partition, (start + numel - 1) // partition + 1)
        edges = [start, *(place * partition for place in places[1:]), start + numel]
        return {place: after - before for place, (before, after) in zip(places, itertools.pairwise(edges), strict=True)}

    def held(self, matrix: _Matrix, shares: dict[int, int]) -> list[dict[int, int]]:
        """Returns rank -> its elements of the matrix; of an expert, for that of each tensor-parallel rank."""
        if matrix.is_expert:
            return [{place * self._tensor + rank: numel for place, numel in shares.items()} for rank in range(self._tensor)]
        return [{rank: numel for place, numel in shares.items() for rank in self._peers[place]}]

    def pieces(self, matrix: _Matrix, shares: dict[int, int]) -> list[_Pieces]:
        """Returns the pieces that several ranks hold, for each entry of `held`; none if every element has one holder."""
        numel, sharded = math.prod(matrix.shape), matrix.dim is not None
        if matrix.is_expert:
            return [[(numel, ranks)] if self._level == 0 and self._data > 1 else [] for ranks in self._copies]
        if self._level == 0 and sharded:
            return [[(numel // self._tensor, ranks) for ranks in self._copies]]
        if self._level == 0:
            return [[(numel, list(itertools.chain(*self._peers)))]]
        return [[] if sharded or self._tensor == 1 else [(part, self._peers[place]) for place, part in shares.items()]]


@functools.lru_cache(maxsize=1024)  # a search asks for the same ranks many times
def _matrix_step(
    shape: ModelShape,
    order: tuple[int, ...],
    with_experts: tuple[bool, ...],
    tensor: int,
    data: int,
    zero_level: int,
    sub_group: int,
    element_bytes: int,
    devices: int,
) -> MatrixStep:
    numbers = {shape.experts_of(number) is not None: number for number in range(shape.num_layers)}
    blocks = {kind: _block_matrices(shape, tensor, numbers[kind]) for kind in set(with_experts)}
    ranks = tensor * data
    division = _Division(sum(blocks[kind][1] for kind in with_experts), tensor, data, zero_level)
    repeated = zero_level in (0, 3)  # blocks of a kind are divided in the same way
    known: dict[tuple[bool, int], tuple[list[dict[int, int]], list[_Pieces]]] = {}
    units: list[list[HeldMatrix]] = [[]]
    pieces: dict[str, _Pieces] = {}
    filled = start = 0
    for place, kind in zip(order, with_experts, strict=True):
        matrices, numel = blocks[kind]
        for number, matrix in enumerate(matrices):
            if not repeated or (kind, number) not in known:
                shares = division.shares(matrix, start)
                known[kind, number] = division.held(matrix, shares), division.pieces(matrix, shares)
            # ZeRO 3 steps its sub-groups one after the other; each has full parameters, as many as fit.
            if sub_group and matrix.offset == 0:
                if filled >= sub_group:
                    units.append([])
                    filled = 0
                filled += -(-matrix.parameter // data)
            for rank, (held, parts) in enumerate(zip(*known[kind, number], strict=True)):
                expert = f"[{rank * (matrix.parameter // math.prod(matrix.shape)) + matrix.offset // math.prod(matrix.shape)}]"
                name = f"{place:06}.{matrix.name}{expert if matrix.is_expert else ''}"
                pieces[name] = parts
                units[-1].append(HeldMatrix(name, matrix.shape, matrix.dim or 0, 1 if matrix.dim is None else tensor, held, {}))
        start += numel
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
