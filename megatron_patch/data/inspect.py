"""Reports what is in a dataset: counts, lengths, whether the files match, and how patches and documents overlap.

In: a dataset. Out: plain values for a table and a JSON line. The full check reads all of the index and all tokens, in pieces.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_patch.data.dataset_metadata import DatasetMetadata, read_metadata
from megatron_patch.data.indexed_dataset import IndexedDataset
from megatron_patch.data.storage import file_checksum
from megatron_patch.errors import DataError

_CHUNK = 1 << 22
_SAMPLED_PIECES = 64
_MOST_TOKENS = 1 << 26
"""Number of tokens, from the start of a dataset, whose patches are counted."""


def describe(dataset: IndexedDataset) -> dict[str, Any]:
    """Returns the counts of a dataset and the quantiles (5 %, 50 %, 95 %, 100 %) of its sequence lengths."""
    sample = np.concatenate([dataset.sequence_lengths[start : start + size] for start, size in _sampled(len(dataset))])
    quantiles = np.quantile(sample, [0.05, 0.5, 0.95, 1.0]).round().astype(int).tolist() if sample.size else []
    return {
        "prefix": dataset.prefix,
        "documents": dataset.num_documents,
        "sequences": int(dataset.num_sequences),
        "tokens": dataset.num_tokens,
        "dtype": dataset.written_type,
        "bytes": dataset.bin_bytes,
        "tokens_per_sequence": quantiles,
    }


def _sampled(count: int) -> list[tuple[int, int]]:
    """Returns (first element, number of elements) of pieces spread over an array; one piece for a short array."""
    if count <= _CHUNK:
        return [(0, count)]
    size = _CHUNK // _SAMPLED_PIECES
    return [((count - size) * piece // (_SAMPLED_PIECES - 1), size) for piece in range(_SAMPLED_PIECES)]


def integrity_problems(dataset: IndexedDataset, vocab_size: int | None = None) -> list[str]:
    """Returns a sentence for each problem of a dataset: wrong offsets, lengths, boundaries, token ids or checksums.

    Args:
        dataset: the dataset; its sizes were checked when it was opened.
        vocab_size: all ids must be below this; None for the size in the metadata file, without which ids are not checked.
    """
    problems = []
    item = dataset.dtype.itemsize
    end = 0
    for start in range(0, dataset.num_sequences, _CHUNK):
        lengths = np.asarray(dataset.sequence_lengths[start : start + _CHUNK]).astype(np.int64)
        pointers = np.asarray(dataset.sequence_pointers[start : start + _CHUNK])
        if (lengths < 0).any():
            problems.append(f"sequence {start + int(np.argmax(lengths < 0))} has a negative length")
        expected = end + np.concatenate(([0], np.cumsum(lengths)[:-1])) * item
        if not np.array_equal(pointers, expected):
            wrong = int(np.argmax(pointers != expected))
            problems.append(f"sequence {start + wrong} begins at byte {int(pointers[wrong])}, not {int(expected[wrong])}")
        end = int(pointers[-1]) + int(lengths[-1]) * item
    boundaries = dataset.document_boundaries
    for start in range(0, len(boundaries), _CHUNK):
        part = np.asarray(boundaries[start : start + _CHUNK + 1])
        if (np.diff(part) < 0).any():
            problems.append(f"document {start + int(np.argmax(np.diff(part) < 0))} ends before it begins")
    metadata = _metadata(dataset.prefix, problems)
    limit = vocab_size or (metadata.vocab_size if metadata else None)
    if limit is not None:
        for start in range(0, dataset.num_tokens, _CHUNK):
            tokens = dataset.tokens(start, min(_CHUNK, dataset.num_tokens - start)).astype(np.int64)
            if int(tokens.max()) >= limit or int(tokens.min()) < 0:
                wrong = int(np.argmax((tokens >= limit) | (tokens < 0)))
                problems.append(f"token {start + wrong} is {int(tokens[wrong])}, outside 0 to {limit - 1}")
                break
    if metadata is not None:
        if (metadata.tokens, metadata.documents) != (dataset.num_tokens, dataset.num_documents):
            problems.append(f"the metadata file has {metadata.tokens} tokens in {metadata.documents} documents")
        for path, digest in ((f"{dataset.prefix}.bin", metadata.bin_xxh64), (f"{dataset.prefix}.idx", metadata.idx_xxh64)):
            if file_checksum(path) != digest:
                problems.append(f"{path} does not have the checksum in the metadata file")
    return problems


def _metadata(prefix: str, problems: list[str]) -> DatasetMetadata | None:
    """Returns the metadata file of a dataset; a damaged one is added to the problems."""
    try:
        return read_metadata(prefix)
    except DataError as error:
        problems.append(error.what)
        return None


def patch_statistics(dataset: IndexedDataset, patch_size: int, eod_id: int | None) -> Mapping[str, Any]:
    """Returns how patches and documents overlap, in up to 64 million tokens from the start of a dataset.

    Args:
        dataset: the dataset, whose tokens are divided into patches from the first one on.
        patch_size: K.
        eod_id: id of the token that pads documents; None if it is not known, so that padding is not counted.

    Returns:
        patch_size; patches; spanning_documents: patches inside which a document begins; repeating_a_token: patches with the same token
        twice; padding_tokens: end-of-document tokens that follow another one, or None.
    """
    count = min(dataset.num_tokens, _MOST_TOKENS) // patch_size * patch_size
    repeating = padding = 0
    step = max(1, _CHUNK // patch_size) * patch_size
    ended = False  # whether the previous token was an end of document
    for start in range(0, count, step):
        tokens = dataset.tokens(start, min(step, count - start)).astype(np.int64)
        ordered = np.sort(tokens.reshape(-1, patch_size), axis=1)
        repeating += int((ordered[:, 1:] == ordered[:, :-1]).any(axis=1).sum())
        ends = tokens == (-1 if eod_id is None else eod_id)
        padding += int((ends[1:] & ends[:-1]).sum()) + int(ended and ends[0])
        ended = bool(ends[-1])
    return {
        "patch_size": patch_size,
        "patches": count // patch_size,
        "spanning_documents": _spanning(dataset, patch_size, count),
        "repeating_a_token": repeating,
        "padding_tokens": padding if eod_id is not None else None,
    }


def _spanning(dataset: IndexedDataset, patch_size: int, count: int) -> int:
    """Returns the number of patches in the first `count` tokens inside which a document begins."""
    found, last = 0, -1
    for begin in range(0, dataset.num_documents, _CHUNK):
        sequences = dataset.document_boundaries[begin : min(begin + _CHUNK, dataset.num_documents)]
        sequences = sequences[sequences < dataset.num_sequences]
        if not sequences.size:
            break
        first = int(sequences[0])
        starts = dataset.sequence_pointers[first : int(sequences[-1]) + 1][sequences - first] // dataset.dtype.itemsize
        inside = starts[(starts < count) & (starts % patch_size > 0)] // patch_size
        patches = np.unique(inside[inside > last])
        if patches.size:
            found, last = found + patches.size, int(patches[-1])
        if int(starts[-1]) >= count:
            break
    return found
