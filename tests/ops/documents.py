"""Documents for tests, the formula of attention with a dense mask in float64, and stand-ins on the CPU for CUDA's flash operators."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from megatron_patch.ops.documents_attention import Documents, documents_from_ids, slice_documents, sliced_attention


def ids_of(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Returns the number of each position's document, [B, T], for samples that are given as the lengths of their documents."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])


def documents_of(rows: Sequence[Sequence[int]]) -> Documents:
    """Returns the documents of samples that are given as the lengths of their documents; at least one sample has several."""
    documents = documents_from_ids(ids_of(rows).numpy())
    assert documents is not None
    return documents


def dense_mask(ids: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Returns which positions attend to which, bool [B, 1, T, T]."""
    positions = torch.arange(ids.shape[1], device=ids.device)
    distance = positions[:, None] - positions[None, :]
    return ((ids[:, :, None] == ids[:, None, :]) & (distance >= 0) & (distance < (window or ids.shape[1])))[:, None]


def by_formula(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, ids: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """softmax(q k / sqrt(d)) v over the positions that the mask leaves, in float64 and by plain products."""
    share = queries.shape[1] // keys.shape[1]
    keys, values = (tensor.double().repeat_interleave(share, dim=1) for tensor in (keys, values))
    scores = queries.double() @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
    return scores.masked_fill(~dense_mask(ids, window), -torch.inf).softmax(-1) @ values


def by_parts(parts: int, rows: Sequence[Sequence[int]]) -> Callable[..., torch.Tensor]:
    """Returns attention by ranks that have a part of each sample's positions each, as one function of all positions."""
    positions = sum(rows[0])

    def attend(
        queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, documents: Documents, window: int | None = None
    ) -> torch.Tensor:
        own = [queries[:, :, part * positions // parts : (part + 1) * positions // parts] for part in range(parts)]
        slices = [slice_documents(documents, positions, part, parts) for part in range(parts)]
        return torch.cat([sliced_attention(q, keys, values, each, window) for q, each in zip(own, slices, strict=True)], dim=2)

    return attend


def inputs_of(
    ids: torch.Tensor, heads: int, groups: int, head_size: int, dtype: torch.dtype, device: str = "cpu", stored_by_head: bool = False
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Returns queries, keys and values [B, heads, T, head_size] that require gradients, and a gradient of the output."""
    generator = torch.Generator().manual_seed(ids.numel())
    tensors = []
    for count in (heads, groups, groups, heads):
        drawn = torch.randn(*ids.shape, count, head_size, generator=generator, dtype=torch.float64).to(dtype).to(device).transpose(1, 2)
        tensors.append(drawn.contiguous() if stored_by_head else drawn)
    return [tensor.requires_grad_() for tensor in tensors[:3]], tensors[3]


@dataclass
class FlashCalls:
    """What the stand-ins were called with: (function, cum_seq_q, longest), in order; and their windows."""

    calls: list[tuple[str, torch.Tensor, object]] = field(default_factory=list)
    windows: list[int | None] = field(default_factory=list)


@contextlib.contextmanager
def flash_on_cpu() -> Iterator[FlashCalls]:
    """Gives the two aten operators of CUDA's flash attention kernels for the CPU, with their contracts, by the formula.

    Packed [N, heads, head_size], int32 bounds, whole numbers as longest lengths; the last dimension is contiguous.
    """
    seen = FlashCalls()

    def documents(heads, bounds, *packed):
        """The heads of each document: [heads, n, head_size] in float64, with those of groups repeated."""
        for first, last in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
            yield [tensor[first:last].transpose(0, 1).double().repeat_interleave(heads // tensor.shape[1], dim=0) for tensor in packed]

    def scores_of(q, k, left):
        # The last query sees the last key.
        sizes, before = (q.shape[1], k.shape[1]), k.shape[1] - q.shape[1]
        hidden = ~torch.ones(sizes, dtype=torch.bool).tril(before)
        if left is not None:
            hidden |= torch.ones(sizes, dtype=torch.bool).tril(before - left - 1)
        return (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)

    def check(name, tensors, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, left, right):
        assert all(tensor.dim() == 3 and tensor.stride(-1) == 1 for tensor in tensors)
        for bounds, longest, tensor in ((cum_seq_q, max_q, tensors[0]), (cum_seq_k, max_k, tensors[-1])):
            assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == len(tensor)
            assert type(longest) is int and longest == int(bounds.diff().max())
        assert dropout_p == 0.0 and is_causal is True
        # The kernel has a window if the number of positions before is not negative; none after, as is_causal says too.
        assert (left is None and right is None) or (type(left) is int and left >= 0 and right == 0)
        seen.calls.append((name, cum_seq_q, max_q))
        seen.windows.append(left)

    def forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask,
        *, scale=None, window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, **newer
    ):  # fmt: skip
        sizes = cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal
        check("forward", (query, key, value), *sizes, window_size_left, window_size_right)
        assert (return_debug_mask, scale) == (False, None)
        pairs = zip(documents(query.shape[1], cum_seq_q, query), documents(query.shape[1], cum_seq_k, key, value), strict=True)
        parts = [(scores_of(q, k, window_size_left), v) for (q,), (k, v) in pairs]
        out = torch.cat([(scores.softmax(-1) @ v).transpose(0, 1) for scores, v in parts])
        sums = torch.cat([scores.logsumexp(-1) for scores, _ in parts], dim=1)
        state = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64), torch.empty(0)
        return out.to(query.dtype), sums.float(), *state

    def backward(
        grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state, unused,
        *, scale=None, window_size_left=None, window_size_right=None
    ):  # fmt: skip
        sizes = cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal
        check("backward", (grad_out, query, out, key, value), *sizes, window_size_left, window_size_right)
        assert rng_state.shape == (2,) and rng_state.dtype == torch.uint64
        gradients, sums = [], logsumexp.double().split(cum_seq_q.diff().tolist(), dim=1)
        heads = query.shape[1]
        pairs = zip(documents(heads, cum_seq_q, query, out, grad_out), documents(heads, cum_seq_k, key, value), sums, strict=True)
        for (q, o, do), (k, v), log_sum in pairs:
            # The kernel computes its probabilities from the sums, and their gradient from the output, that the forward pass has kept.
            p = (scores_of(q, k, window_size_left) - log_sum[..., None]).exp()
            ds = p * (do @ v.transpose(1, 2) - (do * o).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
            of_heads = (ds @ k, ds.transpose(1, 2) @ q, p.transpose(1, 2) @ do)
            gradients.append([gradient.transpose(0, 1) for gradient in of_heads])
        of_query, *others = (torch.cat(parts) for parts in zip(*gradients, strict=True))
        groups = [one.unflatten(1, (key.shape[1], -1)).sum(2) for one in others]
        return tuple(gradient.to(query.dtype) for gradient in (of_query, *groups))

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield seen
