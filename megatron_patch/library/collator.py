"""Cuts rows of tokens into patches and labels, for data loaders of one's own. In: rows. Out: a dictionary of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_patch.data.collate import DocumentMasking, PatchBatch, make_batch
from megatron_patch.errors import DataError
from megatron_patch.stages import Side, Stage, position_weights


class PatchCollator:
    """Turns rows of tokens into a batch of patches; a `collate_fn` for a data loader that reads its own data.

    Each row has (T + 1)·K tokens: the first T·K are inputs, and the labels of a patch are the K tokens of the next one. So rows that
    follow each other in a text overlap by K tokens. `TokenStream` gives such batches by itself.

    Args:
        patch_size: K; 1 is ordinary next-token training. Change the collator where the stage changes.
        position_weights: weights of the K labels, which are scaled to sum to K: "uniform", "power", "exponential", "first", or the numbers.
        documents: how documents in a row are kept apart.
        side: "both", or where only the "input" or only the "output" has patches; then rows have T·K + K or T + K tokens.

    Raises:
        ConfigError: the patch size or the weights are not possible.

    Examples:
        >>> batch = PatchCollator(2)([[1, 2, 3, 4, 5, 6]])
        >>> batch["input_ids"].tolist(), batch["labels"].tolist(), batch["label_weights"].tolist()
        ([[[1, 2], [3, 4]]], [[[3, 4], [5, 6]]], [1.0, 1.0])
    """

    def __init__(
        self,
        patch_size: int,
        *,
        position_weights: str | tuple[float, ...] = "uniform",
        documents: DocumentMasking | None = None,
        side: Side = "both",
    ) -> None:
        checked = Stage("collator", patch_size, 1, 1, 1, 1, side=side)
        self.patch_size, self.side, self.documents = patch_size, side, documents or DocumentMasking()
        self._inputs = checked.input_patch_size
        self._weights = weights_of(position_weights, checked.labels_per_position)

    def __call__(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Returns the batch of some rows.

        Args:
            rows: B rows of whole numbers, all of one length: lists, arrays or tensors, or mappings that have them as "input_ids".

        Returns:
            input_ids int64 [B, T, K]; labels int64 [B, T, K], -100 where they are not scored; label_weights float32 [K]. With
            `reset_position_ids` also position_ids int64 [B, T], with `reset_attention_mask` also document_ids int64 [B, T].

        Raises:
            DataError: rows of different lengths, or of a length that is no multiple of K or below 2·K.
        """
        arrays = [np.asarray(row["input_ids"] if isinstance(row, Mapping) else row) for row in rows]
        lengths = sorted({array.size for array in arrays})
        least = self._inputs + self.patch_size
        if len(lengths) != 1 or (lengths[0] - self.patch_size) % self._inputs or lengths[0] < least:
            raise DataError(
                f"rows of {', '.join(map(str, lengths[:5])) or 'no'} tokens for patches of {self.patch_size}",
                f"rows of one length: {self._inputs} tokens for each of T positions, and {self.patch_size} more for the last labels",
                f"cut the text into rows of T·{self._inputs} + {self.patch_size} tokens",
            )
        tokens = np.stack(arrays).astype(np.int64)
        positions = (tokens.shape[1] - self.patch_size) // self._inputs
        return as_dictionary(make_batch(tokens, self.side, positions, self.patch_size, self.documents), self._weights, self.documents)


def weights_of(kind: str | tuple[float, ...], labels: int) -> torch.Tensor:
    """Returns label weights, scaled to sum to their number, as float32 [labels]."""
    return torch.tensor(position_weights(kind, labels), dtype=torch.float32)


def as_dictionary(batch: PatchBatch, label_weights: torch.Tensor, documents: DocumentMasking) -> dict[str, torch.Tensor]:
    """Returns a batch as a dictionary, which trainers can move to a device; what is not set is left out.

    Args:
        batch: the batch.
        label_weights: float32 [K].
        documents: the rules by which it was made.
    """
    found = {"input_ids": batch.input_ids, "labels": batch.labels, "label_weights": label_weights}
    if batch.position_ids is not None:
        found["position_ids"] = batch.position_ids
    if documents.reset_attention_mask and documents.eod_id is not None:
        found["document_ids"] = torch.from_numpy(_document_ids(batch))
    return found


def _document_ids(batch: PatchBatch) -> npt.NDArray[np.int64]:
    """Returns the number of each position's document, [B, T], from 0 in the micro-batch."""
    rows, positions = batch.input_ids.shape[:2]
    if batch.documents is None:
        return np.repeat(np.arange(rows, dtype=np.int64), positions).reshape(rows, positions)
    lengths = np.diff(batch.documents.host_bounds.numpy())
    return np.repeat(np.arange(len(lengths), dtype=np.int64), lengths).reshape(rows, positions)
