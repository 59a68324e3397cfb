"""Megatron's indexed dataset: PREFIX.bin has the token ids of all documents one after another, PREFIX.idx where each document begins.

In: a prefix. Out: any range of tokens and of the index. All numbers are little endian. indexed_dataset_writer.py writes such files.
The index is a header of 34 bytes (magic, version 1, dtype code, number of sequences S, number of document boundaries D), S lengths in
tokens (int32), S byte offsets (int64), D boundaries counted in sequences (int64), and for multimodal data S modes (int8).
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_patch.data.missing_dataset import no_dataset
from megatron_patch.data.storage import FileArray, exists, open_file
from megatron_patch.data.token_types import TYPES, token_dtype, written_type
from megatron_patch.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {np.dtype(dtype): code for code, dtype in TYPES.items()}
_SPAN_BYTES = 4096


def optimal_dtype(vocab_size: int) -> np.dtype[np.generic]:
    """Returns the type of token ids for a vocabulary, as Megatron chooses it: uint16 below 65,500 ids, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def pack_header(dtype: np.dtype[np.generic], sequences: int, boundaries: int) -> bytes:
    """Returns the header of an index with these numbers of sequences and document boundaries."""
    return _HEADER.pack(MAGIC, 1, DTYPE_CODES[np.dtype(dtype)], sequences, boundaries)


def bin_path(prefix: str) -> Path:
    """Returns the path of a dataset's tokens, PREFIX.bin."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str) -> Path:
    """Returns the path of a dataset's index, PREFIX.idx."""
    return Path(f"{prefix}.idx")


class IndexedDataset:
    """A dataset on this machine or at an address. Only the requested parts are read.

    Args:
        prefix: its path or address without .bin and .idx.

    Raises:
        DataError: a file is missing, cannot be read, is not an indexed dataset, or does not have the size that its header gives.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        tokens, index = f"{prefix}.bin", f"{prefix}.idx"
        for path in (tokens, index):
            if not exists(path):
                if path == tokens and not exists(index):
                    raise no_dataset(prefix)
                raise DataError(f"{path} does not exist", "a dataset prefix: PREFIX.bin and PREFIX.idx", "check the prefix")
        self._index = open_file(index)
        header = bytearray(min(_HEADER.size, self._index.size))
        self._index.read_into(0, memoryview(header))
        if len(header) < _HEADER.size or header[:9] != MAGIC:
            raise DataError(
                f"{index} is not an index: it begins with {bytes(header[:9])!r}",
                f"a file that begins with {MAGIC!r}",
                "check the path, or preprocess the data again",
            )
        _, version, code, self.num_sequences, boundaries = _HEADER.unpack(header)
        if version != 1:
            raise DataError(f"{index} has version {version}", "version 1", "preprocess the data again")
        expected = _HEADER.size + 12 * self.num_sequences + 8 * boundaries
        if self._index.size not in (expected, expected + self.num_sequences):
            raise DataError(
                f"{index} has {self._index.size} bytes, but its header requires {expected}",
                "a complete index",
                "copy the file again, or preprocess the data again",
            )
        self.has_modes = self._index.size > expected
        if boundaries < 1:
            raise DataError(f"{index} has no document boundaries", "at least one boundary", "preprocess the data again")
        self.num_documents = boundaries - 1
        self._bin = open_file(tokens)
        self.bin_bytes = self._bin.size
        self.sequence_lengths = FileArray(self._index, np.int32, _HEADER.size, self.num_sequences)
        self.sequence_pointers = FileArray(self._index, np.int64, _HEADER.size + 4 * self.num_sequences, self.num_sequences)
        self.dtype = token_dtype(code, self.sequence_lengths, self.sequence_pointers, self._bin, index)
        self.written_type = written_type(code, self.dtype)
        if self.bin_bytes % self.dtype.itemsize:
            raise DataError(
                f"{tokens} has {self.bin_bytes} bytes, which is not a multiple of {self.dtype.itemsize} ({self.dtype})",
                "a complete file",
                "copy the file again, or preprocess the data again",
            )
        self.num_tokens = self.bin_bytes // self.dtype.itemsize
        self.document_boundaries = FileArray(self._index, np.int64, _HEADER.size + 12 * self.num_sequences, boundaries)
        self.sequence_modes = FileArray(self._index, np.int8, expected, self.num_sequences) if self.has_modes else None
        self._tokens = FileArray(self._bin, self.dtype, 0, self.num_tokens)
        self._check_ends()

    def _check_ends(self) -> None:
        """Checks in constant time that the last sequence and the last document end at the end of the data."""
        end = 0
        if self.num_sequences:
            end = int(self.sequence_pointers[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize
        if end != self.bin_bytes:
            raise DataError(
                f"{self._bin.path} has {self.bin_bytes} bytes, but its index ends at byte {end}",
                "two complete files of the same dataset",
                "copy both files again, or preprocess the data again",
            )
        first, last = int(self.document_boundaries[0]), int(self.document_boundaries[-1])
        if first != 0 or last != self.num_sequences:
            raise DataError(
                f"{self._index.path}: documents begin at sequence {first} and end at {last} of {self.num_sequences}",
                "boundaries from 0 to the number of sequences",
                "preprocess the data again",
            )

    def __len__(self) -> int:
        return int(self.num_sequences)

    def __getitem__(self, index: int) -> npt.NDArray[np.generic]:
        """Returns the tokens of one sequence."""
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}")
        start = int(self.sequence_pointers[index]) // self.dtype.itemsize
        return self.tokens(start, int(self.sequence_lengths[index]))

    def tokens(self, start: int, count: int) -> npt.NDArray[np.generic]:
        """Returns the tokens `[start, start + count)`, counted over all documents.

        Raises:
            DataError: the range is outside the file, or the file can no longer be read.
        """
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise DataError(f"tokens {start} to {start + count} of {self.prefix}", f"0 to {self.num_tokens}", "read another range")
        return self._tokens.read(start, count)

    def fetch(self, starts: npt.NDArray[np.int64], count: int) -> None:
        """Loads the tokens `[start, start + count)` of each start into the cache, if the dataset is remote."""
        item = self.dtype.itemsize
        self._bin.fetch([(int(start) * item, count * item) for start in starts])

    def is_current(self) -> bool:
        """Returns whether both paths still refer to the opened files, see `RandomAccessFile.is_current`."""
        return self._bin.is_current() and self._index.is_current()

    def fingerprint(self, spans: int = 64) -> dict[str, object]:
        """Returns, in constant time, a fingerprint of the data: sizes, dtype, and a checksum of sampled spans of both files.

        Args:
            spans: number of spans of 4 KiB, at least 2, spread over each file from its first byte to its last.
        """
        found: dict[str, object] = {"dtype": str(self.dtype), "documents": self.num_documents, "tokens": self.num_tokens}
        for name, file in ((".bin", self._bin), (".idx", self._index)):
            span = bytearray(min(_SPAN_BYTES, file.size))
            digest = xxhash.xxh64()
            starts = [max(0, file.size - _SPAN_BYTES) * number // (spans - 1) for number in range(spans)]
            file.fetch([(start, len(span)) for start in starts])
            for start in starts:
                file.read_into(start, memoryview(span))
                digest.update(span)
            found[name] = f"{file.size}:{digest.hexdigest()}"
        return found
