"""Collects full matrices from the ranks that hold parts of them, applies a function to them, and returns the results.

In: the optimizer's tensors, which spans of which matrices they hold, a process group. Out: `MatrixExchange`. An all-to-all brings the
spans of each matrix to its owner, and another one brings the results back (`ownership` decides who owns what). An owner keeps at most
`WAVE_LIMIT` elements at a time, or one larger matrix.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_patch.optimizers.ownership import WAVE_LIMIT, BufferSlice, MatrixSpan, OwnedMatrix, Slice, Wave, plan_exchange


class MatrixExchange:
    """The exchanges for the matrices that an optimizer steps together.

    Creating one is collective: all ranks of the group must do it at the same time, and call `add_mapped` equally often.

    Args:
        tensors: this rank's tensors, of which it may only hold parts of matrices.
        spans: what these tensors contain.
        group: the ranks that hold the same layers; None: all ranks.
        device: where the matrices are collected, even if the tensors are in host memory.
        dtype: dtype of the matrices, also while they are sent.
        wave_limit: number of elements that an owner collects at a time.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        spans: Sequence[MatrixSpan],
        group: dist.ProcessGroup | None,
        device: torch.device,
        dtype: torch.dtype,
        wave_limit: int = WAVE_LIMIT,
    ) -> None:
        self.tensors = list(tensors)
        self.sent_bytes = 0
        """Bytes that this rank has sent to other ranks, for tests and reports."""
        self._group, self._device, self._dtype = group, device, dtype
        gathered: list[list[MatrixSpan]] = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(gathered, list(spans), group=group)
        self.plan = plan_exchange(gathered, dist.get_rank(group), wave_limit)

    def add_mapped(
        self,
        sources: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor],
        function: Callable[[torch.Tensor], torch.Tensor],
        alpha: float,
    ) -> None:
        """Adds alpha · function(matrix) to the targets, for each matrix whose spans the sources hold.

        Args:
            sources: one for each of `tensors`, flattened.
            targets: the same; results are added to them.
            function: maps matrices [N, rows, columns] of equal shape to matrices of that shape.
            alpha: factor of the results.
        """
        for wave in self.plan.waves:
            self._add_wave(wave, sources, targets, function, alpha)

    def _add_wave(
        self,
        wave: Wave,
        sources: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor],
        function: Callable[[torch.Tensor], torch.Tensor],
        alpha: float,
    ) -> None:
        """Does what `add_mapped` does for the matrices of one wave. When it returns, nothing that it allocated is left."""
        buffer = self._collect(wave, sources)
        for matrices in _alike(wave.matrices):
            _map(buffer, matrices, function)
        self._return(wave, buffer, targets, alpha)

    def _collect(self, wave: Wave, sources: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns this rank's matrices of a wave, flattened one after another."""
        buffer = torch.empty(wave.numel, dtype=self._dtype, device=self._device)
        received = self._exchange(wave, [_slices_of(sources, slices) for slices in wave.sends], [_numel(parts) for parts in wave.receives])
        parts = list(itertools.chain(*wave.receives))
        for part, message in zip(parts, received.split([part.numel for part in parts]), strict=True):
            buffer.narrow(0, part.offset, part.numel).copy_(message)
        for held, part in wave.copies:
            buffer.narrow(0, part.offset, part.numel).copy_(sources[held.tensor].narrow(0, held.offset, held.numel))
        return buffer

    def _return(self, wave: Wave, buffer: torch.Tensor, targets: Sequence[torch.Tensor], alpha: float) -> None:
        """Adds the results to the targets of all ranks that hold the matrices."""
        messages = [[buffer.narrow(0, part.offset, part.numel) for part in parts] for parts in wave.returns]
        received = self._exchange(wave, messages, [_numel(slices) for slices in wave.arrivals])
        arrivals = list(itertools.chain(*wave.arrivals))
        results = list(zip(arrivals, received.split([slice_.numel for slice_ in arrivals]), strict=True))
        results += [(held, buffer.narrow(0, part.offset, part.numel)) for held, part in wave.copies]
        for slice_, result in results:
            target = targets[slice_.tensor].narrow(0, slice_.offset, slice_.numel)
            target.add_(result.to(target.device, target.dtype), alpha=alpha)

    def _exchange(self, wave: Wave, messages: Sequence[Sequence[torch.Tensor]], expected: Sequence[int]) -> torch.Tensor:
        """Sends a message to each rank and returns the messages of all ranks, one after another.

        Args:
            wave: the wave; nothing is sent if no rank of it exchanges anything.
            messages: the parts of the message to each rank.
            expected: number of elements from each rank.
        """
        received = torch.empty(sum(expected), dtype=self._dtype, device=self._device)
        if not wave.exchanges:
            return received
        sizes = [sum(part.numel() for part in parts) for parts in messages]
        sent = torch.empty(sum(sizes), dtype=self._dtype, device=self._device)
        end = 0
        for part in itertools.chain(*messages):
            sent.narrow(0, end, part.numel()).copy_(part)
            end += part.numel()
        dist.all_to_all_single(received, sent, list(expected), sizes, group=self._group)
        self.sent_bytes += sent.nbytes
        return received


def _map(buffer: torch.Tensor, matrices: Sequence[OwnedMatrix], function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replaces matrices of equal shape and layout, which lie in a buffer, by what the function returns for them."""
    views = [_shards_by_row(buffer, matrix) for matrix in matrices]
    results = function(torch.stack(views).view(len(matrices), *matrices[0].shape))
    for view, result in zip(views, results, strict=True):
        view.copy_(result.reshape(view.shape))


def _numel(parts: Sequence[Slice] | Sequence[BufferSlice]) -> int:
    return sum(part.numel for part in parts)


def _slices_of(tensors: Sequence[torch.Tensor], slices: Sequence[Slice]) -> list[torch.Tensor]:
    return [tensors[cut.tensor].narrow(0, cut.offset, cut.numel) for cut in slices]


def _alike(matrices: Sequence[OwnedMatrix]) -> list[list[OwnedMatrix]]:
    """Returns the matrices in groups of equal shape and layout."""
    groups: dict[tuple[tuple[int, int], int, int], list[OwnedMatrix]] = {}
    for matrix in matrices:
        groups.setdefault((matrix.shape, matrix.dim, matrix.shards), []).append(matrix)
    return list(groups.values())


def _shards_by_row(buffer: torch.Tensor, matrix: OwnedMatrix) -> torch.Tensor:
    """Returns a view of a matrix whose flattened elements are in the order of the matrix: [rows, shards along the row, their columns]."""
    flat, (rows, columns) = buffer.narrow(0, matrix.offset, matrix.numel), matrix.shape
    if matrix.dim == 0:
        return flat.view(rows, 1, columns)
    return flat.view(matrix.shards, rows, columns // matrix.shards).transpose(0, 1)
