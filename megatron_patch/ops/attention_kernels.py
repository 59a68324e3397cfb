"""The kernels of attention inside documents and windows; `documents_attention` calls them.

In: packed queries, keys and values, and `Bounds`. Out: the attention's output and its gradients.

- CPU: torch's flash kernel on one document after another, on views; results are written in place. A document that is longer than the window
  is cut into blocks of queries, each with the keys that it can see and a mask of this size. So is a document whose first keys are before
  its first query.
- CUDA, 16-bit floats, devices of compute capability 8.0 or higher: torch's flash kernel for sequences of various lengths, all documents in
  one launch. The host never waits for the device: the lengths that the launch needs are in host memory.
- Otherwise: scaled_dot_product_attention on one document, or block of queries, after another. Its backward pass computes each again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

aten = torch.ops.aten
LONGEST_FLASH_HEAD = 256
"""The largest head of CUDA's flash kernels."""
_BLOCK_ROWS = (64, 128)
"""Smallest and largest number of queries of a block; between them a block has as many as the window has positions.

Of the scores of a block, about rows / (rows + window) are masked. At most 512: the CPU's kernel takes 512 keys at a time, and the first of
them must not all be masked for a query.
"""

PackedInputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries, keys and values, or their gradients, packed: [B·T, heads or groups, head_size]."""


class KeySpans(NamedTuple):
    """The keys of documents of which a rank has only the last queries.

    Args:
        device: int32 [N + 1], on the device: sums of the numbers of keys of the first documents, from 0.
        host: int32 [N, 2], in host memory: each document's first key in the packed keys, and the one after its last.
        longest: int64, no dimensions, in host memory: the largest number of keys.
    """

    device: torch.Tensor
    host: torch.Tensor
    longest: torch.Tensor


class Bounds(NamedTuple):
    """What the kernels know of documents: the three tensors of `Documents`, the window, and the keys, if they are not those positions."""

    device: torch.Tensor
    host: torch.Tensor
    longest: torch.Tensor
    window: int | None = None
    spans: KeySpans | None = None

    def of_queries(self, *packed: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yields a view [1, heads, n, ...] of each document's n queries, or what belongs to them, for each of these tensors."""
        lengths = self.host.diff().tolist()
        return zip(*(tensor.transpose(0, 1)[None].split(lengths, dim=2) for tensor in packed), strict=True)

    def of_keys(self, *packed: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yields a view of each document's keys, or what belongs to them, for each of these tensors."""
        if self.spans is None:
            yield from self.of_queries(*packed)
            return
        for start, end in self.spans.host.tolist():
            yield tuple(tensor[start:end].transpose(0, 1)[None] for tensor in packed)

    def reach(self) -> int | None:
        """Returns how many positions a position attends to at most, if that needs masks: with a window, or with keys before the queries."""
        if self.spans is None:
            return self.window
        longest = int(self.spans.longest)
        return longest if self.window is None else min(longest, self.window)


class Kernel(Protocol):
    """One way to compute the operator."""

    def forward(self, inputs: PackedInputs, bounds: Bounds) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the output, like the queries, and the logarithm of each position's sum of exponentials, [heads, B·T]."""
        ...

    def backward(self, grad: torch.Tensor, inputs: PackedInputs, out: torch.Tensor, log_sums: torch.Tensor, bounds: Bounds) -> PackedInputs:
        """Returns the gradients of queries, keys and values, from that of the output and what `forward` has returned."""
        ...


class Block(NamedTuple):
    """Queries of one document, and the keys that they see.

    Args:
        queries: their numbers among the document's queries.
        keys: the same for keys; they end with that of the last query.
        whole: whether the block is the whole document, with the causal mask.
    """

    queries: slice
    keys: slice
    whole: bool


def blocks(length: int, keys: int, window: int | None) -> Iterator[Block]:
    """Yields the blocks of a document; one with as many keys as queries, not more than the window, is one block.

    Args:
        length: its queries, which are its last positions.
        keys: its keys.
        window: positions that a position attends to at most.
    """
    if length == keys and (window is None or length <= window):
        yield Block(slice(0, length), slice(0, length), True)
        return
    least, most = _BLOCK_ROWS
    rows = most if window is None else min(max(window, least), most)
    before = keys - length
    for start in range(0, length, rows):
        end = min(start + rows, length)
        first = 0 if window is None else max(0, before + start - window + 1)
        yield Block(slice(start, end), slice(first, before + end), False)


class Masks:
    """The masks of the blocks of one call: views of one mask, of the largest block that has all of its keys.

    Args:
        queries: gives masks their dtype and device.
        reach: positions that a position attends to at most; None if no block needs a mask.
    """

    def __init__(self, queries: torch.Tensor, reach: int | None) -> None:
        self._queries, self._reach = queries, reach
        self._largest: torch.Tensor | None = None

    def of(self, block: Block) -> torch.Tensor | None:
        """Returns the mask [queries, keys] to add to a block's scores: 0, or minus infinity; None: the block is a whole document."""
        if block.whole or self._reach is None:
            return None
        if self._largest is None:
            rows = _BLOCK_ROWS[1]
            columns = rows + self._reach - 1
            hidden = ~band(rows, columns, self._reach, self._queries.device)
            self._largest = self._queries.new_zeros(rows, columns).masked_fill_(hidden, -torch.inf)
        rows, columns = block.queries.stop - block.queries.start, block.keys.stop - block.keys.start
        # At the start of a document, keys are missing on the left.
        missing = self._reach - 1 - (columns - rows)
        return self._largest[:rows, missing : missing + columns]


def band(rows: int, columns: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Returns which of the last `rows` of `columns` positions attends to which of all of them, bool [rows, columns].

    Args:
        rows: number of queries.
        columns: number of keys.
        window: positions that a position attends to at most, itself included; None: all up to itself.
        device: device of the result.
    """
    causal = torch.ones(rows, columns, dtype=torch.bool, device=device).tril(columns - rows)
    return causal if window is None else causal.triu(columns - rows - window + 1)


def dense_mask(bounds: torch.Tensor | None, samples: int, positions: int, device: torch.device) -> torch.Tensor:
    """Returns which position attends to which, bool [B or 1, 1, T, T], for kernels that know no documents; the host does not wait.

    Args:
        bounds: see `Documents`, on the device; None: each sample is one document.
        samples: B.
        positions: T.
        device: device of the result.
    """
    causal = band(positions, positions, None, device)[None, None]
    if bounds is None:
        return causal
    indices = torch.arange(samples * positions, dtype=torch.int32, device=device)
    numbers = torch.bucketize(indices, bounds, right=True, out_int32=True).view(samples, positions)
    return causal & (numbers[:, None, :, None] == numbers[:, None, None, :])


def _of_block(block: Block, queries: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    """Returns a block's part of the queries, keys and values of a document, or of their gradients."""
    return [queries[:, :, block.queries], *(tensor[:, :, block.keys] for tensor in others)]


def _add_gradients(block: Block, targets: tuple[torch.Tensor, ...], found: tuple[torch.Tensor, ...]) -> None:
    """Writes a block's gradients to those of its document; keys are in several blocks, whose gradients are added."""
    if block.whole:
        for target, gradient in zip(targets, found, strict=True):
            target.copy_(gradient)
        return
    of_queries, *others = _of_block(block, *targets)
    of_queries.copy_(found[0])
    for target, gradient in zip(others, found[1:], strict=True):
        target.add_(gradient)


class CpuKernel:
    """torch's flash kernel of the CPU, on one document, or block of queries, after another."""

    def forward(self, inputs: PackedInputs, bounds: Bounds) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the output and the sums; see `Kernel`."""
        queries, *others = inputs
        masks = Masks(queries, bounds.reach())
        out, log_sums = outputs(queries)
        for (to, of_document, sums), rest in zip(bounds.of_queries(out, queries, log_sums.T), bounds.of_keys(*others), strict=True):
            for block in blocks(to.shape[2], rest[0].shape[2], bounds.window):
                part, mask = _of_block(block, of_document, *rest), masks.of(block)
                attended, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(*part, 0.0, block.whole, attn_mask=mask)
                to[:, :, block.queries].copy_(attended)
                sums[:, :, block.queries].copy_(log_sum)
        return out, log_sums

    def backward(self, grad: torch.Tensor, inputs: PackedInputs, out: torch.Tensor, log_sums: torch.Tensor, bounds: Bounds) -> PackedInputs:
        """Returns the gradients; see `Kernel`."""
        queries, *others = inputs
        masks, gradients = Masks(queries, bounds.reach()), _sums(inputs, bounds)
        known = bounds.of_queries(grad, out, log_sums.T, queries, gradients[0])
        for (grad_of, out_of, sums, of_document, target), rest in zip(known, bounds.of_keys(*others, *gradients[1:]), strict=True):
            for block in blocks(grad_of.shape[2], rest[0].shape[2], bounds.window):
                rows, part = block.queries, _of_block(block, of_document, *rest[:2])
                given = grad_of[:, :, rows], *part, out_of[:, :, rows], sums[:, :, rows]
                found = aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, 0.0, block.whole, attn_mask=masks.of(block))
                _add_gradients(block, (target, *rest[2:]), found)
        return _as_inputs(gradients, inputs)


class FlashKernel:
    """The flash kernel of CUDA for sequences of various lengths."""

    def forward(self, inputs: PackedInputs, bounds: Bounds) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the output and the sums; see `Kernel`."""
        inputs = self._packed(inputs, bounds)
        out, log_sums, *_ = aten._flash_attention_forward(*inputs, *self._sizes(bounds), 0.0, True, False, **self._window(bounds))
        return out, log_sums

    def backward(self, grad: torch.Tensor, inputs: PackedInputs, out: torch.Tensor, log_sums: torch.Tensor, bounds: Bounds) -> PackedInputs:
        """Returns the gradients; see `Kernel`."""
        # Without dropout nothing reads the generator's state, which is two numbers.
        state = torch.zeros(2, dtype=torch.uint64, device=grad.device), torch.empty(0, device=grad.device)
        known = grad, *self._packed(inputs, bounds), out, log_sums
        queries, keys, values = aten._flash_attention_backward(*known, *self._sizes(bounds), 0.0, True, *state, **self._window(bounds))
        return queries, self._unpacked(keys, inputs[1], bounds), self._unpacked(values, inputs[2], bounds)

    def _sizes(self, bounds: Bounds) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Returns the bounds of queries and keys, and the longest lengths."""
        longest = int(bounds.longest)
        if bounds.spans is None:
            return bounds.device, bounds.device, longest, longest
        return bounds.device, bounds.spans.device, longest, int(bounds.spans.longest)

    def _window(self, bounds: Bounds) -> dict[str, int]:
        """Returns the arguments of a window: how many positions before and after itself a position sees."""
        return {} if bounds.window is None else {"window_size_left": bounds.window - 1, "window_size_right": 0}

    def _packed(self, inputs: PackedInputs, bounds: Bounds) -> PackedInputs:
        """Returns the inputs with the keys and values of the spans next to each other."""
        if bounds.spans is None:
            return inputs
        pieces = _joined(bounds.spans.host)
        keys, values = (torch.cat([tensor[start:end] for start, end in pieces]) for tensor in inputs[1:])
        return inputs[0], keys, values

    def _unpacked(self, gradient: torch.Tensor, like: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        """Returns a gradient of packed keys at their places, with zeros between them."""
        if bounds.spans is None:
            return gradient
        result = torch.zeros_like(like, memory_format=torch.contiguous_format)
        pieces = _joined(bounds.spans.host)
        for (start, end), part in zip(pieces, gradient.split([end - start for start, end in pieces]), strict=True):
            result[start:end] = part
        return result


def _joined(spans: torch.Tensor) -> list[tuple[int, int]]:
    """Returns spans of which each begins after the last one's end: there is one for each sample."""
    joined: list[tuple[int, int]] = []
    for start, end in spans.tolist():
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, end))
    return joined


class ScaledDotProductKernel:
    """scaled_dot_product_attention on one document, or block of queries, after another, where torch has no flash kernel.

    The kernels that remain take no grouped heads, so keys and values are repeated, a document or block at a time.
    """

    def forward(self, inputs: PackedInputs, bounds: Bounds) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the output, and zeros in place of the sums, which nothing reads; see `Kernel`."""
        queries, *others = inputs
        masks = Masks(queries, bounds.reach())
        out, log_sums = outputs(queries)
        for (to, of_document), rest in zip(bounds.of_queries(out, queries), bounds.of_keys(*others), strict=True):
            for block in blocks(to.shape[2], rest[0].shape[2], bounds.window):
                to[:, :, block.queries].copy_(self._attend(_of_block(block, of_document, *rest), masks.of(block)))
        return out, log_sums.zero_()

    def backward(self, grad: torch.Tensor, inputs: PackedInputs, out: torch.Tensor, log_sums: torch.Tensor, bounds: Bounds) -> PackedInputs:
        """Returns the gradients; see `Kernel`."""
        queries, *others = inputs
        masks, gradients = Masks(queries, bounds.reach()), _sums(inputs, bounds)
        known = bounds.of_queries(grad, queries, gradients[0])
        for (grad_of, of_document, target), rest in zip(known, bounds.of_keys(*others, *gradients[1:]), strict=True):
            for block in blocks(grad_of.shape[2], rest[0].shape[2], bounds.window):
                with torch.enable_grad():
                    leaves = [tensor.detach().requires_grad_() for tensor in _of_block(block, of_document, *rest[:2])]
                    found = torch.autograd.grad(self._attend(leaves, masks.of(block)), leaves, grad_of[:, :, block.queries])
                _add_gradients(block, (target, *rest[2:]), found)
        return _as_inputs(gradients, inputs)

    def _attend(self, inputs: list[torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
        queries, keys, values = inputs
        share = queries.shape[1] // keys.shape[1]
        if share > 1:
            keys, values = (tensor.repeat_interleave(share, dim=1) for tensor in (keys, values))
        # A kernel of CUDA needs a mask that begins at an aligned address.
        mask = None if mask is None else mask.contiguous()
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None)


def outputs(queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns memory for the output and the logarithms of the sums."""
    rows, heads, _ = queries.shape
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    return out, queries.new_empty((heads, rows), dtype=torch.promote_types(queries.dtype, torch.float32))


def like(inputs: PackedInputs) -> PackedInputs:
    """Returns memory for the gradients of queries, keys and values."""
    queries, keys, values = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs)
    return queries, keys, values


def _sums(inputs: PackedInputs, bounds: Bounds) -> PackedInputs:
    """Returns memory for the gradients; those of keys that several blocks see, or none, are zeros to add to, in float32 or wider."""
    queries, keys, values = inputs
    if bounds.window is None and bounds.spans is None:
        return like(inputs)
    wide = torch.promote_types(keys.dtype, torch.float32)
    of_keys, of_values = (torch.zeros(tensor.shape, dtype=wide, device=tensor.device) for tensor in (keys, values))
    return torch.empty_like(queries, memory_format=torch.contiguous_format), of_keys, of_values


def _as_inputs(gradients: PackedInputs, inputs: PackedInputs) -> PackedInputs:
    """Returns the gradients in the dtype of the inputs."""
    queries, keys, values = (gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, inputs, strict=True))
    return queries, keys, values


def has_flash_kernel(queries: torch.Tensor) -> bool:
    """Whether CUDA's flash kernel takes heads of this size and type on their device."""
    head_size = queries.shape[-1]
    return (
        queries.device.type == "cuda"
        and torch.version.cuda is not None
        and queries.dtype in (torch.float16, torch.bfloat16)
        and head_size <= LONGEST_FLASH_HEAD
        and head_size % 8 == 0
        and torch.cuda.get_device_capability(queries.device) >= (8, 0)
    )


def kernel_for(queries: torch.Tensor) -> Kernel:
    """Returns the way to compute attention for the packed queries."""
    if queries.device.type == "cpu":
        return CpuKernel()
    return FlashKernel() if has_flash_kernel(queries) else ScaledDotProductKernel()
