"""Compares two datasets. In: two datasets. Out: plain values: whether they are equal, where they first differ, and by how much."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_patch.data.dataset_metadata import read_metadata
from megatron_patch.data.indexed_dataset import IndexedDataset

_DOCUMENTS = 1 << 14
# Entries of the metadata file on how a dataset was made, which say nothing about its content.
_INCIDENTAL = {"tokenizer_model", "merge_file", "tokenizer_xxh64", "run_xxh64", "bin_xxh64", "idx_xxh64"}


def compare(one: IndexedDataset, other: IndexedDataset) -> dict[str, Any]:
    """Compares two datasets sequence by sequence.

    Returns:
        equal: whether tokens, sequences, documents, type and metadata are the same. differences: sentences. first_sequence: number of
        the first sequence that differs, or None. first_token: its first token that differs, or None. differing_sequences: how many of
        the sequences that both have differ.
    """
    differences = []
    for name in ("dtype", "num_documents", "num_sequences", "num_tokens"):
        left, right = getattr(one, name), getattr(other, name)
        if left != right:
            differences.append(f"{name.replace('num_', '')}: {left} and {right}")
    if one.num_documents == other.num_documents and one.num_sequences == other.num_sequences:
        for start in range(0, one.num_documents + 1, _DOCUMENTS):
            part = slice(start, start + _DOCUMENTS)
            if not np.array_equal(one.document_boundaries[part], other.document_boundaries[part]):
                differences.append(f"document boundaries differ from about number {start} on")
                break
    differing, first, token = _sequences(one, other)
    if differing:
        differences.append(
            f"{differing} of {min(len(one), len(other))} sequences differ; the first is number {first}, from its token {token} on"
        )
    differences += _metadata_differences(one, other)
    return {
        "equal": not differences,
        "differences": differences,
        "first_sequence": first,
        "first_token": token,
        "differing_sequences": differing,
    }


def _sequences(one: IndexedDataset, other: IndexedDataset) -> tuple[int, int | None, int | None]:
    """Returns how many sequences differ, the first of them, and its first token that differs."""
    differing, first, token = 0, None, None
    starts = [0, 0]
    both = min(len(one), len(other))
    for begin in range(0, both, _DOCUMENTS):
        end = min(begin + _DOCUMENTS, both)
        lengths = [np.array(dataset.sequence_lengths[begin:end], dtype=np.int64) for dataset in (one, other)]
        tokens = [dataset.tokens(start, int(length.sum())) for dataset, start, length in zip((one, other), starts, lengths, strict=True)]
        if not (np.array_equal(lengths[0], lengths[1]) and np.array_equal(tokens[0], tokens[1])):
            found = _differing(tokens, lengths)
            differing += len(found)
            if first is None and found:
                first = begin + found[0][0]
                token = found[0][1]
        starts = [start + int(length.sum()) for start, length in zip(starts, lengths, strict=True)]
    return differing, first, token


def _differing(tokens: list[npt.NDArray[np.generic]], lengths: list[npt.NDArray[np.int64]]) -> list[tuple[int, int]]:
    """Returns (number, first token that differs) of each sequence that differs."""
    rows = [np.split(flat, np.cumsum(length)[:-1]) for flat, length in zip(tokens, lengths, strict=True)]
    found = []
    for number, (left, right) in enumerate(zip(*rows, strict=True)):
        if not np.array_equal(left, right):
            shared = min(left.size, right.size)
            unequal = np.flatnonzero(left[:shared] != right[:shared])
            found.append((number, int(unequal[0]) if unequal.size else shared))
    return found


def _metadata_differences(one: IndexedDataset, other: IndexedDataset) -> list[str]:
    """Returns the differences of two metadata files; none where one of them does not exist."""
    found = [read_metadata(dataset.prefix) for dataset in (one, other)]
    if found[0] is None or found[1] is None:
        return []
    left, right = (asdict(metadata) for metadata in found if metadata is not None)
    counted = {"documents", "tokens", "dtype", "bin_bytes", "idx_bytes"}
    return [
        f"{name}: {left[name]} and {right[name]}"
        for name in left
        if name not in _INCIDENTAL and name not in counted and left[name] != right[name]
    ]
