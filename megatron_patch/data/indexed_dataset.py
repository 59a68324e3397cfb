"""Megatron's indexed dataset: PREFIX.bin has the token ids of all documents one after another, PREFIX.idx where each document begins.

In: a prefix. Out: any range of tokens and of the index; the writer produces the same bytes as Megatron core. All numbers are little endian.
The index is a header of 34 bytes (magic, version 1, dtype code, number of sequences S, number of document boundaries D), S lengths in
tokens (int32), S byte offsets (int64), D boundaries counted in sequences (int64), and for multimodal data S modes (int8).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_patch.data.storage import FileArray, exists, open_file
from megatron_patch.errors import DataError
from megatron_patch.utils.files import fsync_folder
from megatron_patch.utils.units import plural

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
HEADER_BYTES = _HEADER.size
_DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_CHUNK = 1 << 20
_LONGEST = (1 << 31) - 1
_SPAN_BYTES = 4096


def optimal_dtype(vocab_size: int) -> np.dtype[np.generic]:
    """Returns the type of token ids for a vocabulary, as Megatron chooses it: uint16 below 65,500 ids, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def pack_header(dtype: np.dtype[np.generic], sequences: int, boundaries: int) -> bytes:
    """Returns the header of an index with these numbers of sequences and document boundaries."""
    return _HEADER.pack(MAGIC, 1, _CODES[np.dtype(dtype)], sequences, boundaries)


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
                raise DataError(f"{path} does not exist", "a dataset prefix: PREFIX.bin and PREFIX.idx", f"check --data-path {prefix}")
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
        if code not in _DTYPES:
            raise DataError(f"{index} has dtype code {code}", f"integer types: {sorted(_DTYPES)}", "preprocess the data again")
        self.dtype = np.dtype(_DTYPES[code])
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
        if self.bin_bytes % self.dtype.itemsize:
            raise DataError(
                f"{tokens} has {self.bin_bytes} bytes, which is not a multiple of {self.dtype.itemsize} ({self.dtype})",
                "a complete file",
                "copy the file again, or preprocess the data again",
            )
        self.num_tokens = self.bin_bytes // self.dtype.itemsize
        self.sequence_lengths = FileArray(self._index, np.int32, _HEADER.size, self.num_sequences)
        self.sequence_pointers = FileArray(self._index, np.int64, _HEADER.size + 4 * self.num_sequences, self.num_sequences)
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


class IndexedDatasetWriter:
    """Writes a dataset under temporary names; `finish` renames it to its own.

    Args:
        prefix: path without .bin and .idx.
        dtype: type of the tokens, see `optimal_dtype`.
        resume: (documents, tokens) that `sync` returned in an unfinished run; what was written after them is removed.

    Raises:
        DataError: the folder cannot be written, the disk is full, or the unfinished run wrote less than `resume`.
    """

    def __init__(self, prefix: str, dtype: np.dtype[np.generic], resume: tuple[int, int] | None = None) -> None:
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        if self.dtype not in _CODES:
            raise DataError(f"tokens of {self.dtype}", ", ".join(sorted(str(known) for known in _CODES)), "choose another dtype")
        self.num_documents = 0
        self.num_tokens = 0
        self._temporary = [Path(f"{path}.partial") for path in (bin_path(prefix), idx_path(prefix), Path(f"{prefix}.lengths"))]
        self._finished = False
        self._kept = resume is not None
        mode = "wb+" if resume is None else "rb+"
        try:
            bin_path(prefix).parent.mkdir(parents=True, exist_ok=True)
            if resume is not None:
                self._restore_name()
            self._bin = self._temporary[0].open(mode, buffering=_CHUNK)
            self._lengths = self._temporary[2].open(mode, buffering=_CHUNK)
            if resume is not None:
                self._truncate(*resume)
        except FileNotFoundError as error:
            raise DataError(
                f"{error.filename} does not exist", "the files of the unfinished run", "start over with --overwrite and without --resume"
            ) from error
        except OSError as error:
            for path in self._temporary if not self._kept else ():
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            raise self.failure(error) from error

    def _restore_name(self) -> None:
        """Gives the tokens their temporary name again, after a run that ended between the renaming of the two files."""
        if not self._temporary[0].exists() and bin_path(self.prefix).exists() and not idx_path(self.prefix).exists():
            os.replace(bin_path(self.prefix), self._temporary[0])

    def _truncate(self, documents: int, tokens: int) -> None:
        for file, size in ((self._bin, tokens * self.dtype.itemsize), (self._lengths, 4 * documents)):
            if file.seek(0, os.SEEK_END) < size:
                raise DataError(
                    f"{file.name} has less than the {size} bytes that were recorded",
                    "the files of the unfinished run",
                    "start over with --overwrite and without --resume",
                )
            file.truncate(size)
            file.seek(size)
        self.num_documents, self.num_tokens = documents, tokens

    def sync(self) -> tuple[int, int]:
        """Forces what was appended to disk. From then on the temporary files are kept, so that a later run can resume.

        Returns:
            (documents, tokens), for `resume`.

        Raises:
            DataError: the disk is full.
        """
        try:
            for file in (self._bin, self._lengths):
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self.failure(error) from error
        self._kept = True
        return self.num_documents, self.num_tokens

    def failure(self, error: OSError) -> DataError:
        """Returns the error to raise where the files cannot be written."""
        return DataError(
            f"cannot write {self.prefix}: {error.strerror or error}",
            "a writable folder with free space",
            "free space or change --output-prefix",
        )

    def append(self, tokens: npt.NDArray[np.generic], lengths: npt.NDArray[np.generic]) -> None:
        """Adds documents.

        Args:
            tokens: the tokens of all of them, one document after another; ids must fit the dtype.
            lengths: number of tokens of each document, from 1 to below 2^31 (the index has 32 bits for it).

        Raises:
            DataError: the lengths do not sum to the tokens, a document is empty or too long, an id does not fit, or the disk is full.
        """
        self._check_lengths(lengths, tokens.size)
        if tokens.dtype != self.dtype:
            limits = np.iinfo(self.dtype.name)
            if tokens.size and (int(tokens.min()) < limits.min or int(tokens.max()) > limits.max):
                raise DataError(
                    f"token ids up to {int(tokens.max())} do not fit {self.dtype}",
                    f"ids from {limits.min} to {limits.max}",
                    "correct the size of the vocabulary",
                )
            tokens = tokens.astype(self.dtype)
        try:
            self._bin.write(np.ascontiguousarray(tokens).data)
            self._lengths.write(lengths.astype("<i4").data)
        except OSError as error:
            raise self.failure(error) from error
        self.num_documents += int(lengths.size)
        self.num_tokens += int(tokens.size)

    @property
    def tokens_path(self) -> Path:
        """The temporary file of the tokens, for processes that fill a reserved range."""
        return self._temporary[0]

    def reserve(self, lengths: npt.NDArray[np.generic]) -> int:
        """Adds documents whose tokens another process writes, in the dataset's dtype and before `sync` or `finish` is called.

        Args:
            lengths: lengths of the documents, as for `append`.

        Returns:
            The first byte of the range that is reserved for them in `tokens_path`.

        Raises:
            DataError: a document is empty or too long, or the disk is full.
        """
        tokens = int(lengths.sum())
        self._check_lengths(lengths, tokens)
        start = self.num_tokens * self.dtype.itemsize
        try:
            self._bin.seek(start + tokens * self.dtype.itemsize)
            self._lengths.write(lengths.astype("<i4").data)
        except OSError as error:
            raise self.failure(error) from error
        self.num_documents += int(lengths.size)
        self.num_tokens += tokens
        return start

    def append_file(self, path: Path, lengths: npt.NDArray[np.generic]) -> None:
        """Adds documents whose tokens are in a file, in the dataset's dtype.

        Args:
            path: path of the file.
            lengths: lengths of the documents, as for `append`.

        Raises:
            DataError: the lengths do not sum to the tokens, a document is empty or too long, or the disk is full.
        """
        try:
            size = path.stat().st_size // self.dtype.itemsize
            self._check_lengths(lengths, size)
            with path.open("rb") as file:
                shutil.copyfileobj(file, self._bin, _CHUNK)
            self._lengths.write(lengths.astype("<i4").data)
        except OSError as error:
            raise self.failure(error) from error
        self.num_documents += int(lengths.size)
        self.num_tokens += size

    def _check_lengths(self, lengths: npt.NDArray[np.generic], tokens: int) -> None:
        if lengths.size and int(lengths.max()) > _LONGEST:
            raise DataError(
                f"a document of {int(lengths.max())} tokens",
                f"up to {_LONGEST} tokens, because the format has 32 bits for the length",
                "split the document",
            )
        if int(lengths.sum()) != tokens or (lengths.size and int(lengths.min()) < 1):
            raise DataError(
                f"{plural(lengths.size, 'document')} of {plural(int(lengths.sum()), 'token')} in all, for {plural(tokens, 'token')}",
                "documents of at least 1 token, whose lengths sum to the number of tokens",
                "correct the lengths",
            )

    def _length_chunks(self) -> Iterator[npt.NDArray[np.int32]]:
        self._lengths.seek(0)
        while data := self._lengths.read(_CHUNK):
            yield np.frombuffer(data, dtype="<i4")

    def finish(self) -> None:
        """Writes the index, forces both files to disk and renames them to their final names.

        Raises:
            DataError: the disk is full.
        """
        try:
            self._lengths.flush()
            with self._temporary[1].open("wb", buffering=_CHUNK) as index:
                index.write(pack_header(self.dtype, self.num_documents, self.num_documents + 1))
                for lengths in self._length_chunks():
                    index.write(lengths.data)
                offset = 0
                for lengths in self._length_chunks():
                    sizes = lengths.astype(np.int64) * self.dtype.itemsize
                    ends = offset + np.cumsum(sizes)
                    index.write((ends - sizes).astype("<i8").data)
                    offset = int(ends[-1])
                for start in range(0, self.num_documents + 1, _CHUNK):
                    index.write(np.arange(start, min(start + _CHUNK, self.num_documents + 1), dtype="<i8").data)
                index.flush()
                os.fsync(index.fileno())
            self._bin.flush()
            os.fsync(self._bin.fileno())
            self._bin.close()
            # The index of an older dataset is removed first, so that a crash in between leaves no pair of files that do not match.
            idx_path(self.prefix).unlink(missing_ok=True)
            os.replace(self._temporary[0], bin_path(self.prefix))
            os.replace(self._temporary[1], idx_path(self.prefix))
            fsync_folder(bin_path(self.prefix).parent)
        except OSError as error:
            raise self.failure(error) from error
        self._finished, self._kept = True, False
        self.close()

    def close(self) -> None:
        """Closes the files, and removes the temporary ones unless `sync` was called."""
        for file in (self._bin, self._lengths):
            try:
                file.close()
            except OSError:
                continue
        for path in self._temporary if not self._kept else ():
            path.unlink(missing_ok=True)

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._finished:
            self.close()
