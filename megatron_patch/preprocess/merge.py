"""Merges datasets, one after another, in constant memory.

In: dataset prefixes in order. Out: one dataset, byte for byte what a single run over all the input writes, and what Megatron's builder
writes for the same shards. Tokens are copied as byte ranges. The index is streamed, section by section, from the shards' indices. The
result gets its final name after it has been read back and agrees with the shards' checksums.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_patch.data.dataset_metadata import DatasetMetadata, check_compatible, metadata_path, read_metadata, write_metadata
from megatron_patch.data.indexed_dataset import IndexedDataset, bin_path, idx_path, pack_header
from megatron_patch.data.storage import FileArray, is_address
from megatron_patch.errors import DataError
from megatron_patch.preprocess.dedup_shuffle import dedup_and_shuffle
from megatron_patch.utils.files import checksum, copy_range, fsync_folder, open_new
from megatron_patch.utils.units import plural

_CHUNK = 1 << 20


@dataclass(frozen=True)
class MergeResult:
    """The result of a merge.

    Args:
        output: the dataset prefix of the result.
        shards: number of shards.
        sequences: number of sequences in the result.
        documents: number of documents in the result.
        tokens: number of tokens in the result.
        duplicates: number of documents left out because an earlier one is equal.
        bytes: size of the result's .bin and .idx.
        has_metadata: whether the result has a metadata file; it has one if every shard has one.
    """

    output: str
    shards: int
    sequences: int
    documents: int
    tokens: int
    duplicates: int
    bytes: int
    has_metadata: bool


@dataclass(frozen=True)
class _Shard:
    """The facts about a shard that are held in memory: a few numbers, never an open file or an array."""

    prefix: str
    sequences: int
    documents: int
    tokens: int
    bin_bytes: int
    bin_xxh64: str | None


def merge_datasets(
    prefixes: Sequence[str],
    output: str,
    overwrite: bool = False,
    dedup: bool = False,
    shuffle_seed: int | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> MergeResult:
    """Merges datasets, one after another.

    Args:
        prefixes: dataset prefixes of the shards, in order.
        output: the dataset prefix of the result.
        overwrite: replace an existing result.
        dedup: leave out documents whose tokens equal those of an earlier one.
        shuffle_seed: write documents in a random order; None: in the order of the shards.
        notice: receives messages for the user.

    Raises:
        DataError: shards are missing, damaged or incompatible; the output exists; or it cannot be written.
    """
    if not prefixes:
        raise DataError("there is nothing to merge", "at least 1 dataset prefix", "give --input")
    remote = next((prefix for prefix in (*prefixes, output) if is_address(prefix)), None)
    if remote is not None:
        raise DataError(f"{remote} is a remote address", "local files", "copy the shards to this machine, or train on the shards directly")
    if os.path.realpath(output) in {os.path.realpath(prefix) for prefix in prefixes}:
        raise DataError(f"{output} is also one of the shards", "an output that is not an input", "choose another --output-prefix")
    existing = next((path for path in (bin_path(output), idx_path(output)) if path.exists()), None)
    if existing is not None and not overwrite:
        raise DataError(f"{existing} already exists", "an unused --output-prefix", "choose another, or add --overwrite")
    shards, dtype, modes, info = _survey(prefixes, notice)
    working = f"{output}.partial"
    try:
        with contextlib.ExitStack() as stack:
            for path in (bin_path(working), idx_path(working)):
                stack.callback(path.unlink, missing_ok=True)
            bin_path(working).parent.mkdir(parents=True, exist_ok=True)
            _copy_tokens(shards, bin_path(working))
            digest = _verify_tokens(shards, bin_path(working))
            _write_index(shards, dtype, modes, idx_path(working))
            _verify_index(working, shards)
            if dedup or shuffle_seed is not None:
                duplicates = dedup_and_shuffle(working, output, dedup, shuffle_seed, Path(f"{output}.scratch"))
                digest = checksum(bin_path(output))
            else:
                duplicates = 0
                _rename_result(working, output)
    except OSError as error:
        raise DataError(
            f"cannot write {output}: {error.strerror or error}",
            "a writable folder with free space",
            "free disk space or change --output-prefix",
        ) from error
    if info is not None:
        write_metadata(output, _merged_metadata(info, output, digest))
    result = IndexedDataset(output)
    return MergeResult(
        output=output,
        shards=len(shards),
        sequences=int(result.num_sequences),
        documents=result.num_documents,
        tokens=result.num_tokens,
        duplicates=duplicates,
        bytes=bin_path(output).stat().st_size + idx_path(output).stat().st_size,
        has_metadata=info is not None,
    )


def _rename_result(working: str, output: str) -> None:
    # An old index is removed first, so that a crash in between never leaves an index next to the tokens of another dataset.
    idx_path(output).unlink(missing_ok=True)
    metadata_path(output).unlink(missing_ok=True)
    os.replace(bin_path(working), bin_path(output))
    os.replace(idx_path(working), idx_path(output))
    fsync_folder(bin_path(output).parent)


def _survey(
    prefixes: Sequence[str], notice: Callable[[str], None]
) -> tuple[list[_Shard], np.dtype[np.generic], bool, DatasetMetadata | None]:
    """Opens each shard once, and checks that it is valid and compatible with the others."""
    shards: list[_Shard] = []
    first: IndexedDataset | None = None
    merged: DatasetMetadata | None = None
    modes: set[bool] = set()
    without = 0
    for prefix in prefixes:
        dataset = IndexedDataset(prefix)
        first = dataset if first is None else first
        if dataset.dtype != first.dtype:
            raise DataError(
                f"{first.prefix} has {first.dtype} tokens, and {prefix} has {dataset.dtype} tokens",
                "shards of one dtype",
                "preprocess all shards with one tokenizer",
            )
        if dataset.num_sequences:
            modes.add(dataset.has_modes)
        if len(modes) > 1:
            raise DataError(
                f"{prefix} differs from the shards before it: only some have sequence modes",
                "shards of one kind",
                "merge each kind separately",
            )
        info = read_metadata(prefix)
        if info is None:
            without += 1
        else:
            merged = info if merged is None else _combined(merged, info, first.prefix, prefix)
            if (info.tokens, info.documents, info.bin_bytes) != (dataset.num_tokens, dataset.num_documents, dataset.bin_bytes):
                raise DataError(
                    f"{prefix} has {plural(dataset.num_tokens, 'token')} in {plural(dataset.num_documents, 'document')}, but its metadata "
                    f"file lists {plural(info.tokens, 'token')} in {plural(info.documents, 'document')}",
                    "a .bin, .idx and .json file of the same dataset",
                    "copy all three files again, or preprocess the shard again",
                )
            if checksum(idx_path(prefix)) != info.idx_xxh64:
                raise DataError(
                    f"the checksum of {idx_path(prefix)} differs from its metadata file",
                    "an undamaged shard",
                    "copy the shard again, or preprocess it again",
                )
        shards.append(
            _Shard(
                prefix,
                int(dataset.num_sequences),
                dataset.num_documents,
                dataset.num_tokens,
                dataset.bin_bytes,
                info.bin_xxh64 if info else None,
            )
        )
    if without:
        notice(f"{without} of {plural(len(shards), 'shard')} have no metadata file, so the result has none")
    assert first is not None
    return shards, first.dtype, modes == {True}, merged if not without else None


def _combined(one: DatasetMetadata, other: DatasetMetadata, one_prefix: str, other_prefix: str) -> DatasetMetadata:
    check_compatible(one, other, one_prefix, other_prefix)
    # A length that is a multiple of one of two numbers is a multiple of their greatest common divisor.
    return replace(one, patch_align=math.gcd(one.patch_align, other.patch_align))


def _copy_tokens(shards: Sequence[_Shard], path: Path) -> None:
    with open_new(path) as target:
        for shard in shards:
            with bin_path(shard.prefix).open("rb") as source:
                try:
                    copy_range(source.fileno(), target.fileno(), 0, shard.bin_bytes)
                except EOFError as error:
                    raise _changed(bin_path(shard.prefix)) from error
        os.fsync(target.fileno())


def _verify_tokens(shards: Sequence[_Shard], path: Path) -> str:
    """Reads the result back, compares the checksum of each shard's range, and returns the checksum of the file."""
    total = xxhash.xxh64()
    with path.open("rb") as file:
        for shard in shards:
            part = xxhash.xxh64()
            left = shard.bin_bytes
            while left:
                piece = file.read(min(left, 4 * _CHUNK))
                if not piece:
                    raise _changed(path)
                part.update(piece)
                total.update(piece)
                left -= len(piece)
            if part.hexdigest() != (shard.bin_xxh64 or checksum(bin_path(shard.prefix))):
                raise DataError(
                    f"the checksum of {bin_path(shard.prefix)} differs from its metadata file, or the copy is damaged",
                    "undamaged shards and a reliable disk",
                    "check the shard with tools/inspect_dataset.py --check; copy it or preprocess it again",
                )
    return total.hexdigest()


def _changed(path: Path) -> DataError:
    return DataError(f"{path} changed while it was read", "files that do not change", "run again when no process writes to them")


def _chunks(array: FileArray, first: int = 0) -> Iterator[npt.NDArray[Any]]:
    """Yields an array of a dataset's index in chunks."""
    for start in range(first, len(array), _CHUNK):
        yield array[start : start + _CHUNK]


def _write_index(shards: Sequence[_Shard], dtype: np.dtype[np.generic], modes: bool, path: Path) -> None:
    """Writes the index in four passes over the shards, one for each section. One shard is open at a time."""
    sequences, documents = sum(shard.sequences for shard in shards), sum(shard.documents for shard in shards)
    with open_new(path, "wb", _CHUNK) as index:
        index.write(pack_header(dtype, sequences, documents + 1))
        for shard in shards:
            dataset = _open(shard)
            for lengths in _chunks(dataset.sequence_lengths):
                index.write(lengths.data)
        _write_offsets(shards, dtype.itemsize, index)
        _write_boundaries(shards, index)
        if modes:
            for shard in shards:
                dataset = _open(shard)
                for part in _chunks(dataset.sequence_modes) if dataset.sequence_modes is not None else ():
                    index.write(part.data)
        index.flush()
        os.fsync(index.fileno())


def _open(shard: _Shard) -> IndexedDataset:
    dataset = IndexedDataset(shard.prefix)
    if (int(dataset.num_sequences), dataset.num_documents, dataset.bin_bytes) != (shard.sequences, shard.documents, shard.bin_bytes):
        raise _changed(idx_path(shard.prefix))
    return dataset


def _write_offsets(shards: Sequence[_Shard], itemsize: int, index: BinaryIO) -> None:
    base = 0
    for shard in shards:
        dataset, end = _open(shard), 0
        for lengths, pointers in zip(_chunks(dataset.sequence_lengths), _chunks(dataset.sequence_pointers), strict=True):
            ends = end + np.cumsum(lengths.astype(np.int64) * itemsize)
            offsets = np.concatenate(([end], ends[:-1]))
            if int(lengths.min()) < 0 or not np.array_equal(offsets, pointers):
                raise DataError(
                    f"the offsets in {idx_path(shard.prefix)} do not match its lengths",
                    "an undamaged shard",
                    "check the shard with tools/inspect_dataset.py --check",
                )
            index.write((base + offsets).astype("<i8").data)
            end = int(ends[-1])
        base += shard.bin_bytes


def _write_boundaries(shards: Sequence[_Shard], index: BinaryIO) -> None:
    index.write(np.zeros(1, "<i8").data)
    base = 0
    for shard in shards:
        dataset, last = _open(shard), 0
        for boundaries in _chunks(dataset.document_boundaries, first=1):
            if int(boundaries[0]) < last or (np.diff(boundaries.astype(np.int64)) < 0).any():
                raise DataError(
                    f"a document in {idx_path(shard.prefix)} ends before it begins",
                    "an undamaged shard",
                    "check the shard with tools/inspect_dataset.py --check",
                )
            last = int(boundaries[-1])
            index.write((base + boundaries.astype(np.int64)).astype("<i8").data)
        base += shard.sequences


def _verify_index(working: str, shards: Sequence[_Shard]) -> None:
    result = IndexedDataset(working)
    expected = (sum(shard.sequences for shard in shards), sum(shard.documents for shard in shards), sum(shard.tokens for shard in shards))
    if (int(result.num_sequences), result.num_documents, result.num_tokens) != expected:
        raise DataError(f"{working} does not contain what its shards contain", "a reliable disk", "run again")


def _merged_metadata(info: DatasetMetadata, output: str, digest: str) -> DatasetMetadata:
    result = IndexedDataset(output)
    return replace(
        info,
        documents=result.num_documents,
        tokens=result.num_tokens,
        bin_bytes=bin_path(output).stat().st_size,
        idx_bytes=idx_path(output).stat().st_size,
        bin_xxh64=digest,
        idx_xxh64=checksum(idx_path(output)),
        run_xxh64="",
    )
