"""The results of a preprocessing run: its summary, the distribution of document lengths, and the list of bad lines."""

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
from megatron_patch.preprocess.dedup_shuffle import document_lengths
from megatron_patch.preprocess.encode import EncodedBatch
from megatron_patch.tokenizers.base import Tokenizer, token_text
from megatron_patch.tokenizers.round_trip import TextChecks
from megatron_patch.utils.files import LONGEST_LINE, open_in_place, open_new
from megatron_patch.utils.files import reason as reason_of
from megatron_patch.utils.units import plural

_LISTED_BAD_LINES = 100_000
_NO_TOKEN = -100  # the bin of documents without a token: 2^(-100 / 8) rounds to 0


@dataclass(frozen=True)
class Summary:
    """The results of a run.

    Args:
        outputs: the prefixes of the datasets that were written.
        documents: number of documents in all outputs.
        tokens: number of tokens in all outputs.
        bytes: number of bytes of decompressed input.
        bad_lines: lines left out because they hold no valid document.
        empty: documents left out because they have no text, or nothing but white space without a token.
        kept_empty: documents without a token that were kept.
        filtered: documents left out because they are too short or too long.
        duplicates: documents left out because an earlier one is equal.
        dtype: dtype of the token ids.
        vocab_size: vocabulary size of the tokenizer.
        largest_id: largest token id of the texts; all ids were checked to be in the vocabulary. None: nothing was encoded.
        eod_id: the id of the end-of-document token, or None.
        eod_token: its name in the vocabulary.
        bos_id: the id of the beginning-of-sequence token, or None.
        bos_token: its name in the vocabulary.
        tokens_per_document: lengths in the first output: 5 %, 50 % and 95 % quantiles, and the longest.
        backend: name of the encoder.
        encoder: what encoded, and why.
        checked: documents for which the fast encoder was compared with the reference, all with the same result.
        text_checks: what comparing documents with what their ids give back found.
        text_notes: sentences on text that the tokenizer does not give back; none if it gives back all.
        seconds: time spent, including the time before the run was resumed.
        resumed_at: bytes that had been read when the run was resumed; 0: it was not resumed.
        bad_lines_file: the path of the list of bad lines, or None.
        first_bad_line: the place of the first bad line and its reason, or None.
        mostly_bad: names an input of which more than half of the lines are bad, and says how many there are; None without one.
    """

    outputs: tuple[str, ...]
    documents: int
    tokens: int
    bytes: int
    bad_lines: int
    empty: int
    kept_empty: int
    filtered: int
    duplicates: int
    dtype: str
    vocab_size: int
    largest_id: int | None
    eod_id: int | None
    eod_token: str | None
    bos_id: int | None
    bos_token: str | None
    tokens_per_document: tuple[int, ...]
    backend: str
    encoder: str
    checked: int
    text_checks: TextChecks
    text_notes: tuple[str, ...]
    seconds: float
    resumed_at: int
    bad_lines_file: str | None
    first_bad_line: str | None
    mostly_bad: str | None

    def to_json(self) -> dict[str, Any]:
        """Returns the summary as plain values, with megabytes and tokens per second added."""
        seconds = max(self.seconds, 1e-9)
        return {
            **asdict(self),
            "megabytes_per_second": round(self.bytes / 1e6 / seconds, 3),
            "tokens_per_second": round(self.tokens / seconds),
        }


class LengthSample:
    """The distribution of document lengths in bounded memory: a histogram whose bins are eighths of powers of two.

    Args:
        counts: counts of an earlier histogram, as `to_json` returned them.
        longest: the longest document of the earlier histogram.
    """

    def __init__(self, counts: Mapping[str, int] | None = None, longest: int = 0) -> None:
        self._counts: collections.Counter[int] = collections.Counter({int(step): count for step, count in (counts or {}).items()})
        self.longest = longest

    def add(self, lengths: npt.NDArray[np.generic]) -> None:
        """Adds the lengths of documents."""
        if lengths.size:
            steps = np.round(np.log2(np.maximum(lengths, 1)) * 8).astype(int)
            steps[lengths == 0] = _NO_TOKEN
            bins, counts = np.unique(steps, return_counts=True)
            self._counts.update(dict(zip(bins.tolist(), counts.tolist(), strict=True)))
            self.longest = max(self.longest, int(lengths.max()))

    @classmethod
    def of(cls, dataset: IndexedDataset) -> LengthSample:
        """Returns the distribution over all documents of a dataset."""
        found = cls()
        for lengths in document_lengths(dataset):
            found.add(lengths)
        return found

    def quantile(self, fraction: float) -> int:
        """Returns approximately the length that a fraction of the documents does not exceed."""
        target, seen = fraction * sum(self._counts.values()), 0
        for step in sorted(self._counts):
            seen += self._counts[step]
            if seen >= target:
                return min(self.longest, round(2 ** (step / 8)))
        return 0

    def quantiles(self) -> tuple[int, ...]:
        """Returns the 5 %, 50 % and 95 % quantiles, and the longest length."""
        return (*(self.quantile(fraction) for fraction in (0.05, 0.5, 0.95)), self.longest)

    def to_json(self) -> dict[str, int]:
        """Returns the histogram with strings as keys."""
        return {str(step): count for step, count in self._counts.items()}


def special_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the fields of a `Summary` about the tokens that end and begin documents."""
    eod, bos = tokenizer.eod_id, tokenizer.bos_id
    return {
        "eod_id": eod,
        "eod_token": None if eod is None else token_text(tokenizer, eod),
        "bos_id": bos,
        "bos_token": None if bos is None else token_text(tokenizer, bos),
    }


def summary_of_finished_run(prefixes: Sequence[str], tokenizer: Tokenizer) -> Summary:
    """Returns the summary of a run that was already finished: what its datasets contain; what was left out is not known any more."""
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    return Summary(
        outputs=tuple(prefixes),
        documents=sum(dataset.num_documents for dataset in datasets),
        tokens=sum(dataset.num_tokens for dataset in datasets),
        bytes=0,
        bad_lines=0,
        empty=0,
        kept_empty=0,
        filtered=0,
        duplicates=0,
        dtype=str(datasets[0].dtype),
        vocab_size=tokenizer.vocab_size,
        largest_id=None,
        **special_tokens(tokenizer),
        tokens_per_document=LengthSample.of(datasets[0]).quantiles(),
        backend="nothing: already finished",
        encoder="nothing: already finished",
        checked=0,
        text_checks=TextChecks(),
        text_notes=(),
        seconds=0.0,
        resumed_at=0,
        bad_lines_file=None,
        first_bad_line=None,
        mostly_bad=None,
    )


def _place_and_reason(entry: Mapping[str, Any]) -> str:
    return f"{entry['file']}, line {entry['line']}: {entry['reason']}"


class BadLines:
    """Writes the list of bad lines: file, line, byte and reason. Lines are counted from where this run, or its shard, started in the file.

    Args:
        path: path of the list.
        policy: "skip" lists bad lines; "fail" stops at the first one.
        file: index of the input that is being read.
        line: lines of this input that have been read.
        count: bad lines so far.
        size: valid bytes of an existing list; the rest is truncated.
        in_input: bad lines of this input so far.
        source: its path.
        mostly_bad: how many inputs before it had mostly bad lines, and the sentence on the first one.

    Raises:
        DataError: the existing list is missing or damaged.
    """

    def __init__(
        self,
        path: Path,
        policy: Literal["skip", "fail"],
        file: int = 0,
        line: int = 0,
        count: int = 0,
        size: int = 0,
        in_input: int = 0,
        source: str = "",
        mostly_bad: Sequence[Any] = (0, ""),
    ) -> None:
        self._path, self._policy = path, policy
        self._file: Any = None
        self.input, self.line, self.count = file, line, count
        self.in_input, self._source = in_input, source
        self.mostly_bad_before = (int(mostly_bad[0]), str(mostly_bad[1]))
        self.first: str | None = None
        """The place of the first bad line and its reason, also of one before the run was resumed; None without one."""
        if size:
            try:
                self._file = open_in_place(path, "r+")
                self.first = _place_and_reason(json.loads(self._file.readline(LONGEST_LINE)))
                self._file.truncate(size)
                self._file.seek(0, os.SEEK_END)
            except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
                raise DataError(
                    f"{path} is not the list of bad lines of the unfinished run: {reason_of(error)}",
                    "the files of the unfinished run",
                    "start over with --overwrite and without --resume",
                ) from error

    def add(self, encoded: EncodedBatch) -> None:
        """Adds the bad lines of a batch.

        Raises:
            DataError: there is a bad line and the policy is "fail"; or the list cannot be written.
        """
        if encoded.file != self.input:
            self.mostly_bad_before = self._mostly_bad_so_far()
            self.input, self.line, self.in_input = encoded.file, 0, 0
        self._source = encoded.source
        for line, offset, reason in encoded.bad:
            if self._policy == "fail":
                raise DataError(
                    f"{encoded.source}, line {self.line + line}: {reason}",
                    "documents with text under every key",
                    "repair the line, or use --on-bad-line skip",
                )
            entry: dict[str, Any] = {"file": encoded.source, "line": self.line + line}
            if encoded.start is not None:
                entry["byte"] = encoded.start + offset
            entry["reason"] = reason
            if self.first is None:
                self.first = _place_and_reason(entry)
            if self.count < _LISTED_BAD_LINES:
                self._write(json.dumps(entry) + "\n")
            self.count += 1
            self.in_input += 1
        self.line += encoded.lines

    def _mostly_bad_so_far(self) -> tuple[int, str]:
        number, first = self.mostly_bad_before
        if 2 * self.in_input <= self.line:
            return number, first
        return number + 1, first or f"{self.in_input:,} of the {self.line:,} lines of {self._source} are bad and left out"

    @property
    def mostly_bad(self) -> str | None:
        """A sentence on the inputs of which more than half of the lines, or rows, are bad; None without one."""
        number, first = self._mostly_bad_so_far()
        if not number:
            return None
        return first + (f"; so are more than half of the lines of {plural(number - 1, 'other input')}" if number > 1 else "")

    def _write(self, text: str) -> None:
        try:
            if self._file is None:
                self._file = open_new(self._path, "w")
            self._file.write(text)
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> DataError:
        return DataError(
            f"cannot write {self._path}: {error.strerror or error}",
            "a writable folder with free space",
            "free disk space or change --output-prefix",
        )

    def sync(self) -> int:
        """Forces the list to disk, and returns its size in bytes.

        Raises:
            DataError: it cannot be written.
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
        """Closes the list, and returns its path, or None if there were no bad lines.

        Raises:
            DataError: it cannot be written.
        """
        if self._file is None:
            return None
        try:
            self._file.close()
        except OSError as error:
            raise self._failure(error) from error
        return str(self._path)
