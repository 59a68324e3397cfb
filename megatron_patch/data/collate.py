"""From spans of tokens to what the model takes: patches, labels, and how documents are kept apart.

In: tokens [B, L] of samples (L = input tokens + lookahead) and their stage. Out: `PatchBatch`. What a document is inside patches:

- A document begins at the first token after an end-of-document token that is not itself one; runs of them belong to what they end.
- A patch belongs to the document of its **last** token, since that is the document that the next patch goes on with.
- A label counts, where documents are kept apart, only if it belongs to the document of the patch that predicts it. At K = 1 this is
  Megatron's rule: what an end-of-document token would have to predict is not scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from megatron_patch.data.token_stream import Span
from megatron_patch.ops.plain import IGNORE_INDEX
from megatron_patch.stages import Side

Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DocumentMasking:
    """How documents are kept apart.

    Args:
        eod_id: the end-of-document token; needed by all of the following.
        reset_attention_mask: no attention across documents.
        reset_position_ids: positions start at 0 in each document.
        eod_mask_loss: labels of other documents are not scored.
        ignore_repeated_eod: an end-of-document label right after an end-of-document token is not scored (aligned data pads with them).
    """

    eod_id: int | None = None
    reset_attention_mask: bool = False
    reset_position_ids: bool = False
    eod_mask_loss: bool = False
    ignore_repeated_eod: bool = False

    @property
    def needs_documents(self) -> bool:
        """Whether documents have to be found."""
        return self.reset_attention_mask or self.reset_position_ids or self.eod_mask_loss


class PatchBatch(NamedTuple):
    """One micro-batch.

    Args:
        input_ids: int64 [B, T, K].
        labels: int64 [B, T, K'], IGNORE_INDEX where not scored.
        position_ids: int64 [B, T], or None for 0..T-1.
        document_ids: int64 [B, T], or None for one document.
        spans: where the inputs come from; empty for held-out data.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None
    document_ids: torch.Tensor | None
    spans: tuple[Span, ...]


def _patch_views(tokens: Array, side: Side, positions: int, patch_size: int) -> tuple[Array, Array]:
    """Inputs [B, T, K_in] and labels [B, T, K_out] as views of tokens [B, L]."""
    rows = tokens.shape[0]
    if side == "output":
        windows = np.lib.stride_tricks.sliding_window_view(tokens[:, 1 : positions + patch_size], patch_size, axis=1)
        return tokens[:, :positions, None], windows
    inputs = tokens[:, : positions * patch_size].reshape(rows, positions, patch_size)
    labels = tokens[:, patch_size : (positions + 1) * patch_size].reshape(rows, positions, patch_size)
    return inputs, labels[:, :, :1] if side == "input" else labels


def make_batch(
    tokens: Array,
    side: Side,
    positions: int,
    patch_size: int,
    masking: DocumentMasking,
    spans: tuple[Span, ...] = (),
    scored_rows: int | None = None,
) -> PatchBatch:
    """Cuts samples into patches.

    Args:
        tokens: [B, input tokens + patch_size].
        side: which side reads patches.
        positions: T.
        patch_size: K.
        masking: how documents are kept apart.
        spans: where the samples come from.
        scored_rows: rows from this one on only fill the micro-batch up and are not scored.

    Returns:
        The micro-batch.
    """
    inputs, labels = _patch_views(tokens, side, positions, patch_size)
    labels = labels.copy()
    position_ids = document_ids = None
    if masking.eod_id is not None and (masking.needs_documents or masking.ignore_repeated_eod):
        ends = tokens == masking.eod_id
        if masking.ignore_repeated_eod:
            repeated = np.zeros_like(tokens)
            repeated[:, 1:] = ends[:, 1:] & ends[:, :-1]
            labels[_patch_views(repeated, side, positions, patch_size)[1] == 1] = IGNORE_INDEX
        if masking.needs_documents:
            begins = np.zeros_like(tokens)
            begins[:, 1:] = ends[:, :-1] & ~ends[:, 1:]
            input_documents, label_documents = _patch_views(np.cumsum(begins, axis=1), side, positions, patch_size)
            documents = np.ascontiguousarray(input_documents[:, :, -1])
            if masking.eod_mask_loss:
                labels[label_documents != documents[:, :, None]] = IGNORE_INDEX
            if masking.reset_attention_mask:
                document_ids = torch.from_numpy(documents)
            if masking.reset_position_ids:
                position_ids = torch.from_numpy(_restarting_positions(documents))
    if scored_rows is not None:
        labels[scored_rows:] = IGNORE_INDEX
    return PatchBatch(torch.from_numpy(np.ascontiguousarray(inputs)), torch.from_numpy(labels), position_ids, document_ids, spans)


def _restarting_positions(documents: Array) -> Array:
    """0, 1, 2, … from each first patch of a document; [B, T] to [B, T]."""
    places = np.broadcast_to(np.arange(documents.shape[1]), documents.shape)
    first = np.ones_like(documents, dtype=bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places - np.maximum.accumulate(np.where(first, places, 0), axis=1)
