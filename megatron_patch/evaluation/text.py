"""Perplexity on raw text per token, per byte and per word, at any K.

In: documents, a tokenizer, a model. Out: `TextScore`. Every token of a document is scored once: K end-of-document tokens are put before the
document, it is split into patches, and its positions are read in windows. The first `overlap` positions of a window are context that an
earlier window has scored. Bytes and words are counted in the given text, independent of the tokenizer, so scores of models with different
tokenizers are comparable. Words are separated by whitespace; WikiText-103 (Merity et al., arXiv 1609.07843) also counts the end of each
line as a word, and published perplexities use that number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megatron_patch.errors import DataError
from megatron_patch.model.inference_model import InferenceModel
from megatron_patch.ops import IGNORE_INDEX
from megatron_patch.parallel.groups import SINGLE_REPLICA, Replicas
from megatron_patch.raw_text.inputs import FileRange, expand
from megatron_patch.raw_text.large_documents import load_text
from megatron_patch.raw_text.parse_documents import iterate_documents
from megatron_patch.raw_text.readers import read_batches
from megatron_patch.tokenizers.base import Tokenizer, encode
from megatron_patch.utils.units import plural

Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TextScore:
    """Sums over documents.

    Args:
        loss_sum: loss of all scored tokens, in nats.
        tokens: number of scored tokens.
        bytes: bytes of the text in UTF-8.
        words: number of words, separated by whitespace.
        documents: number of documents.
        lines: number of line ends.
    """

    loss_sum: float = 0.0
    tokens: int = 0
    bytes: int = 0
    words: int = 0
    documents: int = 0
    lines: int = 0

    def loss(self) -> float:
        """Returns the mean loss in nats per token."""
        return self.loss_sum / max(1, self.tokens)

    def perplexity(self, units: int) -> float:
        """Returns the perplexity per unit, e^(loss_sum / units); infinite above the range of a float."""
        return math.exp(self.loss_sum / max(1, units)) if self.loss_sum / max(1, units) < 700 else math.inf

    def bits_per_byte(self) -> float:
        """Returns the loss in bits per byte of the text."""
        return self.loss_sum / math.log(2) / max(1, self.bytes)


def read_documents(inputs: Sequence[str], key: str = "text") -> Iterator[str]:
    """Yields the documents of text files, which may be compressed.

    A .txt file is one document; in .jsonl and .parquet files each line or row is one.

    Args:
        inputs: paths and globs.
        key: key of the text in a JSON object, with dots for nested keys, or the column of a table.

    Raises:
        DataError: a file is missing or damaged, a text is not UTF-8, or a line is not a JSON object with the key.
    """
    for batch in read_batches([FileRange(file) for file in expand(inputs)], (key,)):
        for document in iterate_documents(batch, (key,), []):
            if document.texts is None:
                line = f"{batch.source}, line {document.number}" + (f" after byte {batch.start}" if batch.start else "")
                raise DataError(
                    f"{line}: {document.reason}",
                    f"UTF-8 text, or JSON objects with a text under {key!r}",
                    "repair the file, or name another key with --json-key",
                )
            yield load_text(document.texts[0])


def document_windows(
    ids: Sequence[int], prefix: int | None, positions: int, patch_size: int, overlap: int
) -> Iterator[tuple[Array, Array]]:
    """Yields the windows of one document.

    Args:
        ids: token ids of the document.
        prefix: token id that is put before the document K times; with None, the first K tokens are not scored.
        positions: longest window, in positions.
        patch_size: K.
        overlap: positions that a window shares with the previous one, where they have been scored.

    Yields:
        (input ids, labels), int64 [T, K] with T up to `positions`; each scored token is a label in exactly one window.
    """
    stream = ([] if prefix is None else [prefix] * patch_size) + list(ids)
    patches = -(-len(stream) // patch_size)
    padded = np.full(patches * patch_size, IGNORE_INDEX, dtype=np.int64)
    padded[: len(stream)] = stream
    table = padded.reshape(patches, patch_size)
    start = 0
    while start < patches - 1:
        end = min(start + positions, patches - 1)
        labels = table[start + 1 : end + 1].copy()
        if start:
            labels[:overlap] = IGNORE_INDEX
        yield table[start:end], labels
        start = end - overlap if end < patches - 1 else end


def _batches(windows: Iterable[tuple[Array, Array]], size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields batches of windows; shorter windows are padded at their end, where no label is scored."""
    rows: list[tuple[Array, Array]] = []
    for window in windows:
        rows.append(window)
        if len(rows) == size:
            yield _stack(rows)
            rows = []
    if rows:
        yield _stack(rows)


def _stack(rows: list[tuple[Array, Array]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest, patch_size = max(len(inputs) for inputs, _ in rows), rows[0][0].shape[1]
    ids = np.zeros((len(rows), longest, patch_size), dtype=np.int64)
    labels = np.full((len(rows), longest, patch_size), IGNORE_INDEX, dtype=np.int64)
    for row, (inputs, targets) in enumerate(rows):
        ids[row, : len(inputs)], labels[row, : len(targets)] = inputs, targets
    return torch.from_numpy(ids), torch.from_numpy(labels)


@torch.no_grad()
def score_text(
    model: InferenceModel,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    positions: int,
    patch_size: int = 1,
    overlap: int = 0,
    batch: int = 8,
    replicas: Replicas = SINGLE_REPLICA,
    rewrite: Callable[[str], str] = lambda text: text,
    progress: Callable[[int, int], None] | None = None,
) -> TextScore:
    """Returns the score of a model on documents.

    Args:
        model: the model, in evaluation mode.
        tokenizer: tokenizer of the model; its end-of-document token is put before each document.
        documents: the texts.
        positions: longest window, in positions.
        patch_size: K.
        overlap: positions that windows share, as in `document_windows`.
        batch: windows per forward pass.
        replicas: replicas of the model that divide the batches; every rank reads all documents.
        rewrite: maps a document to the text that the model reads; bytes and words are counted before it.
        progress: called after each batch with its tokens, and with the bytes of text that have been read since the last call.

    Raises:
        DataError: the documents contain no token that can be scored.
    """
    counts = {"bytes": 0, "words": 0, "documents": 0, "lines": 0}

    def scored_windows() -> Iterator[tuple[Array, Array]]:
        for text in documents:
            counts["bytes"] += len(text.encode("utf-8"))
            counts["words"] += len(text.split())
            counts["documents"] += 1
            counts["lines"] += text.count("\n")
            yield from document_windows(encode(tokenizer, rewrite(text)), tokenizer.eod_id, positions, patch_size, overlap)

    device = model.device
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    reported = 0
    for number, (ids, labels) in enumerate(_batches(scored_windows(), batch)):
        if replicas.owns(number):
            totals += torch.stack([part.double() for part in model(ids.to(device), labels.to(device))])
        if progress is not None:
            progress(int((labels != IGNORE_INDEX).sum()), counts["bytes"] - reported)
            reported = counts["bytes"]
    loss_sum, tokens = replicas.sum(totals).tolist()
    if not tokens:
        raise DataError(
            f"{plural(counts['documents'], 'document')} without a token that can be scored", "text of more than one token", "check --text"
        )
    return TextScore(loss_sum, int(tokens), **counts)
