"""Perplexity on raw text: per token, per byte, per word, at any K.

In: documents, a tokenizer, a model. Out: `TextScore`. Every token of a document is scored once: the document is cut into patches behind K
end-of-document tokens, and its positions are read in windows, of which the first `overlap` positions are context that an earlier window
has scored. Bytes and words are those of the text as it was given, whatever the tokenizer makes of it, so that scores of models with
different tokenizers can be compared. A word is what whitespace parts; WikiText-103's vocabulary (Merity et al., arXiv 1609.07843) has the
end of each line as one more, and perplexities that are published on it are by that number.
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
from megatron_patch.raw_text.parse_documents import documents
from megatron_patch.raw_text.readers import batches
from megatron_patch.tokenizers.base import Tokenizer, encode

Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TextScore:
    """Sums over documents.

    Args:
        loss_sum: nats over all scored tokens.
        tokens: scored tokens.
        bytes: of the text in UTF-8.
        words: parts of the text between whitespace.
        documents: how many.
        lines: ends of lines.
    """

    loss_sum: float = 0.0
    tokens: int = 0
    bytes: int = 0
    words: int = 0
    documents: int = 0
    lines: int = 0

    def loss(self) -> float:
        """Nats a token."""
        return self.loss_sum / max(1, self.tokens)

    def perplexity(self, units: int) -> float:
        """Per unit: e^(nats of the whole text / units); infinite where no float can say it."""
        return math.exp(self.loss_sum / max(1, units)) if self.loss_sum / max(1, units) < 700 else math.inf

    def bits_per_byte(self) -> float:
        """Bits that the model needs for a byte of the text."""
        return self.loss_sum / math.log(2) / max(1, self.bytes)


def read_documents(inputs: Sequence[str], key: str = "text") -> Iterator[str]:
    """Documents of text files: each .txt one, each line of a .jsonl and row of a .parquet one; compressed files too.

    Args:
        inputs: paths and globs.
        key: of the text in a JSON object, with dots for nested ones; column of a table.

    Raises:
        DataError: a file that is missing or broken, text that is no UTF-8, a line that is no JSON object with the key.
    """
    for batch in batches([FileRange(file) for file in expand(inputs)], (key,)):
        for document in documents(batch, (key,), []):
            if document.texts is None:
                where = f"{batch.source}, line {document.number}" + (f" behind byte {batch.start}" if batch.start else "")
                raise DataError(
                    f"{where}: {document.reason}", f"UTF-8 text, or JSON objects with a text under {key!r}", "repair it, or give --json-key"
                )
            yield load_text(document.texts[0])


def document_windows(
    ids: Sequence[int], prefix: int | None, positions: int, patch_size: int, overlap: int
) -> Iterator[tuple[Array, Array]]:
    """Inputs and labels of one document.

    Args:
        ids: of the document.
        prefix: read before the document, K times; None: nothing, and the first K tokens are not scored.
        positions: longest window.
        patch_size: K.
        overlap: positions at the start of every window but the first that are not scored again.

    Yields:
        (input ids, labels), int64 [T, K], T up to `positions`; each scored token is a label in one window.
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
    """Windows side by side, shorter ones filled up behind their end, where no label is scored."""
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
) -> TextScore:
    """Scores documents.

    Args:
        model: in evaluation mode.
        tokenizer: of the model; its end-of-document token stands before each document.
        documents: texts.
        positions: longest window.
        patch_size: K.
        overlap: see `document_windows`.
        batch: windows of one forward pass.
        copies: ranks that share out the batches; all read all documents.
        rewrite: from a document as it is given, whose bytes and words count, to what the model reads.

    Raises:
        DataError: no text, or nothing of it that can be scored.
    """
    count = {"bytes": 0, "words": 0, "documents": 0, "lines": 0}

    def windows() -> Iterator[tuple[Array, Array]]:
        for text in documents:
            count["bytes"] += len(text.encode("utf-8"))
            count["words"] += len(text.split())
            count["documents"] += 1
            count["lines"] += text.count("\n")
            yield from document_windows(encode(tokenizer, rewrite(text)), tokenizer.eod_id, positions, patch_size, overlap)

    device = model.device
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for number, (ids, labels) in enumerate(_batches(windows(), batch)):
        if replicas.mine(number):
            totals += torch.stack([part.double() for part in model(ids.to(device), labels.to(device))])
    loss_sum, tokens = replicas.sum(totals).tolist()
    if not tokens:
        raise DataError(f"{count['documents']} documents without a token that can be scored", "text of more than one token")
    return TextScore(loss_sum, int(tokens), **count)
