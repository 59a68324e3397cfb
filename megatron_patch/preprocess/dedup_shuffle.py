"""Removes duplicate documents from a dataset, and shuffles its documents, in bounded memory.

In: a dataset whose documents have one sequence, or none. Out: another dataset. Both steps use files in a scratch folder:

- Duplicates are found by a 128-bit hash of a document's tokens. Hashes are distributed to files by value, so that equal ones are in the
  same file, and each file is sorted separately. The first of equal documents is kept.
- To shuffle, each document goes to a random bucket, and each bucket is permuted. The result is a uniform permutation of all documents,
  which depends on the seed and on the documents, not on the machine.

At 1e9 documents, a file of hashes takes about 64 MB of memory, and the scratch folder 24 bytes per document; to shuffle, a copy of the
data.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_patch.data.dataset_metadata import metadata_path
from megatron_patch.data.indexed_dataset import IndexedDataset, bin_path, idx_path
from megatron_patch.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_patch.errors import DataError
from megatron_patch.utils.files import RAISE_OPEN_FILES, allow_open_files, too_many_open_files
from megatron_patch.utils.units import plural

_DOCUMENTS = 1 << 16  # processed at a time
_MASK_DOCUMENTS = 1 << 24  # in one file of left-out documents
_PART_BYTES = 1 << 26
_MAX_PARTS = 512
_HASH = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<i8")])


def unordered_prefix(prefix: str) -> str:
    """Returns the prefix of a dataset before its duplicates are removed or its documents are shuffled."""
    return f"{prefix}.unordered"


def remove_dataset(prefix: str) -> None:
    """Removes a dataset. The index goes first, so that a crash in between leaves nothing that can be opened."""
    for path in (idx_path(prefix), bin_path(prefix), metadata_path(prefix)):
        path.unlink(missing_ok=True)


def contains_document(dataset: IndexedDataset, tokens: Sequence[int]) -> bool:
    """Returns whether one of a dataset's documents has exactly these tokens.

    Raises:
        DataError: a document has several sequences.
    """
    first = 0
    for lengths in document_lengths(dataset):
        for number in np.flatnonzero(lengths == len(tokens)).tolist():
            if not tokens or dataset[int(dataset.document_boundaries[first + number])].tolist() == list(tokens):
                return True
        first += lengths.size
    return False


def dedup_and_shuffle(source: str, output: str, dedup: bool, shuffle_seed: int | None, scratch: Path) -> int:
    """Writes a dataset without duplicates, in a random order, or both.

    Args:
        source: dataset prefix to read.
        output: dataset prefix to write.
        dedup: leave out documents whose tokens equal those of an earlier one.
        shuffle_seed: seed of the random order; None: the order of the source.
        scratch: folder for temporary files; it is removed.

    Returns:
        The number of documents left out.

    Raises:
        DataError: documents have several sequences, or a file cannot be written.
    """
    dataset = IndexedDataset(source)
    for _ in document_lengths(dataset):
        pass  # checks that each document has at most one sequence
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(mode=0o700, parents=True)
        allow_open_files(2 * _MAX_PARTS + 256)
        dropped = _find_duplicates(dataset, scratch) if dedup else _Dropped(None)
        with IndexedDatasetWriter(output, dataset.dtype) as writer:
            if shuffle_seed is None:
                for tokens, lengths, kept, _ in _kept_documents(dataset, dropped):
                    kept_tokens = np.repeat(kept, lengths)
                    writer.append(tokens if kept.all() else tokens[kept_tokens], lengths[kept])
            else:
                _shuffle(dataset, dropped, shuffle_seed, scratch, writer)
            metadata_path(output).unlink(missing_ok=True)
            writer.finish()
    except OSError as error:
        do = RAISE_OPEN_FILES if too_many_open_files(error) else "free disk space"
        raise DataError(f"cannot write {scratch}: {error.strerror or error}", "a writable folder with free space", do) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return dataset.num_documents - writer.num_documents


def document_lengths(dataset: IndexedDataset) -> Iterator[npt.NDArray[np.int64]]:
    """Yields the number of tokens of each document, for groups of documents; 0 for one without a sequence.

    Raises:
        DataError: a document has several sequences.
    """
    for start in range(0, dataset.num_documents, _DOCUMENTS):
        boundaries = np.array(dataset.document_boundaries[start : start + _DOCUMENTS + 1], dtype=np.int64)
        sequences = np.diff(boundaries)
        if int(sequences.max()) > 1 or int(sequences.min()) < 0:
            raise DataError(
                f"{dataset.prefix} has {plural(dataset.num_sequences, 'sequence')} in {plural(dataset.num_documents, 'document')}",
                "at most one sequence per document",
                "remove --dedup and --shuffle-documents",
            )
        lengths = np.zeros(sequences.size, np.int64)
        lengths[sequences == 1] = dataset.sequence_lengths[int(boundaries[0]) : int(boundaries[-1])]
        yield lengths


def _pieces(dataset: IndexedDataset) -> Iterator[tuple[int, npt.NDArray[np.generic], npt.NDArray[np.int64]]]:
    """Yields (index of the first, tokens, lengths) of groups of documents, limited in number and in bytes."""
    offset = 0
    limit = _PART_BYTES // dataset.dtype.itemsize
    start = 0
    for lengths in document_lengths(dataset):
        ends = np.cumsum(lengths)
        first = 0
        while first < lengths.size:
            before = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, before + limit, side="right")))
            count = int(ends[last - 1]) - before
            yield start + first, dataset.tokens(offset + before, count), lengths[first:last]
            first = last
        offset += int(ends[-1])
        start += lengths.size


class _Dropped:
    """The indices of documents that are left out, in one file per range of indices.

    Args:
        folder: folder of the files; None: no document is left out.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._range = -1
        self._mask: npt.NDArray[np.bool_] = np.zeros(0, bool)

    def add(self, numbers: npt.NDArray[np.int64]) -> None:
        """Marks documents as left out."""
        assert self._folder is not None
        ranges = numbers // _MASK_DOCUMENTS
        for which in np.unique(ranges).tolist():
            with (self._folder / f"dropped-{which}").open("ab") as file:
                file.write((numbers[ranges == which]).astype("<i8").data)

    def kept(self, first: int, count: int) -> npt.NDArray[np.bool_]:
        """Returns which of the documents `[first, first + count)` are kept. Ranges must be queried in ascending order."""
        if self._folder is None:
            return np.ones(count, bool)
        parts = []
        while count:
            if first // _MASK_DOCUMENTS != self._range:
                self._range = first // _MASK_DOCUMENTS
                self._mask = np.ones(_MASK_DOCUMENTS, bool)
                path = self._folder / f"dropped-{self._range}"
                if path.exists():
                    self._mask[np.fromfile(path, "<i8") - self._range * _MASK_DOCUMENTS] = False
            begin = first - self._range * _MASK_DOCUMENTS
            taken = self._mask[begin : begin + count]
            parts.append(taken)
            first, count = first + taken.size, count - taken.size
        return np.concatenate(parts)


def _kept_documents(
    dataset: IndexedDataset, dropped: _Dropped
) -> Iterator[tuple[npt.NDArray[np.generic], npt.NDArray[np.int64], npt.NDArray[np.bool_], int]]:
    for first, tokens, lengths in _pieces(dataset):
        yield tokens, lengths, dropped.kept(first, lengths.size), first


def _parts(total_bytes: int) -> int:
    return max(1, min(_MAX_PARTS, math.ceil(total_bytes / _PART_BYTES)))


def _open_all(stack: contextlib.ExitStack, folder: Path, name: str, count: int) -> list[BinaryIO]:
    return [stack.enter_context((folder / f"{name}-{number}").open("wb", buffering=1 << 16)) for number in range(count)]


def _find_duplicates(dataset: IndexedDataset, folder: Path) -> _Dropped:
    count = _parts(dataset.num_documents * _HASH.itemsize)
    with contextlib.ExitStack() as stack:
        files = _open_all(stack, folder, "hashes", count)
        for first, tokens, lengths in _pieces(dataset):
            _distribute(_hashes(tokens, lengths, first), files)
    dropped = _Dropped(folder)
    for number in range(count):
        path = folder / f"hashes-{number}"
        found = np.fromfile(path, _HASH)
        path.unlink()
        found = found[np.lexsort((found["number"], found["low"], found["high"]))]
        again = (found["high"][1:] == found["high"][:-1]) & (found["low"][1:] == found["low"][:-1])
        dropped.add(found["number"][1:][again])
    return dropped


def _hashes(tokens: npt.NDArray[np.generic], lengths: npt.NDArray[np.int64], first: int) -> npt.NDArray[np.void]:
    result = np.empty(lengths.size, _HASH)
    data = tokens.view(np.uint8).data
    ends = (np.cumsum(lengths) * tokens.itemsize).tolist()
    starts = [0, *ends[:-1]]
    digests = b"".join(xxhash.xxh3_128_digest(data[start:end]) for start, end in zip(starts, ends, strict=True))
    halves = np.frombuffer(digests, "<u8").reshape(-1, 2)
    result["high"], result["low"], result["number"] = halves[:, 0], halves[:, 1], np.arange(first, first + lengths.size)
    return result


def _distribute(hashes: npt.NDArray[np.void], files: Sequence[BinaryIO]) -> None:
    part = (hashes["high"] % np.uint64(len(files))).astype(np.int64)
    order = np.argsort(part, kind="stable")
    edges = np.searchsorted(part[order], np.arange(len(files) + 1))
    for number, file in enumerate(files):
        file.write(np.ascontiguousarray(hashes[order[edges[number] : edges[number + 1]]]).data)


def _shuffle(dataset: IndexedDataset, dropped: _Dropped, seed: int, folder: Path, writer: IndexedDatasetWriter) -> None:
    count = _parts(dataset.bin_bytes)
    with contextlib.ExitStack() as stack:
        files, sizes = _open_all(stack, folder, "bucket", count), _open_all(stack, folder, "sizes", count)
        drawn: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        for tokens, lengths, kept, first in _kept_documents(dataset, dropped):
            # Random numbers are drawn for fixed groups, so that the order does not depend on how memory limits split them.
            if first % _DOCUMENTS == 0:
                drawn = np.random.default_rng((seed, 0, first // _DOCUMENTS)).integers(0, count, _DOCUMENTS)
            begin = first % _DOCUMENTS
            _write_to_buckets(files, sizes, tokens, lengths, np.where(kept, drawn[begin : begin + lengths.size], -1))
    for number in range(count):
        _write_permuted(folder, number, np.random.default_rng((seed, 1, number)), dataset.dtype, writer)


def _write_to_buckets(
    files: Sequence[BinaryIO],
    sizes: Sequence[BinaryIO],
    tokens: npt.NDArray[np.generic],
    lengths: npt.NDArray[np.int64],
    buckets: npt.NDArray[np.int64],
) -> None:
    data = tokens.view(np.uint8).data
    ends = (np.cumsum(lengths) * tokens.itemsize).tolist()
    start = 0
    for end, bucket in zip(ends, buckets.tolist(), strict=True):
        if bucket >= 0:
            files[bucket].write(data[start:end])
        start = end
    for bucket in np.unique(buckets[buckets >= 0]).tolist():
        sizes[bucket].write(lengths[buckets == bucket].astype("<i4").data)


def _write_permuted(
    folder: Path, number: int, draw: np.random.Generator, dtype: np.dtype[np.generic], writer: IndexedDatasetWriter
) -> None:
    """Writes the documents of a bucket in a random order, a limited number of bytes at a time."""
    lengths = np.fromfile(folder / f"sizes-{number}", "<i4").astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    order = draw.permutation(lengths.size)
    path = folder / f"bucket-{number}"
    with path.open("rb") as file:
        pieces: list[bytes] = []
        held, begun = 0, 0
        for position, document in enumerate(order.tolist(), start=1):
            file.seek(int(starts[document]) * dtype.itemsize)
            pieces.append(file.read(int(lengths[document]) * dtype.itemsize))
            held += len(pieces[-1])
            if held >= _PART_BYTES // 4 or position == lengths.size:
                writer.append(np.frombuffer(b"".join(pieces), dtype), lengths[order[begun:position]])
                pieces, held, begun = [], 0, position
    path.unlink()
