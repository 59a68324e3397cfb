"""What is in a dataset: counts, lengths, whether the files agree, and what patches look like.

In: a prefix. Out: plain values for a table and a JSON line. The full check reads the whole index and all tokens, in pieces.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_patch.data.dataset_metadata import DatasetMetadata, read_metadata
from megatron_patch.data.indexed_dataset import IndexedDataset
from megatron_patch.data.storage import stored_checksum
from megatron_patch.errors import DataError

_CHUNK = 1 << 22
_SAMPLED_PIECES = 64
_MOST_TOKENS = 1 << 26  # of which patches are counted


def describe(dataset: IndexedDataset) -> dict[str, Any]:
    """Counts and quantiles of document lengths."""
    sample = np.concatenate([dataset.sequence_lengths[start : start + size] for start, size in _sampled(len(dataset))])
    quantiles = np.quantile(sample, [0.05, 0.5, 0.95, 1.0]).round().astype(int).tolist() if sample.size else []
    return {
        "prefix": dataset.prefix,
        "documents": dataset.num_documents,
        "sequences": int(dataset.num_sequences),
        "tokens": dataset.num_tokens,
        "dtype": str(dataset.dtype),
        "bytes": dataset.bin_bytes,
        "tokens_per_sequence": quantiles,
    }


def _sampled(count: int) -> list[tuple[int, int]]:
    """(first, number) of pieces spread over an array: all of it where it is short."""
    if count <= _CHUNK:
        return [(0, count)]
    size = _CHUNK // _SAMPLED_PIECES
    return [((count - size) * piece // (_SAMPLED_PIECES - 1), size) for piece in range(_SAMPLED_PIECES)]


def integrity_problems(dataset: IndexedDataset, vocab_size: int | None = None) -> list[str]:
    """Everything that is wrong with a dataset: offsets, lengths, boundaries, ids, checksums.

    Args:
        dataset: opened, so its sizes already agree.
        vocab_size: ids must be below it; None: what the side file says, else unchecked.
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
    info = _info(dataset.prefix, problems)
    limit = vocab_size or (info.vocab_size if info else None)
    if limit is not None:
        for start in range(0, dataset.num_tokens, _CHUNK):
            tokens = dataset.tokens(start, min(_CHUNK, dataset.num_tokens - start)).astype(np.int64)
            if int(tokens.max()) >= limit or int(tokens.min()) < 0:
                wrong = int(np.argmax((tokens >= limit) | (tokens < 0)))
                problems.append(f"token {start + wrong} is {int(tokens[wrong])}, outside 0 to {limit - 1}")
                break
    if info is not None:
        if (info.tokens, info.documents) != (dataset.num_tokens, dataset.num_documents):
            problems.append(f"the side file says {info.tokens} tokens in {info.documents} documents")
        for path, digest in ((f"{dataset.prefix}.bin", info.bin_xxh64), (f"{dataset.prefix}.idx", info.idx_xxh64)):
            if stored_checksum(path) != digest:
                problems.append(f"{path} has another checksum than the side file says")
    return problems


def _info(prefix: str, problems: list[str]) -> DatasetMetadata | None:
    try:
        return read_metadata(prefix)
    except DataError as error:
        problems.append(error.what)
        return None


def patch_statistics(dataset: IndexedDataset, patch_size: int, eod_id: int | None) -> Mapping[str, Any]:
    """How patches of K tokens meet documents, over up to 64 million tokens from the start.

    Args:
        dataset: whose tokens are cut into patches from the first on.
        patch_size: K.
        eod_id: what documents are padded with; None: it is not known, and padding is not counted.

    Returns:
        patches; how many hold tokens of two documents, as the index divides them; how many repeat a token; tokens of padding (an end of
        document right after another), or None.
    """
    count = min(dataset.num_tokens, _MOST_TOKENS) // patch_size * patch_size
    repeating = padding = 0
    step = max(1, _CHUNK // patch_size) * patch_size
    ended = False  # the token before was an end of document
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
    """Patches among the first `count` tokens inside which a document begins."""
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
