"""Writes Megatron's indexed dataset (see indexed_dataset.py), with the same bytes as Megatron core.

In: the tokens and lengths of documents. Out: PREFIX.bin and PREFIX.idx, which appear only when both are complete. A document has one
sequence, or none if it has no token.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from megatron_patch.data.indexed_dataset import DTYPE_CODES, bin_path, idx_path, pack_header
from megatron_patch.errors import DataError
from megatron_patch.utils.files import fsync_folder, open_in_place, open_new
from megatron_patch.utils.units import plural

_CHUNK = 1 << 20
_LONGEST = (1 << 31) - 1


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
        if self.dtype not in DTYPE_CODES:
            raise DataError(f"tokens of {self.dtype}", ", ".join(sorted(str(known) for known in DTYPE_CODES)), "choose another dtype")
        self.num_documents = 0
        self.num_tokens = 0
        self._temporary = [Path(f"{path}.partial") for path in (bin_path(prefix), idx_path(prefix), Path(f"{prefix}.lengths"))]
        self._finished = False
        self._kept = resume is not None
        try:
            bin_path(prefix).parent.mkdir(parents=True, exist_ok=True)
            if resume is not None:
                self._restore_name()
            self._bin, self._lengths = (
                open_new(path, "wb+", _CHUNK) if resume is None else open_in_place(path, "rb+", _CHUNK)
                for path in (self._temporary[0], self._temporary[2])
            )
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
            lengths: number of tokens of each document, below 2^31 (the index has 32 bits for it).

        Raises:
            DataError: the lengths do not sum to the tokens, a document is too long, an id does not fit, or the disk is full.
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
            DataError: a document is too long, or the disk is full.
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

    def _check_lengths(self, lengths: npt.NDArray[np.generic], tokens: int) -> None:
        if lengths.size and int(lengths.max()) > _LONGEST:
            raise DataError(
                f"a document of {int(lengths.max())} tokens",
                f"up to {_LONGEST} tokens, because the format has 32 bits for the length",
                "split the document",
            )
        if int(lengths.sum()) != tokens or (lengths.size and int(lengths.min()) < 0):
            raise DataError(
                f"{plural(lengths.size, 'document')} of {plural(int(lengths.sum()), 'token')} in all, for {plural(tokens, 'token')}",
                "lengths from 0, whose sum is the number of tokens",
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
            with open_new(self._temporary[1], "wb", _CHUNK) as index:
                sequences = sum(int(np.count_nonzero(lengths)) for lengths in self._length_chunks())
                index.write(pack_header(self.dtype, sequences, self.num_documents + 1))
                for lengths in self._length_chunks():
                    index.write(lengths[lengths > 0].data)
                offset = 0
                for lengths in self._length_chunks():
                    sizes = lengths[lengths > 0].astype(np.int64) * self.dtype.itemsize
                    index.write((offset + np.cumsum(sizes) - sizes).astype("<i8").data)
                    offset += int(sizes.sum())
                index.write(np.zeros(1, "<i8").data)
                boundary = 0
                for lengths in self._length_chunks():
                    boundaries = boundary + np.cumsum(lengths > 0)
                    index.write(boundaries.astype("<i8").data)
                    boundary = int(boundaries[-1])
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
