"""Causal attention inside documents and windows: positions attend to the nearest earlier positions of their own document, without a mask of
T x T.

In: queries, keys and values of a micro-batch, `Documents`: where documents begin and end, and the length of the window, if there is one.
Out: what attention with the dense mask gives. The operator `megatron_patch::documents_attention` is opaque to torch.compile. Its kernels:

- CPU: torch's flash kernel on one document after another, on views; results are written in place. A document that is longer than the window
  is cut into blocks of queries, each with the keys that it can see and a mask of this size.
- CUDA, 16-bit floats, devices of compute capability 8.0 or higher: torch's flash kernel for sequences of various lengths, all documents in
  one launch. The host never waits for the device: the lengths that the launch needs are in host memory.
- Otherwise: scaled_dot_product_attention on one document, or block of queries, after another. Its backward pass computes each again.

Attention of a document of n positions costs n² instead of T², in time, and n·window with a window. It needs no memory beyond that of plain
causal attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
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


@dataclass(frozen=True)
class Documents:
    """Where the documents of a micro-batch begin and end; no document extends over two samples.

    A dataclass, not a tuple: DeepSpeed rebuilds tuples that go through its engine.

    Args:
        bounds: int32 [N + 1], on the device: the first position of each of N documents in the B·T positions of the micro-batch, sample
            after sample, in ascending order, and B·T.
        host_bounds: the same in host memory; the same tensor where the device is the CPU.
        longest: int64, no dimensions, in host memory: positions of the longest document. A tensor, because torch.compile would compile
            again for each value of a number.
    """

    bounds: torch.Tensor
    host_bounds: torch.Tensor
    longest: torch.Tensor

    def to(self, device: torch.device) -> Documents:
        """Returns the documents for attention on a device; the copy does not wait for it."""
        return Documents(self.bounds.to(device, non_blocking=True), self.host_bounds, self.longest)

    def pin_memory(self) -> Documents:
        """Returns a copy in page-locked memory."""
        pinned = self.host_bounds.pin_memory()
        return Documents(pinned, pinned, self.longest)

    def mark_dynamic(self) -> None:
        """Lets torch.compile compile once for all numbers of documents."""
        torch._dynamo.mark_dynamic(self.bounds, 0)
        torch._dynamo.mark_dynamic(self.host_bounds, 0)


def documents_from_ids(ids: npt.NDArray[np.int64]) -> Documents | None:
    """Returns the documents of a micro-batch, in host memory, or None if each sample is one document.

    Args:
        ids: number of each position's document, [B, T]; a new document begins where it changes.
    """
    begins = np.ones(ids.shape, dtype=bool)
    np.not_equal(ids[:, 1:], ids[:, :-1], out=begins[:, 1:])
    bounds = np.append(np.flatnonzero(begins), ids.size).astype(np.int32)
    if len(bounds) == len(ids) + 1:
        return None
    host_bounds = torch.from_numpy(bounds)
    return Documents(host_bounds, host_bounds, torch.tensor(int(np.diff(bounds).max())))


def documents_of_samples(samples: int, positions: int, device: torch.device) -> Documents:
    """Returns the documents of a micro-batch in which each sample is one document; the host does not wait for the device.

    Args:
        samples: B.
        positions: T.
        device: the device of attention.
    """
    end = samples * positions + 1
    host_bounds = torch.arange(0, end, positions, dtype=torch.int32)
    bounds = host_bounds if device.type == "cpu" else torch.arange(0, end, positions, dtype=torch.int32, device=device)
    return Documents(bounds, host_bounds, torch.tensor(positions))


def documents_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, documents: Documents, window: int | None = None
) -> torch.Tensor:
    """Computes causal scaled dot product attention in which no position sees another document, nor positions before its window.

    Args:
        queries: [B, heads, T, head_size]. Stored as [B, T, heads, head_size], none of the three is copied.
        keys: [B, groups, T, head_size]; `groups` divides `heads`, and query head h reads group h // (heads / groups).
        values: like `keys`.
        documents: the documents of the B·T positions, on the device of `queries`.
        window: positions that a position attends to at most: itself and the window - 1 before it. None: all of its document up to itself.

    Returns:
        [B, heads, T, head_size], stored as [B, T, heads, head_size].

    Raises:
        ValueError: the bounds do not begin at 0 or do not end at B·T, or the window is shorter than 1 position.
    """
    size = queries.shape[0], queries.shape[2]
    packed = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (queries, keys, values))
    bounds = documents.bounds, documents.host_bounds, documents.longest
    out, _ = torch.ops.megatron_patch.documents_attention(*packed, *bounds, window)
    return out.unflatten(0, size).transpose(1, 2)


_Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries, keys and values, or their gradients, packed: [B·T, heads or groups, head_size]."""


class _Bounds(NamedTuple):
    """What the operator knows of documents: the three tensors of `Documents`, and the window."""

    device: torch.Tensor
    host: torch.Tensor
    longest: torch.Tensor
    window: int | None = None

    def lengths(self) -> list[int]:
        """Returns the positions of each document."""
        lengths: list[int] = self.host.diff().tolist()
        return lengths


class _Kernel(Protocol):
    """One way to compute the operator."""

    def forward(self, inputs: _Inputs, bounds: _Bounds) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the output, like the queries, and the logarithm of each position's sum of exponentials, [heads, B·T]."""
        ...

    def backward(self, grad: torch.Tensor, inputs: _Inputs, out: torch.Tensor, log_sums: torch.Tensor, bounds: _Bounds) -> _Inputs:
        """Returns the gradients of queries, keys and values, from that of the output and what `forward` has returned."""
        ...


class _Block(NamedTuple):
    """Queries of one document, and the keys that they see.

    Args:
        queries: their positions in the document.
        keys: the positions of the keys; they end with the last query.
        whole: whether the block is the whole document, with the causal mask.
    """

    queries: slice
    keys: slice
    whole: bool


def _blocks(length: int, window: int | None) -> Iterator[_Block]:
    """Yields the blocks of a document of `length` positions; one that is not longer than the window is one block."""
    if window is None or length <= window:
        yield _Block(slice(0, length), slice(0, length), True)
        return
    least, most = _BLOCK_ROWS
    rows = min(max(window, least), most)
    for start in range(0, length, rows):
        end = min(start + rows, length)
        yield _Block(slice(start, end), slice(max(0, start - window + 1), end), False)


class _Masks:
    """The masks of the blocks of one call: views of one mask, of the largest block that has all of its keys.

    Args:
        queries: gives masks their dtype and device.
        window: the window.
    """

    def __init__(self, queries: torch.Tensor, window: int | None) -> None:
        self._queries, self._window = queries, window
        self._largest: torch.Tensor | None = None

    def of(self, block: _Block) -> torch.Tensor | None:
        """Returns the mask [queries, keys] to add to a block's scores: 0, or minus infinity; None: the block is a whole document."""
        if block.whole or self._window is None:
            return None
        if self._largest is None:
            rows = _BLOCK_ROWS[1]
            columns = rows + self._window - 1
            hidden = ~band(rows, columns, self._window, self._queries.device)
            self._largest = self._queries.new_zeros(rows, columns).masked_fill_(hidden, -torch.inf)
        rows, columns = block.queries.stop - block.queries.start, block.keys.stop - block.keys.start
        # At the start of a document, keys are missing on the left.
        missing = self._window - 1 - (columns - rows)
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


def dense_mask(documents: Documents | None, samples: int, positions: int, device: torch.device) -> torch.Tensor:
    """Returns which position attends to which, bool [B or 1, 1, T, T], for kernels that know no documents; the host does not wait.

    Args:
        documents: the documents of the B·T positions, on the device; None: each sample is one document.
        samples: B.
        positions: T.
        device: device of the result.
    """
    causal = band(positions, positions, None, device)[None, None]
    if documents is None:
        return causal
    indices = torch.arange(samples * positions, dtype=torch.int32, device=device)
    numbers = torch.bucketize(indices, documents.bounds, right=True, out_int32=True).view(samples, positions)
    return causal & (numbers[:, None, :, None] == numbers[:, None, None, :])


def _by_document(packed: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, ...]:
    """Returns a view [1, heads, n, head_size] of each document, all of them by one call."""
    views: tuple[torch.Tensor, ...] = packed.transpose(0, 1)[None].split(lengths, dim=2)
    return views


def _documents(tensors: Iterable[torch.Tensor], lengths: list[int]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yields for each document its views of packed tensors; see `_by_document`."""
    return zip(*(_by_document(tensor, lengths) for tensor in tensors), strict=True)


def _of_block(block: _Block, queries: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    """Returns a block's part of the queries, keys and values of a document, or of their gradients."""
    return [queries[:, :, block.queries], *(tensor[:, :, block.keys] for tensor in others)]


def _add_gradients(block: _Block, targets: tuple[torch.Tensor, ...], found: tuple[torch.Tensor, ...]) -> None:
    """Writes a block's gradients to those of its document; keys are in several blocks, whose gradients are added."""
    if block.whole:
        for target, gradient in zip(targets, found, strict=True):
            target.copy_(gradient)
        return
    of_queries, *others = _of_block(block, *targets)
    of_queries.copy_(found[0])
    for target, gradient in zip(others, found[1:], strict=True):
        target.add_(gradient)


class _Cpu:
    """torch's flash kernel of the CPU, on one document, or block of queries, after another."""

    def forward(self, inputs: _Inputs, bounds: _Bounds) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the output and the sums; see `_Kernel`."""
        lengths, masks = bounds.lengths(), _Masks(inputs[0], bounds.window)
        out, log_sums = _outputs(inputs[0])
        for (to, *one), sums in zip(_documents((out, *inputs), lengths), log_sums.split(lengths, dim=1), strict=True):
            for block in _blocks(to.shape[2], bounds.window):
                part, mask = _of_block(block, *one), masks.of(block)
                attended, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(*part, 0.0, block.whole, attn_mask=mask)
                to[:, :, block.queries].copy_(attended)
                sums[:, block.queries].copy_(log_sum[0])
        return out, log_sums

    def backward(self, grad: torch.Tensor, inputs: _Inputs, out: torch.Tensor, log_sums: torch.Tensor, bounds: _Bounds) -> _Inputs:
        """Returns the gradients; see `_Kernel`."""
        lengths, masks = bounds.lengths(), _Masks(inputs[0], bounds.window)
        gradients = _sums(inputs, bounds)
        documents = zip(
            _documents((grad, out, *inputs), lengths), log_sums.split(lengths, dim=1), _documents(gradients, lengths), strict=True
        )
        for (grad_of, out_of, *one), sums, targets in documents:
            for block in _blocks(grad_of.shape[2], bounds.window):
                rows, part = block.queries, _of_block(block, *one)
                known = grad_of[:, :, rows], *part, out_of[:, :, rows], sums[None, :, rows]
                found = aten._scaled_dot_product_flash_attention_for_cpu_backward(*known, 0.0, block.whole, attn_mask=masks.of(block))
                _add_gradients(block, targets, found)
        return _as_inputs(gradients, inputs)


class _Flash:
    """The flash kernel of CUDA for sequences of various lengths."""

    def forward(self, inputs: _Inputs, bounds: _Bounds) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the output and the sums; see `_Kernel`."""
        longest = int(bounds.longest)
        sizes = bounds.device, bounds.device, longest, longest
        out, log_sums, *_ = aten._flash_attention_forward(*inputs, *sizes, 0.0, True, False, **self._window(bounds))
        return out, log_sums

    def backward(self, grad: torch.Tensor, inputs: _Inputs, out: torch.Tensor, log_sums: torch.Tensor, bounds: _Bounds) -> _Inputs:
        """Returns the gradients; see `_Kernel`."""
        longest = int(bounds.longest)
        sizes = bounds.device, bounds.device, longest, longest
        # Without dropout nothing reads the generator's state, which is two numbers.
        state = torch.zeros(2, dtype=torch.uint64, device=grad.device), torch.empty(0, device=grad.device)
        known = grad, *inputs, out, log_sums
        queries, keys, values = aten._flash_attention_backward(*known, *sizes, 0.0, True, *state, **self._window(bounds))
        return queries, keys, values

    def _window(self, bounds: _Bounds) -> dict[str, int]:
        """Returns the arguments of a window: how many positions before and after itself a position sees."""
        return {} if bounds.window is None else {"window_size_left": bounds.window - 1, "window_size_right": 0}


class _ScaledDotProduct:
    """scaled_dot_product_attention on one document, or block of queries, after another, where torch has no flash kernel.

    The kernels that remain take no grouped heads, so keys and values are repeated, a document or block at a time.
    """

    def forward(self, inputs: _Inputs, bounds: _Bounds) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the output, and zeros in place of the sums, which nothing reads; see `_Kernel`."""
        masks = _Masks(inputs[0], bounds.window)
        out, log_sums = _outputs(inputs[0])
        for to, *one in _documents((out, *inputs), bounds.lengths()):
            for block in _blocks(to.shape[2], bounds.window):
                to[:, :, block.queries].copy_(self._attend(_of_block(block, *one), masks.of(block)))
        return out, log_sums.zero_()

    def backward(self, grad: torch.Tensor, inputs: _Inputs, out: torch.Tensor, log_sums: torch.Tensor, bounds: _Bounds) -> _Inputs:
        """Returns the gradients; see `_Kernel`."""
        lengths, masks = bounds.lengths(), _Masks(inputs[0], bounds.window)
        gradients = _sums(inputs, bounds)
        for (grad_of, *one), targets in zip(_documents((grad, *inputs), lengths), _documents(gradients, lengths), strict=True):
            for block in _blocks(grad_of.shape[2], bounds.window):
                with torch.enable_grad():
                    leaves = [tensor.detach().requires_grad_() for tensor in _of_block(block, *one)]
                    found = torch.autograd.grad(self._attend(leaves, masks.of(block)), leaves, grad_of[:, :, block.queries])
                _add_gradients(block, targets, found)
        return _as_inputs(gradients, inputs)

    def _attend(self, inputs: list[torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
        queries, keys, values = inputs
        share = queries.shape[1] // keys.shape[1]
        if share > 1:
            keys, values = (tensor.repeat_interleave(share, dim=1) for tensor in (keys, values))
        # A kernel of CUDA needs a mask that begins at an aligned address.
        mask = None if mask is None else mask.contiguous()
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None)


def _outputs(queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns memory for the output and the logarithms of the sums."""
    rows, heads, _ = queries.shape
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    return out, queries.new_empty((heads, rows), dtype=torch.promote_types(queries.dtype, torch.float32))


def _like(inputs: _Inputs) -> _Inputs:
    """Returns memory for the gradients of queries, keys and values."""
    queries, keys, values = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs)
    return queries, keys, values


def _sums(inputs: _Inputs, bounds: _Bounds) -> _Inputs:
    """Returns memory for the gradients; with a window those of keys and values, in float32 or wider, are zeros to add to."""
    queries, keys, values = inputs
    if bounds.window is None:
        return _like(inputs)
    wide = torch.promote_types(keys.dtype, torch.float32)
    of_keys, of_values = (torch.zeros(tensor.shape, dtype=wide, device=tensor.device) for tensor in (keys, values))
    return torch.empty_like(queries, memory_format=torch.contiguous_format), of_keys, of_values


def _as_inputs(gradients: _Inputs, inputs: _Inputs) -> _Inputs:
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


def _kernel(queries: torch.Tensor) -> _Kernel:
    """Returns the way to compute attention for the packed queries."""
    if queries.device.type == "cpu":
        return _Cpu()
    return _Flash() if has_flash_kernel(queries) else _ScaledDotProduct()


def _forward(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bounds: torch.Tensor,
    host_bounds: torch.Tensor,
    longest: torch.Tensor,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    first, last = host_bounds[:: len(host_bounds) - 1].tolist()
    if (first, last) != (0, len(queries)):
        raise ValueError(f"the documents extend from position {first} to {last}; allowed: from 0 to B·T = {len(queries)}")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} positions; allowed: from 1")
    inputs = _whole_heads(queries), _whole_heads(keys), _whole_heads(values)
    return _kernel(queries).forward(inputs, _Bounds(bounds, host_bounds, longest, window))


def _backward(
    grad: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    log_sums: torch.Tensor,
    bounds: torch.Tensor,
    host_bounds: torch.Tensor,
    longest: torch.Tensor,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = _whole_heads(queries), _whole_heads(keys), _whole_heads(values)
    return _kernel(queries).backward(_whole_heads(grad), inputs, out, log_sums, _Bounds(bounds, host_bounds, longest, window))


def _whole_heads(packed: torch.Tensor) -> torch.Tensor:
    """Returns the tensor with each head's numbers next to each other, as the kernels need them."""
    return packed if packed.stride(-1) == 1 else packed.contiguous()


def _register() -> None:
    """Registers the operator, its shapes for tracing and its gradient."""
    name, backward_name = "megatron_patch::documents_attention", "megatron_patch::documents_attention_backward"
    bounds = "Tensor bounds, Tensor host_bounds, Tensor longest, int? window=None"
    packed = "Tensor queries, Tensor keys, Tensor values"
    torch.library.define(name, f"({packed}, {bounds}) -> (Tensor, Tensor)")
    torch.library.define(backward_name, f"(Tensor grad, {packed}, Tensor out, Tensor log_sums, {bounds}) -> (Tensor, Tensor, Tensor)")
    torch.library.impl(name, "default")(_forward)
    torch.library.impl(backward_name, "default")(_backward)

    @torch.library.register_fake(name)
    def _(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *bounds: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return _outputs(queries)

    @torch.library.register_fake(backward_name)
    def _(grad: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *more: Any) -> _Inputs:
        return _like((queries, keys, values))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        ctx.save_for_backward(*inputs[:3], *output, *inputs[3:6])
        ctx.window = inputs[6]

    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (*torch.ops.megatron_patch.documents_attention_backward(grad, *ctx.saved_tensors, ctx.window), None, None, None, None)

    torch.library.register_autograd(name, backward, setup_context=setup_context)


_register()
