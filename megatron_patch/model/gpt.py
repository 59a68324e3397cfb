"""The language model: embedding, blocks, final norm and head; all layers, or those of one pipeline rank.

In: token patches and labels. Out: the sum of losses and the sum of weights, so that the caller can normalize over the global batch instead
of the micro-batch. The same code computes every K; at K = 1 it is an ordinary language model, with the plain operators bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_patch.model.attention import AttentionContext, KeyValueCache, ModelCache
from megatron_patch.model.block import Block
from megatron_patch.model.embedding import Embedding
from megatron_patch.model.head import Head
from megatron_patch.model.norm import make_norm
from megatron_patch.model.rotary import rotary_tables, windowed_rotary_tables
from megatron_patch.model.shape import ModelShape, check_shape
from megatron_patch.model.sharding import check_sharding
from megatron_patch.ops import Operators
from megatron_patch.ops.attention_kernels import band, dense_mask
from megatron_patch.ops.documents_attention import Documents, documents_of_samples, slice_documents
from megatron_patch.parallel.context import UNSHARED, ContextParallel
from megatron_patch.parallel.experts import UNDIVIDED, ExpertParallel
from megatron_patch.parallel.tensor import UNSHARDED, TensorParallel

Recompute = Literal["none", "selective", "full"]


class GPTModel(nn.Module):
    """A decoder-only transformer over patches.

    Args:
        shape: the model's shape.
        recompute: activations that the backward pass recomputes: none, those of the attention product, or those of full blocks.
        operators: compiled kernels for embedding and loss where they are built, or their plain formulas.
        parallel: the ranks that share each layer.
        layers: the layers of this pipeline rank, of 0 (embedding), 1 to L (blocks) and L + 1 (final norm and head); None: all. A parameter
            has the same name on every pipeline rank. The rank of a head that is tied to the embedding holds a copy of its weight.
        divided: the data-parallel ranks that divide the experts.

    Raises:
        ConfigError: a shape that cannot be built.
    """

    def __init__(
        self,
        shape: ModelShape,
        recompute: Recompute = "none",
        operators: Operators = "fused",
        parallel: TensorParallel = UNSHARDED,
        layers: range | None = None,
        divided: ExpertParallel = UNDIVIDED,
    ) -> None:
        super().__init__()
        check_shape(shape)
        check_sharding(shape, parallel.size, divided.size)
        self.shape, self.recompute, self.parallel = shape, recompute, parallel
        layers = range(shape.num_layers + 2) if layers is None else layers
        self.is_first, self.is_last = 0 in layers, shape.num_layers + 1 in layers
        word = self.is_first or (self.is_last and shape.tie_embeddings)
        self.embedding = Embedding(shape, operators, parallel, positions=self.is_first) if word else None
        numbers = [number for number in range(shape.num_layers) if number + 1 in layers]
        self.blocks = nn.ModuleDict({str(number): Block(shape, recompute == "selective", parallel, number, divided) for number in numbers})
        self._compiled = False
        self.final_norm = make_norm(shape, parallel) if self.is_last else None
        self.head = Head(shape, operators, parallel) if self.is_last else None

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters."""
        return next(self.parameters()).device

    @property
    def tied_copies(self) -> frozenset[str]:
        """Names of the parameters that copy those of another pipeline rank: the embedding's weight of a tied head."""
        return frozenset(["embedding.word.weight"]) if self.embedding is not None and not self.is_first else frozenset()

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compiles each block with torch.compile; blocks of one shape share the compiled code.

        Each sample length, and number of ranks that share a sample, is compiled once for training and once for evaluation, and once more
        for micro-batches whose samples hold several documents, however many. A plan with many lengths exceeds torch's limit of 8
        compilations, after which it would run uncompiled, so the limit is raised.

        Args:
            backend: a backend of torch.compile.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self._compiled = True
        for block in self.blocks.values():
            block.compile(dynamic=False, backend=backend)

    def forward(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor | None,
        label_weights: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        documents: Documents | None = None,
        ranks: ContextParallel = UNSHARED,
        real_samples: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        """Returns the loss of a micro-batch, or the output of this pipeline rank's layers.

        Args:
            inputs: int64 [B, T, K]; without the first layer hidden states [B, T, H], with sequence parallelism this rank's positions.
            labels: int64 [B, T, K']; IGNORE_INDEX is not scored. None: the logits are returned.
            label_weights: [K'], or None for 1.
            position_ids: int64 [B, T]; None: 0 to T - 1, or this rank's part of all positions.
            documents: on the device; a position attends only to positions of its own document. None: to all earlier positions.
            ranks: the ranks that share the positions of each sample: T counts those of this rank in `inputs`, `labels` and `position_ids`,
                and `documents` are those of all positions.
            real_samples: number of samples, the first ones, that are no padding, for the load of experts; None: all.

        Returns:
            (sum of weighted losses in nats, sum of the weights of scored labels), float32; without labels the logits [B, T, V]; without
            the last layer hidden states, like `inputs`.
        """
        hidden = self._hidden(inputs, position_ids, documents, ranks=ranks, real_samples=real_samples)
        if self.head is None:
            return hidden
        if labels is None:
            return self.head.logits(hidden, self._word())
        result: tuple[torch.Tensor, torch.Tensor] = self.head(hidden, self._word(), labels, label_weights)
        return result

    def logits(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        documents: Documents | None = None,
        cache: ModelCache | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """Returns the logits of each position.

        Args:
            input_ids: int64 [B, T, K]; without the first layer hidden states [B, T, H].
            position_ids: int64 [B, T]; None: the positions after those in the cache, from 0.
            documents: on the device; a position attends only to positions of its own document. Not together with `cache`.
            cache: earlier positions; the new ones are appended.
            last_only: return the logits of the last position only.

        Returns:
            [B, T, V], or [B, 1, V]; without the last layer the hidden states of all positions.
        """
        hidden = self._hidden(input_ids, position_ids, documents, cache)
        if self.head is None:
            return hidden
        return self.head.logits(hidden[:, -1:] if last_only else hidden, self._word())

    def _word(self) -> torch.Tensor | None:
        return None if self.embedding is None else self.embedding.word.weight

    def _hidden(
        self,
        inputs: torch.Tensor,
        position_ids: torch.Tensor | None,
        documents: Documents | None,
        cache: ModelCache | None = None,
        ranks: ContextParallel = UNSHARED,
        real_samples: int | None = None,
    ) -> torch.Tensor:
        batch, positions, _ = inputs.shape
        if not self.is_first and self.parallel.sequence:
            positions *= self.parallel.size
        earlier = 0 if cache is None else cache.length
        padding = None if cache is None else cache.padding
        if (earlier or padding is not None) and position_ids is None:
            position_ids = torch.arange(earlier, earlier + positions, device=inputs.device).expand(batch, -1)
            if padding is not None:
                position_ids = (position_ids - padding[:, None]).clamp(min=0)
        if ranks.size > 1 and position_ids is None:
            position_ids = torch.arange(ranks.rank * positions, (ranks.rank + 1) * positions, device=inputs.device)[None]
        hidden = inputs
        if self.is_first:
            assert self.embedding is not None
            hidden = self.embedding(inputs, position_ids, ranks.size * positions)
        context = self._context(hidden, positions, position_ids, documents, earlier, padding, ranks, real_samples)
        if cache is not None:
            cache.blocks = cache.blocks or [KeyValueCache(window=self.shape.window_of(int(number))) for number in self.blocks]
            cache.length += positions
        for index, block in enumerate(self.blocks.values()):
            if self.recompute == "full" and self.training and torch.is_grad_enabled():
                hidden = _checkpoint(block, hidden, context)
            else:
                hidden = block(hidden, context, cache.blocks[index] if cache is not None else None)
        return hidden if self.final_norm is None else self.final_norm(hidden)

    def _context(
        self,
        hidden: torch.Tensor,
        length: int,
        position_ids: torch.Tensor | None,
        documents: Documents | None,
        earlier: int,
        padding: torch.Tensor | None,
        ranks: ContextParallel,
        real_samples: int | None,
    ) -> AttentionContext:
        rotary = windowed_rotary = None
        if self.shape.position_embedding == "rope":
            if position_ids is None:
                position_ids = torch.arange(length, device=hidden.device)[None]
            cos, sin = rotary_tables(position_ids, self.shape, hidden.dtype)
            rotary = (cos[:, None], sin[:, None])
            if (local := windowed_rotary_tables(position_ids, self.shape, hidden.dtype)) is not None:
                windowed_rotary = (local[0][:, None], local[1][:, None])
        samples, positions, device = len(hidden), ranks.size * length, hidden.device
        mask = self._mask(samples, positions, documents, earlier, padding, device)
        windowed = windowed_mask = slices = None
        if mask is not None:
            documents = None
            if self.shape.window is not None:
                windowed_mask = mask & band(mask.shape[2], mask.shape[3], self.shape.window, device)
            if ranks.gathers:
                mask, windowed_mask = (None if one is None else one.chunk(ranks.size, dim=2)[ranks.rank] for one in (mask, windowed_mask))
        else:
            if documents is None and not earlier and (self.shape.window is not None or ranks.gathers):
                windowed = documents_of_samples(samples, positions, device)
            else:
                windowed = documents
            if ranks.gathers and windowed is not None:
                slices = slice_documents(windowed, positions, ranks.rank, ranks.size)
        if self._compiled:
            for one in (windowed, slices):
                if one is not None:
                    one.mark_dynamic()
        return AttentionContext(rotary, mask, documents, windowed, windowed_mask, ranks, slices, windowed_rotary, real_samples)

    def _mask(
        self, samples: int, positions: int, documents: Documents | None, earlier: int, padding: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor | None:
        """Returns the mask of all positions, or None if no kernel needs it; see `AttentionContext`."""
        mask = None
        if padding is not None or (earlier and positions > 1):
            mask = torch.ones(1, 1, positions, earlier + positions, dtype=torch.bool, device=device).tril(diagonal=earlier)
        if padding is not None and mask is not None:
            indices = torch.arange(earlier + positions, device=device)
            # Padding attends to itself: softmax over no positions would be NaN.
            itself = indices[None, :] == indices[earlier:, None]
            mask = mask & ((indices >= padding[:, None, None, None]) | itself)
        if self.shape.attention_softcap is not None and mask is None:
            if earlier:
                return band(positions, earlier + positions, None, device)[None, None]
            return dense_mask(None if documents is None else documents.bounds, samples, positions, device)
        return mask


def _checkpoint(block: nn.Module, hidden: torch.Tensor, context: AttentionContext) -> Any:
    return checkpoint(block, hidden, context, use_reentrant=False, preserve_rng_state=False)
