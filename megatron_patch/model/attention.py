"""Causal self-attention with grouped queries. A position can be a token or a patch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_patch.model.norm import make_head_norm
from megatron_patch.model.rotary import rotate
from megatron_patch.model.shape import ModelShape
from megatron_patch.model.sharding import shards_key_value
from megatron_patch.ops import softcapped
from megatron_patch.ops.attention_kernels import LONGEST_FLASH_HEAD
from megatron_patch.ops.documents_attention import Documents, DocumentSlices, documents_attention, sliced_attention
from megatron_patch.parallel.context import UNSHARED, ContextParallel, share_heads, share_positions
from megatron_patch.parallel.tensor import UNSHARDED, RowParallelLinear, TensorParallel, all_reduce_gradient, copy_to_tensor_parallel


@dataclass(frozen=True)
class AttentionContext:
    """The inputs that all blocks of a forward pass share; all but the last are those of attention.

    Args:
        rotary: (cos, sin), each [B or 1, 1, T, head_size], or None with learned positions.
        mask: bool [B or 1, 1, T, T], True where a position attends to another, or None for the causal mask. For the cache and padding of
            generation, and always in a model that caps scores; it costs T² numbers and time.
        documents: attention is causal inside of these documents; None: inside of each sample. Not together with `mask`.
        windowed: of a model with windows, for the blocks with one: `documents`, or the samples as documents. Not together with `mask`.
        windowed_mask: `mask` for the blocks with a window.
        ranks: the ranks that share the positions; masks and documents are those of all positions.
        slices: this rank's part of the documents, if these ranks gather keys and values.
        windowed_rotary: `rotary` for the blocks with a window; None: the same.
        real_samples: number of samples, the first ones, that are no padding, for the load of experts; None: all.
    """

    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    mask: torch.Tensor | None = None
    documents: Documents | None = None
    windowed: Documents | None = None
    windowed_mask: torch.Tensor | None = None
    ranks: ContextParallel = UNSHARED
    slices: DocumentSlices | None = None
    windowed_rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    real_samples: int | None = None


@dataclass
class KeyValueCache:
    """Keys and values of one block for the positions read so far, for generation.

    Args:
        length: number of positions.
        keys: [B, groups, capacity, head_size], of which the first `length` positions are used; with a window the last positions, at most
            `window` of them.
        values: like `keys`.
        window: the block's window; earlier positions, which no new one sees, are not kept. None: all are kept.
    """

    length: int = 0
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    window: int | None = None

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends keys and values of new positions, and returns those of all positions, [B, groups, T, head_size].

        With a window, those of the positions that the new ones see are returned.
        """
        start, end = self.length, self.length + keys.shape[2]
        if self.window is not None:
            keys, values = (_seen(old, new, self.window) for old, new in ((self.keys, keys), (self.values, values)))
            # A copy of the last ones lets the others go.
            fits = keys.shape[2] <= self.window
            self.keys, self.values = (tensor if fits else tensor[:, :, -self.window :].clone() for tensor in (keys, values))
            self.length = end
            return keys, values
        self.keys, self.values = (_append(old, new, start, end) for old, new in ((self.keys, keys), (self.values, values)))
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


def _seen(old: torch.Tensor | None, new: torch.Tensor, window: int) -> torch.Tensor:
    """Returns new positions after those of `old` that the first of them sees."""
    if old is None:
        return new
    return torch.cat((old[:, :, max(0, old.shape[2] - (window - 1)) :], new), dim=2)


def _append(old: torch.Tensor | None, new: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Returns storage with the first `start` positions of `old`, then `new`; the capacity doubles when it is full."""
    if old is None or old.shape[2] < end:
        larger = new.new_empty(*new.shape[:2], end if old is None else 2 * end, new.shape[3])
        if old is not None:
            larger[:, :, :start] = old[:, :, :start]
        old = larger
    old[:, :, start:end] = new
    return old


@dataclass
class ModelCache:
    """The state of generation.

    Args:
        blocks: one cache for each block.
        length: number of positions that they hold.
        padding: int64 [B], number of padding positions at the start of each row, or None without padding.
    """

    blocks: list[KeyValueCache] = field(default_factory=list)
    length: int = 0
    padding: torch.Tensor | None = None


class KeyValueLinear(nn.Linear):
    """The projection to keys or to values.

    It is column-parallel where the ranks divide the query groups. With fewer groups than ranks, every rank holds the full weight and
    computes only the group of its own heads.

    Args:
        inputs: H.
        outputs: number of outputs that this rank holds.
        shape: the model's shape.
        parallel: the ranks that share the heads.
    """

    def __init__(self, inputs: int, outputs: int, shape: ModelShape, parallel: TensorParallel) -> None:
        super().__init__(inputs, outputs, bias=shape.qkv_bias)
        self.parallel = parallel
        self.rows: slice | None = None
        if not shards_key_value(shape, parallel.size):
            group = parallel.rank * shape.num_query_groups // parallel.size
            self.rows = slice(group * shape.head_size, (group + 1) * shape.head_size)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Maps [B, T, H] to [B, T, groups of this rank · head_size]."""
        if self.rows is None:
            return super().forward(input)
        weight = all_reduce_gradient(self.weight, self.parallel)[self.rows]
        bias = None if self.bias is None else all_reduce_gradient(self.bias, self.parallel)[self.rows]
        return F.linear(input, weight, bias)


class Attention(nn.Module):
    """Self-attention: query, key and value projections, rotary embedding, scaled dot products, output projection.

    Args:
        shape: the model's shape.
        recompute: whether the backward pass recomputes the scaled dot products instead of keeping their activations.
        parallel: the ranks that share the heads.
        layer: number of the block, from 0, which decides on its window and its rotation.
    """

    def __init__(self, shape: ModelShape, recompute: bool = False, parallel: TensorParallel = UNSHARDED, layer: int = 0) -> None:
        super().__init__()
        self.window, self.rotates = shape.window_of(layer), layer not in shape.unrotated_layers
        self.head_size, self.recompute, self.parallel = shape.head_size, recompute, parallel
        self.query_scalar, self.softcap = shape.query_scalar, shape.attention_softcap
        queries, keys = shape.num_attention_heads * shape.head_size, shape.num_query_groups * shape.head_size
        local_keys = parallel.shard_size(keys) if shards_key_value(shape, parallel.size) else keys
        self.query = nn.Linear(shape.hidden_size, parallel.shard_size(queries), bias=shape.qkv_bias)
        self.key = KeyValueLinear(shape.hidden_size, local_keys, shape, parallel)
        self.value = KeyValueLinear(shape.hidden_size, local_keys, shape, parallel)
        self.output = RowParallelLinear(queries, shape.hidden_size, shape.attention_bias, parallel)
        self.query_norm = make_head_norm(shape, shape.num_attention_heads, parallel)
        self.key_norm = make_head_norm(shape, shape.num_query_groups, parallel)

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        """Splits [B, T, heads·head_size] into [B, T, heads, head_size]."""
        return projected.unflatten(-1, (-1, self.head_size))

    def forward(self, hidden: torch.Tensor, context: AttentionContext, cache: KeyValueCache | None = None) -> torch.Tensor:
        """Returns the attention output.

        Args:
            hidden: [B, T, H], normalized; with sequence or context parallelism this rank's positions.
            context: rotary tables, the mask or the documents, and the ranks that share the positions.
            cache: earlier positions, to which all new positions attend; the new ones are appended.

        Returns:
            Like `hidden`.
        """
        hidden = copy_to_tensor_parallel(hidden, self.parallel)
        queries, keys = self._heads(self.query(hidden)), self._heads(self.key(hidden))
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        queries, keys = queries.transpose(1, 2), keys.transpose(1, 2)
        values = self._heads(self.value(hidden)).transpose(1, 2)
        rotary = context.rotary if self.window is None or context.windowed_rotary is None else context.windowed_rotary
        if rotary is not None and self.rotates:
            queries, keys = rotate(queries, *rotary), rotate(keys, *rotary)
        if cache is not None:
            keys, values = cache.extend(keys, values)
        queries, keys, values = share_heads(queries, keys, values, context.ranks)
        if self.recompute and self.training and torch.is_grad_enabled():
            attended = checkpoint(self._attend, queries, keys, values, context, use_reentrant=False, preserve_rng_state=False)
        else:
            attended = self._attend(queries, keys, values, context)
        return self.output(share_positions(attended, context.ranks).transpose(1, 2).flatten(2))

    def _attend(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        mask, documents = context.mask, context.documents
        window = self.window if self.window is not None and keys.shape[2] > self.window else None
        if self.window is not None and mask is not None and context.windowed_mask is not None:
            # The cache has dropped positions before the window.
            mask = context.windowed_mask[..., -keys.shape[2] :]
        if window is not None and context.slices is None:
            documents = context.windowed
            if mask is None and documents is None:
                assert queries.shape[2] == 1, "one new position, which sees the last ones of the cache"
                keys, values = (tensor[:, :, -window:] for tensor in (keys, values))
        if self.softcap is not None:
            assert mask is not None
            return softcapped_attention(queries, keys, values, mask, (self.query_scalar or self.head_size) ** -0.5, self.softcap)
        if self.query_scalar is not None and (documents is not None or context.slices is not None):
            # The operators divide by the root of the head size.
            queries = queries * (self.head_size / self.query_scalar) ** 0.5
        if context.slices is not None:
            return sliced_attention(queries, keys, values, context.slices, window)
        if documents is not None:
            return documents_attention(queries, keys, values, documents, window)
        causal = mask is None and queries.shape[2] == keys.shape[2]
        fewer = keys.shape[1] != queries.shape[1]
        grouped = fewer and supports_grouped_queries(queries.device.type, queries.dtype, self.head_size, masked=mask is not None)
        if fewer and not grouped:
            keys, values = (repeat_groups(tensor, queries.shape[1]) for tensor in (keys, values))
        scale = None if self.query_scalar is None else self.query_scalar**-0.5
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)


def softcapped_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float, cap: float
) -> torch.Tensor:
    """Returns attention whose scores are capped before the mask (Gemma 2, arXiv 2408.00118), as a plain formula with all scores in memory.

    Args:
        queries: [B, heads, T, head_size].
        keys: [B, groups, S, head_size].
        values: like `keys`.
        mask: bool [B or 1, 1, T, S], True where a position attends to another.
        scale: factor of the products of queries and keys.
        cap: the scores are cap · tanh(scaled product / cap).

    Returns:
        [B, heads, T, head_size].
    """
    keys, values = (repeat_groups(tensor, queries.shape[1]) for tensor in (keys, values))
    scores = torch.where(mask, softcapped(queries @ keys.transpose(-2, -1) * scale, cap), -torch.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return weights.to(queries.dtype) @ values


def supports_grouped_queries(device_type: str, dtype: torch.dtype, head_size: int, masked: bool) -> bool:
    """Whether a memory-efficient kernel of torch accepts fewer key-value heads than query heads.

    On CUDA, the flash kernel does, for 16-bit floats without a mask. All other cases need torch's memory-efficient kernel, which does not
    (up to torch 2.13); without either, torch would materialize all [B, heads, T, T] scores. The CPU's kernel always does.
    """
    return device_type != "cuda" or (not masked and dtype in (torch.float16, torch.bfloat16) and head_size <= LONGEST_FLASH_HEAD)


def repeat_groups(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeats key-value heads: [B, groups, T, head_size] to [B, heads, T, head_size], copies of a group next to each other."""
    groups = tensor.shape[1]
    return tensor[:, :, None].expand(-1, -1, heads // groups, -1, -1).flatten(1, 2)
