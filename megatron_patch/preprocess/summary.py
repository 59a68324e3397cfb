"""What a run of the preprocessor did: the summary, the lengths of documents, and the list of lines that were left out."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_patch.data.indexed_dataset import IndexedDataset
from megatron_patch.errors import DataError
from megatron_patch.preprocess.encode import Encoded
from megatron_patch.tokenizers.base import Tokenizer

_LISTED_BAD_LINES = 100_000
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Args:
        outputs: the prefixes written.
        documents: of all outputs.
        tokens: of all outputs.
        bytes: read, unpacked.
        bad_lines: left out.
        empty: texts without a token, left out.
        filtered: texts too short or too long, left out.
        duplicates: documents equal to earlier ones, left out.
        dtype: of the tokens.
        vocab_size: of the tokenizer.
        largest_id: of the text's tokens, each of which was checked to be in the vocabulary; None: nothing was encoded.
        eod_id: its end-of-document token, or None.
        tokens_per_document: quantiles of the first output: 5 %, 50 %, 95 %, longest.
        backend: what encoded.
        checked: texts of the fast backend that were compared with the reference, all with the same result.
        seconds: it took, with what was done before it was resumed.
        resumed_at: bytes that had been read when it was resumed; 0: it was not.
        bad_lines_file: their list, or None.
    """

    outputs: tuple[str, ...]
    documents: int
    tokens: int
    bytes: int
    bad_lines: int
    empty: int
    filtered: int
    duplicates: int
    dtype: str
    vocab_size: int
    largest_id: int | None
    eod_id: int | None
    tokens_per_document: tuple[int, ...]
    backend: str
    checked: int
    seconds: float
    resumed_at: int
    bad_lines_file: str | None

    def to_json(self) -> dict[str, Any]:
        """As plain values, with rates."""
        seconds = max(self.seconds, 1e-9)
        return {
            **asdict(self),
            "megabytes_per_second": round(self.bytes / 1e6 / seconds, 3),
            "tokens_per_second": round(self.tokens / seconds),
        }


class LengthSample:
    """Document lengths for quantiles, in bounded memory: a histogram by eighths of powers of two.

    Args:
        counts: of an earlier histogram, as `to_json` gave them.
        longest: of it.
    """

    def __init__(self, counts: Mapping[str, int] | None = None, longest: int = 0) -> None:
        self._counts: collections.Counter[int] = collections.Counter({int(step): count for step, count in (counts or {}).items()})
        self.longest = longest

    def add(self, lengths: npt.NDArray[np.generic]) -> None:
        """Counts documents, each of at least one token."""
        if lengths.size:
            bins, counts = np.unique(np.round(np.log2(lengths) * 8).astype(int), return_counts=True)
            self._counts.update(dict(zip(bins.tolist(), counts.tolist(), strict=True)))
            self.longest = max(self.longest, int(lengths.max()))

    @classmethod
    def of(cls, dataset: IndexedDataset) -> LengthSample:
        """Of all documents of a dataset."""
        found = cls()
        for start in range(0, len(dataset), _CHUNK):
            found.add(np.asarray(dataset.sequence_lengths[start : start + _CHUNK]))
        return found

    def quantile(self, share: float) -> int:
        """About the length that a share of the documents does not exceed."""
        target, seen = share * sum(self._counts.values()), 0
        for step in sorted(self._counts):
            seen += self._counts[step]
            if seen >= target:
                return min(self.longest, round(2 ** (step / 8)))
        return 0

    def quantiles(self) -> tuple[int, ...]:
        """5 %, 50 %, 95 %, longest."""
        return (*(self.quantile(share) for share in (0.05, 0.5, 0.95)), self.longest)

    def to_json(self) -> dict[str, int]:
        """The histogram."""
        return {str(step): count for step, count in self._counts.items()}


def finished_summary(prefixes: Sequence[str], tokenizer: Tokenizer) -> Summary:
    """Of a run that had been finished before."""
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    return Summary(
        outputs=tuple(prefixes),
        documents=sum(dataset.num_documents for dataset in datasets),
        tokens=sum(dataset.num_tokens for dataset in datasets),
        bytes=0,
        bad_lines=0,
        empty=0,
        filtered=0,
        duplicates=0,
        dtype=str(datasets[0].dtype),
        vocab_size=tokenizer.vocab_size,
        largest_id=None,
        eod_id=tokenizer.eod_id,
        tokens_per_document=LengthSample.of(datasets[0]).quantiles(),
        backend="nothing: finished before",
        checked=0,
        seconds=0.0,
        resumed_at=0,
        bad_lines_file=None,
    )


class BadLines:
    """The list of lines that were left out: file, line (counted from where this run, or its shard, began with the file), byte, reason.

    Args:
        path: of the list.
        policy: list them, or stop at the first.
        file: number of the input that is being read.
        line: lines of it before.
        count: bad lines listed before.
        size: bytes of the list that count; the rest is cut off.
    """

    def __init__(self, path: Path, policy: Literal["skip", "fail"], file: int = 0, line: int = 0, count: int = 0, size: int = 0) -> None:
        self._path, self._policy = path, policy
        self._file: Any = None
        self.input, self.line, self.count = file, line, count
        if size:
            self._file = path.open("r+", encoding="utf-8")
            self._file.truncate(size)
            self._file.seek(0, os.SEEK_END)

    def add(self, encoded: Encoded) -> None:
        """Takes a batch into account.

        Raises:
            DataError: a bad line, where none is allowed; no space left.
        """
        if encoded.file != self.input:
            self.input, self.line = encoded.file, 0
        for line, offset, reason in encoded.bad:
            if self._policy == "fail":
                raise DataError(
                    f"{encoded.source}, line {self.line + line}: {reason}",
                    "documents with text under every key",
                    "repair it, or use --on-bad-line skip",
                )
            entry: dict[str, Any] = {"file": encoded.source, "line": self.line + line}
            if encoded.start is not None:
                entry["byte"] = encoded.start + offset
            if self.count < _LISTED_BAD_LINES:
                self._write(json.dumps({**entry, "reason": reason}) + "\n")
            self.count += 1
        self.line += encoded.lines

    def _write(self, text: str) -> None:
        try:
            if self._file is None:
                self._file = self._path.open("w", encoding="utf-8")
            self._file.write(text)
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> DataError:
        return DataError(
            f"cannot write {self._path}: {error.strerror or error}",
            "a writable folder with free space",
            "free space or change --output-prefix",
        )

    def sync(self) -> int:
        """Forces the list to disk. Returns its size.

        Raises:
            DataError: no space left.
        """
        if self._file is None:
            return 0
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failure(error) from error
        return int(os.fstat(self._file.fileno()).st_size)

    def close(self) -> str | None:
        """Closes the list. Returns its path, or None where there is none.

        Raises:
            DataError: no space left.
        """
        if self._file is None:
            return None
        try:
            self._file.close()
        except OSError as error:
            raise self._failure(error) from error
        return str(self._path)
