"""Causal attention inside documents: positions attend to earlier positions of their own document, without a mask of T x T.

In: queries, keys and values of a micro-batch, and `Documents`: where documents begin and end. Out: what attention with the dense mask
gives. The operator `megatron_patch::documents_attention` is opaque to torch.compile. Its kernels:

- CPU: torch's flash kernel on one document after another, on views; results are written in place.
- CUDA, 16-bit floats, devices of compute capability 8.0 or higher: torch's flash kernel for sequences of various lengths, all documents in
  one launch. The host never waits for the device: the lengths that the launch needs are in host memory.
- Otherwise: scaled_dot_product_attention on one document after another. Its backward pass computes each document again.

Attention of a document of n positions costs n² instead of T², in time, and no memory beyond that of plain causal attention.
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


def documents_attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, documents: Documents) -> torch.Tensor:
    """Computes causal scaled dot product attention in which no position sees another document.

    Args:
        queries: [B, heads, T, head_size]. Stored as [B, T, heads, head_size], none of the three is copied.
        keys: [B, groups, T, head_size]; `groups` divides `heads`, and query head h reads group h // (heads / groups).
        values: like `keys`.
        documents: the documents of the B·T positions, on the device of `queries`.

    Returns:
        [B, heads, T, head_size], stored as [B, T, heads, head_size].

    Raises:
        ValueError: the bounds do not begin at 0 or do not end at B·T.
    """
    size = queries.shape[0], queries.shape[2]
    packed = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (queries, keys, values))
    bounds = documents.bounds, documents.host_bounds, documents.longest
    out, _ = torch.ops.megatron_patch.documents_attention(*packed, *bounds)
    return out.unflatten(0, size).transpose(1, 2)


_Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries, keys and values, or their gradients, packed: [B·T, heads or groups, head_size]."""


class _Bounds(NamedTuple):
    """The three tensors of `Documents` inside of the operator."""

    device: torch.Tensor
    host: torch.Tensor
    longest: torch.Tensor

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


def _by_document(packed: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, ...]:
    """Returns a view [1, heads, n, head_size] of each document, all of them by one call."""
    views: tuple[torch.Tensor, ...] = packed.transpose(0, 1)[None].split(lengths, dim=2)
    return views


def _documents(tensors: Iterable[torch.Tensor], lengths: list[int]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yields for each document its views of packed tensors; see `_by_document`."""
    return zip(*(_by_document(tensor, lengths) for tensor in tensors), strict=True)


class _Cpu:
    """torch's flash kernel of the CPU, on one document after another."""

    def forward(self, inputs: _Inputs, bounds: _Bounds) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the output and the sums; see `_Kernel`."""
        lengths = bounds.lengths()
        out, log_sums = _outputs(inputs[0])
        for (to, *one), sums in zip(_documents((out, *inputs), lengths), log_sums.split(lengths, dim=1), strict=True):
            attended, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(*one, 0.0, True)
            to.copy_(attended)
            sums.copy_(log_sum[0])
        return out, log_sums

    def backward(self, grad: torch.Tensor, inputs: _Inputs, out: torch.Tensor, log_sums: torch.Tensor, bounds: _Bounds) -> _Inputs:
        """Returns the gradients; see `_Kernel`."""
        lengths = bounds.lengths()
        gradients = _like(inputs)
        documents = zip(
            _documents((grad, *inputs, out), lengths), log_sums.split(lengths, dim=1), _documents(gradients, lengths), strict=True
        )
        for one, sums, targets in documents:
            found = aten._scaled_dot_product_flash_attention_for_cpu_backward(*one, sums[None], 0.0, True)
            for target, gradient in zip(targets, found, strict=True):
                target.copy_(gradient)
        return gradients


class _Flash:
    """The flash kernel of CUDA for sequences of various lengths."""

    def forward(self, inputs: _Inputs, bounds: _Bounds) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the output and the sums; see `_Kernel`."""
        longest = int(bounds.longest)
        out, log_sums, *_ = aten._flash_attention_forward(*inputs, bounds.device, bounds.device, longest, longest, 0.0, True, False)
        return out, log_sums

    def backward(self, grad: torch.Tensor, inputs: _Inputs, out: torch.Tensor, log_sums: torch.Tensor, bounds: _Bounds) -> _Inputs:
        """Returns the gradients; see `_Kernel`."""
        longest = int(bounds.longest)
        sizes = bounds.device, bounds.device, longest, longest
        # Without dropout nothing reads the generator's state, which is two numbers.
        state = torch.zeros(2, dtype=torch.uint64, device=grad.device), torch.empty(0, device=grad.device)
        queries, keys, values = aten._flash_attention_backward(grad, *inputs, out, log_sums, *sizes, 0.0, True, *state)
        return queries, keys, values


class _ScaledDotProduct:
    """scaled_dot_product_attention on one document after another, where torch has no flash kernel.

    The kernels that remain take no grouped heads, so keys and values are repeated, a document at a time.
    """

    def forward(self, inputs: _Inputs, bounds: _Bounds) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the output, and zeros in place of the sums, which nothing reads; see `_Kernel`."""
        out, log_sums = _outputs(inputs[0])
        for to, *one in _documents((out, *inputs), bounds.lengths()):
            to.copy_(self._attend(*one))
        return out, log_sums.zero_()

    def backward(self, grad: torch.Tensor, inputs: _Inputs, out: torch.Tensor, log_sums: torch.Tensor, bounds: _Bounds) -> _Inputs:
        """Returns the gradients; see `_Kernel`."""
        lengths = bounds.lengths()
        gradients = _like(inputs)
        for (grad_of, *one), targets in zip(_documents((grad, *inputs), lengths), _documents(gradients, lengths), strict=True):
            with torch.enable_grad():
                leaves = [tensor.detach().requires_grad_() for tensor in one]
                found = torch.autograd.grad(self._attend(*leaves), leaves, grad_of)
            for target, gradient in zip(targets, found, strict=True):
                target.copy_(gradient)
        return gradients

    def _attend(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        share = queries.shape[1] // keys.shape[1]
        if share > 1:
            keys, values = (tensor.repeat_interleave(share, dim=1) for tensor in (keys, values))
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)


def _outputs(queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns memory for the output and the logarithms of the sums."""
    rows, heads, _ = queries.shape
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    return out, queries.new_empty((heads, rows), dtype=torch.promote_types(queries.dtype, torch.float32))


def _like(inputs: _Inputs) -> _Inputs:
    """Returns memory for the gradients of queries, keys and values."""
    queries, keys, values = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs)
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
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bounds: torch.Tensor, host_bounds: torch.Tensor, longest: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    first, last = host_bounds[:: len(host_bounds) - 1].tolist()
    if (first, last) != (0, len(queries)):
        raise ValueError(f"the documents extend from position {first} to {last}; allowed: from 0 to B·T = {len(queries)}")
    inputs = _whole_heads(queries), _whole_heads(keys), _whole_heads(values)
    return _kernel(queries).forward(inputs, _Bounds(bounds, host_bounds, longest))


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = _whole_heads(queries), _whole_heads(keys), _whole_heads(values)
    return _kernel(queries).backward(_whole_heads(grad), inputs, out, log_sums, _Bounds(bounds, host_bounds, longest))


def _whole_heads(packed: torch.Tensor) -> torch.Tensor:
    """Returns the tensor with each head's numbers next to each other, as the kernels need them."""
    return packed if packed.stride(-1) == 1 else packed.contiguous()


def _register() -> None:
    """Registers the operator, its shapes for tracing and its gradient."""
    name, backward_name = "megatron_patch::documents_attention", "megatron_patch::documents_attention_backward"
    bounds = "Tensor bounds, Tensor host_bounds, Tensor longest"
    packed = "Tensor queries, Tensor keys, Tensor values"
    torch.library.define(name, f"({packed}, {bounds}) -> (Tensor, Tensor)")
    torch.library.define(backward_name, f"(Tensor grad, {packed}, Tensor out, Tensor log_sums, {bounds}) -> (Tensor, Tensor, Tensor)")
    torch.library.impl(name, "default")(_forward)
    torch.library.impl(backward_name, "default")(_backward)

    @torch.library.register_fake(name)
    def _(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *bounds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _outputs(queries)

    @torch.library.register_fake(backward_name)
    def _(grad: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *more: torch.Tensor) -> _Inputs:
        return _like((queries, keys, values))

    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        ctx.save_for_backward(*inputs[:3], *output, *inputs[3:])

    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (*torch.ops.megatron_patch.documents_attention_backward(grad, *ctx.saved_tensors), None, None, None)

    torch.library.register_autograd(name, backward, setup_context=setup_context)


_register()
