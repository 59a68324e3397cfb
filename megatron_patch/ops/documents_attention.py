"""Causal attention inside documents and windows: positions attend to the nearest earlier positions of their own document, without a mask of
T x T.

In: queries, keys and values of a micro-batch, `Documents`: where documents begin and end, and the length of the window, if there is one.
Out: what attention with the dense mask gives. `attention_kernels` computes it; the operators `megatron_patch::documents_attention` and
`megatron_patch::sliced_attention`, for ranks that have a part of the queries, are opaque to torch.compile.

Attention of a document of n positions costs n² instead of T², in time, and n·window with a window. It needs no memory beyond that of plain
causal attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_patch.ops.attention_kernels import Bounds, KeySpans, PackedInputs, kernel_for, like, outputs


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


@dataclass(frozen=True)
class DocumentSlices:
    """The queries of one of several equal, contiguous parts of each sample, by document, and the keys that these attend to.

    Args:
        queries: the documents of the part's B·T/parts positions.
        key_bounds: int32 [N + 1], on the device: sums of the numbers of keys of the first documents, from 0.
        host_spans: int32 [N, 2], in host memory: each document's first key in the B·T positions, and the one after its last.
        longest_span: int64, no dimensions, in host memory: the largest number of keys.
    """

    queries: Documents
    key_bounds: torch.Tensor
    host_spans: torch.Tensor
    longest_span: torch.Tensor

    def mark_dynamic(self) -> None:
        """Lets torch.compile compile once for all numbers of documents."""
        self.queries.mark_dynamic()
        torch._dynamo.mark_dynamic(self.key_bounds, 0)
        torch._dynamo.mark_dynamic(self.host_spans, 0)


def slice_documents(documents: Documents, positions: int, part: int, parts: int) -> DocumentSlices:
    """Returns the documents of one part of each sample; the host does not wait for the device.

    Args:
        documents: those of all B·T positions.
        positions: T.
        part: number of the part, from 0.
        parts: number of parts, a divisor of T.
    """
    bounds = documents.host_bounds.numpy().astype(np.int64)
    own = positions // parts
    starts = np.arange(0, bounds[-1], positions) + part * own
    # A document is cut where a part begins or ends; only its keys before its first query are outside of the part.
    cuts = np.union1d(bounds, np.concatenate([starts, starts + own]))
    inside = (cuts[:-1] % positions >= part * own) & (cuts[:-1] % positions < (part + 1) * own)
    first, last = cuts[:-1][inside], cuts[1:][inside]
    spans = np.stack([bounds[np.searchsorted(bounds, first, side="right") - 1], last], axis=1)
    lengths = last - first
    host_bounds = torch.from_numpy(np.append(0, np.cumsum(lengths)).astype(np.int32))
    key_bounds = torch.from_numpy(np.append(0, np.cumsum(spans[:, 1] - spans[:, 0])).astype(np.int32))
    device = documents.bounds.device
    return DocumentSlices(
        Documents(host_bounds.to(device, non_blocking=True), host_bounds, torch.tensor(int(lengths.max()))),
        key_bounds.to(device, non_blocking=True),
        torch.from_numpy(spans.astype(np.int32)),
        torch.tensor(int((spans[:, 1] - spans[:, 0]).max())),
    )


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
    return _attended(torch.ops.megatron_patch.documents_attention, queries, keys, values, documents, (), window)


def sliced_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slices: DocumentSlices, window: int | None = None
) -> torch.Tensor:
    """Computes `documents_attention` for one part of each sample's positions.

    Args:
        queries: [B, heads, T/parts, head_size].
        keys: [B, groups, T, head_size], of all positions.
        values: like `keys`.
        slices: the documents of the part.
        window: see `documents_attention`.

    Returns:
        [B, heads, T/parts, head_size], stored as [B, T/parts, heads, head_size].

    Raises:
        ValueError: see `documents_attention`.
    """
    spans = slices.key_bounds, slices.host_spans, slices.longest_span
    return _attended(torch.ops.megatron_patch.sliced_attention, queries, keys, values, slices.queries, spans, window)


def _attended(
    operator: Any,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    documents: Documents,
    spans: tuple[torch.Tensor, ...],
    window: int | None,
) -> torch.Tensor:
    size = queries.shape[0], queries.shape[2]
    packed = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (queries, keys, values))
    out, _ = operator(*packed, documents.bounds, documents.host_bounds, documents.longest, *spans, window)
    attended: torch.Tensor = out.unflatten(0, size).transpose(1, 2)
    return attended


def _inputs(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> PackedInputs:
    return _whole_heads(queries), _whole_heads(keys), _whole_heads(values)


def _whole_heads(packed: torch.Tensor) -> torch.Tensor:
    """Returns the tensor with each head's numbers next to each other, as the kernels need them."""
    return packed if packed.stride(-1) == 1 else packed.contiguous()


def _bounds(bounds: tuple[Any, ...]) -> Bounds:
    """Returns the last arguments of an operator: the tensors of `Documents`, then those of the keys in the other operator, the window."""
    device, host, longest, *spans, window = bounds
    return Bounds(device, host, longest, window, KeySpans(*spans) if spans else None)


def _forward(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *tensors: Any) -> tuple[torch.Tensor, torch.Tensor]:
    bounds = _bounds(tensors)
    first, last = bounds.host[:: len(bounds.host) - 1].tolist()
    if (first, last) != (0, len(queries)):
        raise ValueError(f"the documents extend from position {first} to {last}; allowed: from 0 to B·T = {len(queries)}")
    if bounds.window is not None and bounds.window < 1:
        raise ValueError(f"a window of {bounds.window} positions; allowed: from 1")
    return kernel_for(queries).forward(_inputs(queries, keys, values), bounds)


def _backward(
    grad: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    log_sums: torch.Tensor,
    *tensors: Any,
) -> PackedInputs:
    return kernel_for(queries).backward(_whole_heads(grad), _inputs(queries, keys, values), out, log_sums, _bounds(tensors))


def _register(name: str, bounds: str) -> None:
    """Registers an operator, its shapes for tracing and its gradient.

    Args:
        name: its name.
        bounds: declaration of its arguments after queries, keys and values; all but the last are tensors.
    """
    name, backward_name = f"megatron_patch::{name}", f"megatron_patch::{name}_backward"
    packed, bounds = "Tensor queries, Tensor keys, Tensor values", f"{bounds}, int? window=None"
    torch.library.define(name, f"({packed}, {bounds}) -> (Tensor, Tensor)")
    torch.library.define(backward_name, f"(Tensor grad, {packed}, Tensor out, Tensor log_sums, {bounds}) -> (Tensor, Tensor, Tensor)")
    backward_operator = getattr(torch.ops.megatron_patch, backward_name.split("::")[1])
    tensors = len(bounds.split(", ")) - 1

    def arguments(given: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns the arguments with the window, which callers may leave out."""
        return given if len(given) > tensors else (*given, None)

    @torch.library.impl(name, "default")
    def _(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return _forward(queries, keys, values, *arguments(more))

    @torch.library.impl(backward_name, "default")
    def _(grad: torch.Tensor, *more: Any) -> PackedInputs:
        return _backward(grad, *more[:5], *arguments(more[5:]))

    @torch.library.register_fake(name)
    def _(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return outputs(queries)

    @torch.library.register_fake(backward_name)
    def _(grad: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *more: Any) -> PackedInputs:
        return like((queries, keys, values))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        *tensors, window = inputs
        ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
        ctx.window = window

    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (*backward_operator(grad, *ctx.saved_tensors, ctx.window), *(None,) * (tensors + 1))

    torch.library.register_autograd(name, backward, setup_context=setup_context)


_register("documents_attention", "Tensor bounds, Tensor host_bounds, Tensor longest")
_register(
    "sliced_attention",
    "Tensor bounds, Tensor host_bounds, Tensor longest, Tensor key_bounds, Tensor host_spans, Tensor longest_span",
)
