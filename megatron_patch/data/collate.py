"""Turns spans of tokens into the model's input: patches, labels, and the separation of documents.

In: tokens [B, L] of samples (L = input tokens + lookahead) and their stage. Out: `PatchBatch`. Rules for documents inside patches:

- A document begins at the first token after an end-of-document token; repeated end-of-document tokens belong to the document they end.
- A patch belongs to the document of its **last** token, because that document continues in the next patch.
- With `eod_mask_loss`, a label is scored only if it belongs to the document of the patch that predicts it. At K = 1 this is Megatron's
  rule: the label of an end-of-document token is not scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from megatron_patch.data.token_stream import TokenSpan
from megatron_patch.ops.documents_attention import Documents, documents_from_ids
from megatron_patch.ops.plain import IGNORE_INDEX
from megatron_patch.stages import Side

Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DocumentMasking:
    """How documents are separated.

    Args:
        eod_id: id of the end-of-document token; all other settings need it.
        reset_attention_mask: positions do not attend to other documents.
        reset_position_ids: positions are numbered from 0 in each document.
        eod_mask_loss: labels of other documents are not scored.
        ignore_repeated_eod: an end-of-document label that follows an end-of-document token is not scored (it is padding of aligned data).

    Examples:
        >>> rules = DocumentMasking(eod_id=0, reset_attention_mask=True, eod_mask_loss=True)
        >>> rules.needs_documents
        True
    """

    eod_id: int | None = None
    reset_attention_mask: bool = False
    reset_position_ids: bool = False
    eod_mask_loss: bool = False
    ignore_repeated_eod: bool = False

    @property
    def needs_documents(self) -> bool:
        """Whether the documents inside a sample must be known."""
        return self.reset_attention_mask or self.reset_position_ids or self.eod_mask_loss


class PatchBatch(NamedTuple):
    """One micro-batch.

    Args:
        input_ids: token ids, int64 [B, T, K].
        labels: labels, int64 [B, T, K'], IGNORE_INDEX where they are not scored.
        position_ids: positions, int64 [B, T], or None for 0..T-1.
        documents: where the documents of the B·T positions begin and end, in host memory; None where attention does not separate documents,
            or each sample is one document.
        spans: where the samples come from; empty for held-out data.
        corpus: number of the corpus of held-out data; 0 for training data.
        padding: number of samples, the last ones, that are padding and do not count.
        digest: hash of the whole inputs and labels, of a batch of which this is a part; None: it is no part.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None
    documents: Documents | None
    spans: tuple[TokenSpan, ...]
    corpus: int = 0
    padding: int = 0
    digest: int | None = None

    def content_hash(self) -> int:
        """Returns a hash of the inputs and labels of the whole samples."""
        if self.digest is not None:
            return self.digest
        state = xxhash.xxh3_64()
        for tensor in (self.input_ids, self.labels):
            state.update(tensor.cpu().numpy().tobytes())
        return state.intdigest()

    def part(self, index: int, count: int) -> PatchBatch:
        """Returns one of `count` equal parts of the positions, for ranks that share them; `documents` stay those of all positions."""
        if count == 1:
            return self
        inputs, labels = (_part(tensor, index, count) for tensor in (self.input_ids, self.labels))
        positions = None if self.position_ids is None else _part(self.position_ids, index, count)
        return self._replace(input_ids=inputs, labels=labels, position_ids=positions, digest=self.content_hash())


def _part(tensor: torch.Tensor, index: int, count: int) -> torch.Tensor:
    """Returns one of `count` equal parts of the positions of a tensor [B, T, ...]."""
    return tensor.unflatten(1, (count, -1))[:, index].contiguous()


def _patch_views(tokens: Array, side: Side, positions: int, patch_size: int) -> tuple[Array, Array]:
    """Returns inputs [B, T, K_in] and labels [B, T, K_out] as views of tokens [B, L]."""
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
    spans: tuple[TokenSpan, ...] = (),
    scored_rows: int | None = None,
) -> PatchBatch:
    """Returns the micro-batch of some samples, divided into patches.

    Args:
        tokens: token ids, int64 [B, input tokens + patch_size].
        side: where the model has patches (`Stage.side`).
        positions: T.
        patch_size: K.
        masking: how documents are separated.
        spans: where the samples come from.
        scored_rows: number of rows that are scored; the rows after them are padding. None: all rows are scored.
    """
    inputs, labels = _patch_views(tokens, side, positions, patch_size)
    labels = labels.copy()
    position_ids = documents = None
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
            document_ids = np.ascontiguousarray(input_documents[:, :, -1])
            if masking.eod_mask_loss:
                labels[label_documents != document_ids[:, :, None]] = IGNORE_INDEX
            if masking.reset_attention_mask:
                documents = documents_from_ids(document_ids)
            if masking.reset_position_ids:
                position_ids = torch.from_numpy(_restarting_positions(document_ids))
    if scored_rows is not None:
        labels[scored_rows:] = IGNORE_INDEX
    padding = 0 if scored_rows is None else len(inputs) - scored_rows
    ids = torch.from_numpy(np.ascontiguousarray(inputs))
    return PatchBatch(ids, torch.from_numpy(labels), position_ids, documents, spans, padding=padding)


def _restarting_positions(document_ids: Array) -> Array:
    """Returns positions that count from 0 at the first patch of each document; [B, T] to [B, T]."""
    positions = np.broadcast_to(np.arange(document_ids.shape[1]), document_ids.shape)
    first = np.ones_like(document_ids, dtype=bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return positions - np.maximum.accumulate(np.where(first, positions, 0), axis=1)
