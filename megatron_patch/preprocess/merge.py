"""Many datasets joined to one, end to end, in constant memory.

In: prefixes in order. Out: one dataset, byte for byte what one run over all the input would have written (and what Megatron's builder
gives for the same shards). Tokens are copied as ranges of bytes; the index is streamed, section by section, from the shards' own. Nothing
appears under its name before it was read back and agrees with the shards' checksums.
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
from megatron_patch.data.storage import StoredArray, is_address
from megatron_patch.errors import DataError
from megatron_patch.preprocess.dedup_shuffle import rearrange
from megatron_patch.utils.files import checksum, copy_range, fsync_folder

_CHUNK = 1 << 20


@dataclass(frozen=True)
class MergeResult:
    """What was joined.

    Args:
        output: prefix of the result.
        shards: how many.
        sequences: of the result.
        documents: of the result.
        tokens: of the result.
        duplicates: documents left out.
        bytes: of the result's .bin and .idx.
        side_file: whether the result has one: where every shard has.
    """

    output: str
    shards: int
    sequences: int
    documents: int
    tokens: int
    duplicates: int
    bytes: int
    side_file: bool


@dataclass(frozen=True)
class _Shard:
    """What is kept of a shard between the passes: a few numbers, never a file or an array."""

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
    """Joins datasets end to end.

    Args:
        prefixes: the shards, in order.
        output: prefix of the result.
        overwrite: replace a result that exists.
        dedup: leave documents out whose tokens are those of an earlier one.
        shuffle_seed: put documents into a random order; None: they keep theirs.
        notice: told in words what the user should know.

    Raises:
        DataError: shards that are missing, damaged, or do not go together; an output that exists; no space left.
    """
    if not prefixes:
        raise DataError("nothing to merge", "at least one dataset prefix", "give --input")
    remote = next((prefix for prefix in (*prefixes, output) if is_address(prefix)), None)
    if remote is not None:
        raise DataError(f"{remote} is an address", "files of this machine", "copy the shards here, or train on them as they are")
    if os.path.realpath(output) in {os.path.realpath(prefix) for prefix in prefixes}:
        raise DataError(f"{output} is also one of the shards", "an output of its own", "choose another --output-prefix")
    taken = next((path for path in (bin_path(output), idx_path(output)) if path.exists()), None)
    if taken is not None and not overwrite:
        raise DataError(f"{taken} exists", "an --output-prefix that is free", "choose another, or use --overwrite")
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
                duplicates = rearrange(working, output, dedup, shuffle_seed, Path(f"{output}.scratch"))
                digest = checksum(bin_path(output))
            else:
                duplicates = 0
                _give_name(working, output)
    except OSError as error:
        raise DataError(
            f"cannot write {output}: {error.strerror or error}", "a writable folder with free space", "free space or change --output-prefix"
        ) from error
    if info is not None:
        write_metadata(output, _joined_info(info, output, digest))
    result = IndexedDataset(output)
    return MergeResult(
        output=output,
        shards=len(shards),
        sequences=int(result.num_sequences),
        documents=result.num_documents,
        tokens=result.num_tokens,
        duplicates=duplicates,
        bytes=bin_path(output).stat().st_size + idx_path(output).stat().st_size,
        side_file=info is not None,
    )


def _give_name(working: str, output: str) -> None:
    # An older index goes first, so that a crash in between leaves no pair of files that do not belong together.
    idx_path(output).unlink(missing_ok=True)
    metadata_path(output).unlink(missing_ok=True)
    os.replace(bin_path(working), bin_path(output))
    os.replace(idx_path(working), idx_path(output))
    fsync_folder(bin_path(output).parent)


def _survey(
    prefixes: Sequence[str], notice: Callable[[str], None]
) -> tuple[list[_Shard], np.dtype[np.generic], bool, DatasetMetadata | None]:
    """Opens each shard once: do they go together?"""
    shards: list[_Shard] = []
    first: IndexedDataset | None = None
    joined: DatasetMetadata | None = None
    modes: set[bool] = set()
    without = 0
    for prefix in prefixes:
        dataset = IndexedDataset(prefix)
        first = dataset if first is None else first
        if dataset.dtype != first.dtype:
            raise DataError(
                f"{first.prefix} has {first.dtype} tokens, {prefix} {dataset.dtype}",
                "shards of one dtype",
                "preprocess them with one tokenizer",
            )
        if dataset.num_sequences:
            modes.add(dataset.has_modes)
        if len(modes) > 1:
            raise DataError(f"{prefix}: shards with and without modes of sequences", "all of one kind", "merge each kind by itself")
        info = read_metadata(prefix)
        if info is None:
            without += 1
        else:
            joined = info if joined is None else _together(joined, info, first.prefix, prefix)
            if (info.tokens, info.documents, info.bin_bytes) != (dataset.num_tokens, dataset.num_documents, dataset.bin_bytes):
                raise DataError(
                    f"{prefix} has {dataset.num_tokens} tokens in {dataset.num_documents} documents; its side file says {info.tokens} "
                    f"in {info.documents}",
                    "files of one dataset",
                    "copy all three files again, or preprocess the shard again",
                )
            if checksum(idx_path(prefix)) != info.idx_xxh64:
                raise DataError(
                    f"{idx_path(prefix)} has another checksum than its side file says", "a sound shard", "copy it or preprocess it again"
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
        notice(f"{without} of {len(shards)} shards have no side file: the result gets none")
    assert first is not None
    return shards, first.dtype, modes == {True}, joined if not without else None


def _together(one: DatasetMetadata, other: DatasetMetadata, one_prefix: str, other_prefix: str) -> DatasetMetadata:
    check_compatible(one, other, one_prefix, other_prefix)
    # A document padded to both is padded to what divides both.
    return replace(one, patch_align=math.gcd(one.patch_align, other.patch_align))


def _copy_tokens(shards: Sequence[_Shard], path: Path) -> None:
    with path.open("wb") as target:
        for shard in shards:
            with bin_path(shard.prefix).open("rb") as source:
                try:
                    copy_range(source.fileno(), target.fileno(), 0, shard.bin_bytes)
                except EOFError as error:
                    raise _changed(bin_path(shard.prefix)) from error
        os.fsync(target.fileno())


def _verify_tokens(shards: Sequence[_Shard], path: Path) -> str:
    """Reads the result back: each span must have its shard's checksum. Returns the checksum of the whole."""
    whole = xxhash.xxh64()
    with path.open("rb") as file:
        for shard in shards:
            span = xxhash.xxh64()
            left = shard.bin_bytes
            while left:
                piece = file.read(min(left, 4 * _CHUNK))
                if not piece:
                    raise _changed(path)
                span.update(piece)
                whole.update(piece)
                left -= len(piece)
            if span.hexdigest() != (shard.bin_xxh64 or checksum(bin_path(shard.prefix))):
                raise DataError(
                    f"{bin_path(shard.prefix)} has another checksum than its side file says, or was copied wrongly",
                    "sound shards and a sound disk",
                    "check the shard with tools/inspect_dataset.py --check; copy it or preprocess it again",
                )
    return whole.hexdigest()


def _changed(path: Path) -> DataError:
    return DataError(f"{path} changed while it was read", "files that stay as they are", "run again when nothing writes to them")


def _chunks(array: StoredArray, first: int = 0) -> Iterator[npt.NDArray[Any]]:
    """An array of a dataset's index in pieces."""
    for start in range(first, len(array), _CHUNK):
        yield array[start : start + _CHUNK]


def _write_index(shards: Sequence[_Shard], dtype: np.dtype[np.generic], modes: bool, path: Path) -> None:
    """Four passes over the shards, one for each section of the index; one shard is open at a time."""
    sequences, documents = sum(shard.sequences for shard in shards), sum(shard.documents for shard in shards)
    with path.open("wb", buffering=_CHUNK) as index:
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
                    f"{idx_path(shard.prefix)}: its offsets do not follow from its lengths",
                    "a sound shard",
                    "check it with tools/inspect_dataset.py --check",
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
                    f"{idx_path(shard.prefix)}: a document ends before it begins",
                    "a sound shard",
                    "check it with tools/inspect_dataset.py --check",
                )
            last = int(boundaries[-1])
            index.write((base + boundaries.astype(np.int64)).astype("<i8").data)
        base += shard.sequences


def _verify_index(working: str, shards: Sequence[_Shard]) -> None:
    result = IndexedDataset(working)
    expected = (sum(shard.sequences for shard in shards), sum(shard.documents for shard in shards), sum(shard.tokens for shard in shards))
    if (int(result.num_sequences), result.num_documents, result.num_tokens) != expected:
        raise DataError(f"{working} does not add up", "a sound disk", "run again")


def _joined_info(info: DatasetMetadata, output: str, digest: str) -> DatasetMetadata:
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
