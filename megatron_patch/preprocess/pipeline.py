"""A preprocessing run: batches are encoded, in worker processes or in this one, and written in the order of the input.

In: input files and settings. Out: PREFIX_KEY_document.bin, .idx and .json, and a summary. The number of batches in memory is limited,
whatever the size of the input. Output has temporary names until all of it is written. A progress log has records at intervals; a run
that was killed resumes from it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_patch.data.dataset_metadata import DatasetMetadata, metadata_path, read_metadata, write_metadata
from megatron_patch.data.indexed_dataset import IndexedDataset, bin_path, idx_path, optimal_dtype
from megatron_patch.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_patch.errors import DataError
from megatron_patch.preprocess.dedup_shuffle import dedup_and_shuffle, remove_dataset, unordered_prefix
from megatron_patch.preprocess.encode import EncodedBatch, EncodeSettings, FastEncoderDisagrees, load_checked_tokenizer
from megatron_patch.preprocess.in_process import InProcessEncoder
from megatron_patch.preprocess.prefetch import spare_cores
from megatron_patch.preprocess.progress_log import (
    ProgressLog,
    Record,
    identity,
    identity_checksum,
    last_record,
    progress_log_path,
    record_to_resume,
    tokenizer_checksum,
)
from megatron_patch.preprocess.summary import BadLines, LengthSample, Summary, summary_of_finished_run
from megatron_patch.preprocess.workers import Workers, prepare_workers
from megatron_patch.raw_text.inputs import STANDARD_INPUT, FileRange, expand, shard_inputs
from megatron_patch.raw_text.readers import read_batches
from megatron_patch.tokenizers.base import Tokenizer
from megatron_patch.utils.files import checksum
from megatron_patch.utils.units import plural

ReportProgress = Callable[[int, int, int, float, float], None]
"""Called with (documents, tokens, bytes, seconds, fraction of the input) after each batch."""


@dataclass(frozen=True)
class _Run:
    """The settings of a run, other than how to encode."""

    parts: tuple[FileRange, ...]
    prefixes: tuple[str, ...]
    output_prefix: str
    workers: int
    on_bad_line: Literal["skip", "fail"]
    separator: bytes | None
    dedup: bool
    shuffle_seed: int | None
    save_seconds: float
    may_be_empty: bool
    progress: ReportProgress | None
    notice: Callable[[str], None]

    @functools.cached_property
    def resumable(self) -> bool:
        return all(part.path != STANDARD_INPUT for part in self.parts)

    @property
    def changes_order(self) -> bool:
        return self.dedup or self.shuffle_seed is not None

    @property
    def ordered_prefixes(self) -> tuple[str, ...]:
        """The prefixes of the outputs in the order of the input."""
        return tuple(map(unordered_prefix, self.prefixes)) if self.changes_order else self.prefixes

    @property
    def scratch(self) -> Path:
        return Path(f"{self.output_prefix}_scratch")


def output_prefixes(prefix: str, keys: Sequence[str]) -> list[str]:
    """Returns PREFIX_KEY_document for each key, as Megatron names them; dots of nested keys become underscores."""
    return [f"{prefix}_{key.replace('.', '_')}_document" for key in keys]


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    settings: EncodeSettings,
    workers: int = 1,
    on_bad_line: Literal["skip", "fail"] = "skip",
    overwrite: bool = False,
    resume: bool = False,
    shard: tuple[int, int] | None = None,
    separator: bytes | None = None,
    dedup: bool = False,
    shuffle_seed: int | None = None,
    save_seconds: float = 30.0,
    progress: ReportProgress | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> Summary:
    """Turns text into indexed datasets.

    Args:
        inputs: files, globs, or "-".
        output_prefix: start of the outputs' names.
        settings: how to encode; `dtype` is chosen here.
        workers: number of processes that encode.
        on_bad_line: leave bad lines out and list them, or stop at the first one.
        overwrite: replace existing outputs and the files of an unfinished run.
        resume: resume an unfinished run, if there is one; nothing is done for a finished run.
        shard: (i, n): process only part i of n of the input, which may be empty.
        separator: bytes between the documents of a .txt file; None: each file is one document.
        dedup: leave out documents whose tokens equal those of an earlier one of the same output.
        shuffle_seed: write documents in a random order; None: in the order of the input.
        save_seconds: seconds between two records from which the run can resume.
        progress: receives the progress after each batch.
        notice: receives messages for the user.

    Raises:
        DataError: the input cannot be read, the tokenizer does not fit, the disk is full, a worker died, there are no documents, or the
            unfinished run cannot be resumed.
    """
    if workers < 1 or settings.patch_align < 1:
        raise DataError(f"--workers is {workers} and --patch-align is {settings.patch_align}", "whole numbers from 1")
    parts = tuple(shard_inputs(expand(inputs), *(shard or (0, 1))))
    prefixes = tuple(output_prefixes(output_prefix, settings.keys))
    run = _Run(
        parts=parts,
        prefixes=prefixes,
        output_prefix=output_prefix,
        workers=workers,
        on_bad_line=on_bad_line,
        separator=separator,
        dedup=dedup,
        shuffle_seed=shuffle_seed,
        save_seconds=save_seconds,
        may_be_empty=shard is not None,
        progress=progress,
        notice=notice,
    )
    if resume and not run.resumable:
        raise DataError(
            "--resume does not work with standard input", "files, which can be read from any position", "give the files with --input"
        )
    if workers > 1:
        prepare_workers()
    tokenizer = load_checked_tokenizer(settings)
    settings = replace(settings, dtype=str(optimal_dtype(tokenizer.vocab_size)))
    shown = separator.decode("utf-8", "replace") if separator is not None else None
    known = identity(parts, settings, separator=shown, dedup=dedup, shuffle_seed=shuffle_seed)
    begin = _starting_record(run, known, overwrite, resume)
    if begin is None:
        notice("the run is already finished: nothing to do")
        return summary_of_finished_run(run.prefixes, tokenizer)
    if begin.read:
        settings = replace(settings, backend="reference") if begin.distrusted else settings
        done = plural(sum(count for count, _ in begin.outputs), "document")
        notice(f"resuming after {begin.read / 1e6:,.0f} MB of input, {done}")
    try:
        return _run(run, settings, tokenizer, known, begin)
    except DataError:
        if (kept := last_record(progress_log_path(output_prefix))) is not None:
            notice(f"{kept.read / 1e6:,.0f} MB of the input are saved: fix the problem and run again with --resume to continue from there")
        raise
    except FastEncoderDisagrees as disagreement:
        if not run.resumable:
            raise DataError(
                f"the fast encoder returned other ids than the reference tokenizer for {str(disagreement)!r}", do="use --backend reference"
            ) from None
        notice(
            f"the fast encoder returned other ids than the reference tokenizer for {str(disagreement)!r}; starting again with the "
            "reference tokenizer only"
        )
        settings = replace(settings, backend="reference")
        progress_log_path(output_prefix).unlink(missing_ok=True)
        return _run(run, settings, tokenizer, known, Record(distrusted=True))


def _starting_record(run: _Run, known: dict[str, object], overwrite: bool, resume: bool) -> Record | None:
    """Returns the record to start from: the first one, or the last one of an unfinished run; None if the run is already finished."""
    path = progress_log_path(run.output_prefix)
    if resume and (found := record_to_resume(path, known)) is not None:
        return found
    if not resume and not overwrite and (unfinished := last_record(path)) is not None:
        raise DataError(
            f"{path} belongs to an unfinished run that has read {unfinished.read / 1e6:,.0f} MB",
            "--resume to continue it, or --overwrite to start over",
            "add one of these flags",
        )
    existing = [path for prefix in run.prefixes for path in (bin_path(prefix), idx_path(prefix)) if path.exists()]
    if existing and not overwrite:
        infos = [read_metadata(prefix) if idx_path(prefix).exists() else None for prefix in run.prefixes]
        if resume and all(info is not None and info.run_xxh64 == identity_checksum(known) for info in infos):
            return None
        raise DataError(f"{existing[0]} already exists", "an unused --output-prefix", "choose another, or add --overwrite")
    path.unlink(missing_ok=True)
    return Record()


def _size(part: FileRange) -> int:
    if part.path == STANDARD_INPUT:
        return 0
    return part.end - part.start if part.end is not None else os.path.getsize(part.path)


class _Counters:
    """Counts documents, bytes and problems during a run, and saves them to the progress log."""

    def __init__(self, run: _Run, begin: Record) -> None:
        self._run, self._begin = run, begin
        self._ends = [0, *itertools.accumulate(map(_size, run.parts))]
        self._started = time.monotonic()
        self._saved = self._started
        self.read, self.empty, self.filtered, self.checked = begin.read, begin.empty, begin.filtered, begin.checked
        self.largest = begin.largest
        self.lengths = LengthSample(begin.lengths, begin.longest)
        self.bad = BadLines(
            Path(f"{run.output_prefix}_bad_lines.jsonl"), run.on_bad_line, begin.file, begin.line, begin.bad, begin.bad_bytes
        )
        self.file, self.next_unit = begin.file, begin.next_unit
        self.backend: str | None = None

    @property
    def seconds(self) -> float:
        """The time spent, without the time between an interruption and its resumption."""
        return self._begin.seconds + time.monotonic() - self._started

    def add(self, encoded: EncodedBatch, writers: Sequence[IndexedDatasetWriter]) -> None:
        """Counts a batch that has been written."""
        self.bad.add(encoded)
        self.lengths.add(encoded.columns[0].lengths)
        self.read += encoded.bytes
        self.empty += encoded.empty
        self.filtered += encoded.filtered
        self.checked += encoded.checked
        self.largest = max(self.largest, encoded.largest)
        self.file, self.next_unit = encoded.file, encoded.next_unit
        if self.backend is None:
            self._run.notice(f"encoding with {encoded.encoder_note}")
        self.backend = encoded.backend
        if self._run.progress is not None:
            before, after = self._ends[self.file : self.file + 2]
            done = before + encoded.fraction * (after - before)
            documents, tokens = sum(w.num_documents for w in writers), sum(w.num_tokens for w in writers)
            self._run.progress(documents, tokens, self.read, self.seconds, done / max(1, self._ends[-1]))

    def due(self) -> bool:
        """Returns whether it is time to save."""
        return self._run.resumable and time.monotonic() - self._saved >= self._run.save_seconds

    def save(self, progress_log: ProgressLog, writers: Sequence[IndexedDatasetWriter], complete: bool = False) -> None:
        """Forces all output to disk, and then adds a record to the progress log."""
        outputs = tuple(writer.sync() for writer in writers)
        bad_bytes = self.bad.sync()
        progress_log.add(
            Record(
                self.file,
                self.next_unit,
                self.bad.line,
                outputs,
                self.read,
                self.empty,
                self.filtered,
                self.checked,
                self.bad.count,
                bad_bytes,
                self.lengths.to_json(),
                self.lengths.longest,
                self.largest,
                self._begin.distrusted,
                self.seconds,
                complete,
            )
        )
        self._saved = time.monotonic()


def _run(run: _Run, settings: EncodeSettings, tokenizer: Tokenizer, known: dict[str, object], begin: Record) -> Summary:
    shutil.rmtree(run.scratch, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, run.scratch, ignore_errors=True)
        writers = _writers(run, settings, begin, stack)
        counters = _Counters(run, begin)
        stack.callback(counters.bad.close)
        progress_log = ProgressLog(progress_log_path(run.output_prefix), known, begin if begin.outputs else None)
        stack.callback(progress_log.close)
        if not begin.complete:
            _encode_all(run, settings, tokenizer, writers, counters, progress_log, begin)
            for writer in writers:
                if writer.num_documents == 0 and not run.may_be_empty:
                    raise DataError(
                        f"there are no documents for {writer.prefix}: {plural(counters.bad.count, 'bad line')}, "
                        f"{plural(counters.empty, 'empty document')}, {counters.filtered:,} too short or too long",
                        "at least one document",
                        f"check --input and --json-keys (the keys are {' '.join(settings.keys)})",
                    )
            if run.resumable:
                counters.save(progress_log, writers, complete=True)
        for writer in writers:
            metadata_path(writer.prefix).unlink(missing_ok=True)
            writer.finish()
        _change_order(run)
    written = begin.outputs if begin.complete else tuple((writer.num_documents, writer.num_tokens) for writer in writers)
    infos = [_metadata(prefix, settings, tokenizer, identity_checksum(known)) for prefix in run.prefixes]
    for prefix, info in zip(run.prefixes, infos, strict=True):
        write_metadata(prefix, info)
    progress_log_path(run.output_prefix).unlink(missing_ok=True)
    return Summary(
        outputs=run.prefixes,
        documents=sum(info.documents for info in infos),
        tokens=sum(info.tokens for info in infos),
        bytes=counters.read,
        bad_lines=counters.bad.count,
        empty=counters.empty,
        filtered=counters.filtered,
        duplicates=sum(documents for documents, _ in written) - sum(info.documents for info in infos),
        dtype=settings.dtype,
        vocab_size=tokenizer.vocab_size,
        largest_id=counters.largest,
        eod_id=tokenizer.eod_id,
        tokens_per_document=(LengthSample.of(IndexedDataset(run.prefixes[0])) if run.dedup else counters.lengths).quantiles(),
        backend=counters.backend or "reference",
        checked=counters.checked,
        seconds=counters.seconds,
        resumed_at=begin.read,
        bad_lines_file=counters.bad.close(),
    )


def _writers(run: _Run, settings: EncodeSettings, begin: Record, stack: contextlib.ExitStack) -> list[IndexedDatasetWriter]:
    """Opens one writer for each key. If the run was killed while it renamed its outputs, only for those that are not renamed yet."""
    writers = []
    for number, prefix in enumerate(run.ordered_prefixes):
        done = begin.outputs[number] if begin.outputs else None
        # Both files are renamed or, if documents change their order, have been removed after that.
        renamed = idx_path(prefix).exists() or (run.changes_order and not bin_path(prefix).exists())
        if begin.complete and renamed and not Path(f"{bin_path(prefix)}.partial").exists():
            Path(f"{prefix}.lengths.partial").unlink(missing_ok=True)
            continue
        writers.append(stack.enter_context(IndexedDatasetWriter(prefix, np.dtype(settings.dtype), done)))
    return writers


def _change_order(run: _Run) -> None:
    for source, output in zip(run.ordered_prefixes, run.prefixes, strict=True):
        if run.changes_order and idx_path(source).exists():
            dedup_and_shuffle(source, output, run.dedup, run.shuffle_seed, run.scratch)
            remove_dataset(source)


def _encode_all(
    run: _Run,
    settings: EncodeSettings,
    tokenizer: Tokenizer,
    writers: Sequence[IndexedDatasetWriter],
    counters: _Counters,
    progress_log: ProgressLog,
    begin: Record,
) -> None:
    work = read_batches(run.parts, settings.keys, run.separator, (begin.file, begin.next_unit) if begin.outputs else (0, None))
    # The context ends before the files are closed: after any failure the workers end first.
    encoders = (
        Workers(work, run.workers, settings, tokenizer, writers)
        if run.workers > 1
        else InProcessEncoder(work, settings, tokenizer, writers, prefetch=run.resumable and spare_cores(1))
    )
    with encoders as encoder:
        for encoded in encoder:
            counters.add(encoded, writers)
            if counters.due():
                encoder.wait_for_writes()
                counters.save(progress_log, writers)


def _metadata(prefix: str, settings: EncodeSettings, tokenizer: Tokenizer, run_xxh64: str) -> DatasetMetadata:
    tokens, index = bin_path(prefix), idx_path(prefix)
    written = IndexedDataset(prefix)
    model = settings.tokenizer_model or settings.vocab_file
    return DatasetMetadata(
        tokenizer_type=settings.tokenizer_type,
        tokenizer_model=str(tokenizer.vocab_size)
        if model is None or settings.tokenizer_type == "NullTokenizer"
        else os.path.abspath(model),
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        documents=written.num_documents,
        tokens=written.num_tokens,
        dtype=settings.dtype,
        append_eod=settings.append_eod,
        prepend_bos=settings.prepend_bos,
        patch_align=settings.patch_align,
        bin_bytes=tokens.stat().st_size,
        idx_bytes=index.stat().st_size,
        bin_xxh64=checksum(tokens),
        idx_xxh64=checksum(index),
        tokenizer_xxh64=tokenizer_checksum(settings),
        run_xxh64=run_xxh64,
        merge_file=os.path.abspath(settings.merge_file) if settings.merge_file else "",
        tiktoken_pattern=settings.tiktoken_pattern or "",
        special_tokens=tuple(settings.special_tokens or ()),
        bos_id=tokenizer.bos_id,
    )
