"""The run of the preprocessor: batches out to workers, token arrays back in order, into one writer a key.

In: input files and settings. Out: PREFIX_KEY_document.bin, .idx and .json, and a summary. Only so many batches are under way at a time,
whatever the size of the input. Nothing appears under its final name until everything is written; what is finished is recorded in a journal
now and then, from which a run that was killed goes on.
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
from megatron_patch.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, bin_path, idx_path, optimal_dtype
from megatron_patch.errors import DataError
from megatron_patch.preprocess.dedup_shuffle import rearrange, remove_dataset, unordered_prefix
from megatron_patch.preprocess.encode import BackendDisagrees, Encoded, EncodeSettings, checked_tokenizer
from megatron_patch.preprocess.journal import (
    Journal,
    Record,
    identity,
    identity_checksum,
    journal_path,
    last_record,
    record_to_resume,
    tokenizer_checksum,
)
from megatron_patch.preprocess.prefetch import spare_cores
from megatron_patch.preprocess.summary import BadLines, LengthSample, Summary, finished_summary
from megatron_patch.preprocess.workers import InProcessEncoder, Workers, prepare_workers
from megatron_patch.raw_text.inputs import STANDARD_INPUT, Span, divide, expand
from megatron_patch.raw_text.readers import batches
from megatron_patch.tokenizers.base import Tokenizer
from megatron_patch.utils.files import checksum

Progress = Callable[[int, int, int, float, float], None]
"""Called with (documents, tokens, bytes, seconds, share of the input) now and then."""


@dataclass(frozen=True)
class _Run:
    """What does not change during a run."""

    spans: tuple[Span, ...]
    prefixes: tuple[str, ...]
    output_prefix: str
    workers: int
    on_bad_line: Literal["skip", "fail"]
    separator: bytes | None
    dedup: bool
    shuffle_seed: int | None
    save_seconds: float
    may_be_empty: bool
    progress: Progress | None
    notice: Callable[[str], None]

    @functools.cached_property
    def resumable(self) -> bool:
        return all(span.path != STANDARD_INPUT for span in self.spans)

    @property
    def rearranged(self) -> bool:
        return self.dedup or self.shuffle_seed is not None

    @property
    def written(self) -> tuple[str, ...]:
        """Where documents are written as they come."""
        return tuple(map(unordered_prefix, self.prefixes)) if self.rearranged else self.prefixes

    @property
    def scratch(self) -> Path:
        return Path(f"{self.output_prefix}_scratch")


def output_prefixes(prefix: str, keys: Sequence[str]) -> list[str]:
    """PREFIX_KEY_document of each key, as Megatron names them; dots of nested keys become underscores."""
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
    progress: Progress | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> Summary:
    """Turns text into indexed datasets.

    Args:
        inputs: files, globs, or "-".
        output_prefix: start of the outputs' names.
        settings: how to encode; `dtype` is decided here.
        workers: processes that encode.
        on_bad_line: leave bad lines out and list them, or stop at the first.
        overwrite: replace outputs that exist, and what an unfinished run left.
        resume: go on with an unfinished run, if there is one; nothing is done where it had been finished.
        shard: (i, n): only the i-th of n parts of the input, which may be empty.
        separator: what stands between the documents of a .txt; None: each is one document.
        dedup: leave documents out whose tokens are those of an earlier one of the same output.
        shuffle_seed: put documents into a random order; None: they keep that of the input.
        save_seconds: after so many seconds what is written is forced to disk, to be resumed from.
        progress: told how far it is.
        notice: told in words what the user should know.

    Raises:
        DataError: input that cannot be read, a tokenizer that does not fit, no space left, a dead worker, no documents at all, an
            unfinished run that cannot be resumed.
    """
    if workers < 1 or settings.patch_align < 1:
        raise DataError(f"--workers {workers}, --patch-align {settings.patch_align}", "whole numbers from 1")
    spans = tuple(divide(expand(inputs), *(shard or (0, 1))))
    prefixes = tuple(output_prefixes(output_prefix, settings.keys))
    run = _Run(
        spans=spans,
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
        raise DataError("--resume of standard input", "files, which can be read again from the middle", "name the files")
    if workers > 1:
        prepare_workers()
    tokenizer = checked_tokenizer(settings)
    settings = replace(settings, dtype=str(optimal_dtype(tokenizer.vocab_size)))
    shown = separator.decode("utf-8", "replace") if separator is not None else None
    known = identity(spans, settings, separator=shown, dedup=dedup, shuffle_seed=shuffle_seed)
    begin = _beginning(run, known, overwrite, resume)
    if begin is None:
        notice("finished before: nothing to do")
        return finished_summary(run.prefixes, tokenizer)
    if begin.read:
        settings = replace(settings, backend="reference") if begin.distrusted else settings
        notice(f"resuming: {begin.read / 1e6:,.0f} MB and {sum(count for count, _ in begin.outputs):,} documents are done")
    try:
        return _run(run, settings, tokenizer, known, begin)
    except DataError:
        if (kept := last_record(journal_path(output_prefix))) is not None:
            notice(f"{kept.read / 1e6:,.0f} MB of the input are finished and kept: when the cause is gone, go on with --resume")
        raise
    except BackendDisagrees as disagreement:
        if not run.resumable:
            raise DataError(
                f"the fast backend gave other ids than the reference for {disagreement}", do="use --backend reference"
            ) from None
        notice(f"the fast backend gave other ids than the reference for {str(disagreement)!r}; starting again with the reference alone")
        settings = replace(settings, backend="reference")
        journal_path(output_prefix).unlink(missing_ok=True)
        return _run(run, settings, tokenizer, known, Record(distrusted=True))


def _beginning(run: _Run, known: dict[str, object], overwrite: bool, resume: bool) -> Record | None:
    """Where to begin: at the start, or where an unfinished run ended; None where nothing is left to do."""
    path = journal_path(run.output_prefix)
    if resume and (found := record_to_resume(path, known)) is not None:
        return found
    if not resume and not overwrite and (unfinished := last_record(path)) is not None:
        raise DataError(
            f"{path}: an unfinished run that has read {unfinished.read / 1e6:,.0f} MB",
            "--resume to go on with it, --overwrite to start over",
            "choose one",
        )
    existing = [path for prefix in run.prefixes for path in (bin_path(prefix), idx_path(prefix)) if path.exists()]
    if existing and not overwrite:
        infos = [read_metadata(prefix) if idx_path(prefix).exists() else None for prefix in run.prefixes]
        if resume and all(info is not None and info.run_xxh64 == identity_checksum(known) for info in infos):
            return None
        raise DataError(f"{existing[0]} exists", "an --output-prefix that is free", "choose another, or use --overwrite")
    path.unlink(missing_ok=True)
    return Record()


def _size(span: Span) -> int:
    if span.path == STANDARD_INPUT:
        return 0
    return span.end - span.start if span.end is not None else os.path.getsize(span.path)


class _Accounts:
    """All that is counted on the way."""

    def __init__(self, run: _Run, begin: Record) -> None:
        self._run, self._begin = run, begin
        self._ends = [0, *itertools.accumulate(map(_size, run.spans))]
        self._started = time.monotonic()
        self._saved = self._started
        self.read, self.empty, self.filtered, self.checked = begin.read, begin.empty, begin.filtered, begin.checked
        self.largest = begin.largest
        self.lengths = LengthSample(begin.lengths, begin.longest)
        self.bad = BadLines(
            Path(f"{run.output_prefix}_bad_lines.jsonl"), run.on_bad_line, begin.file, begin.line, begin.bad, begin.bad_bytes
        )
        self.file, self.upto = begin.file, begin.upto
        self.backend: str | None = None

    @property
    def seconds(self) -> float:
        """Since the run began, without the time between its end and its resumption."""
        return self._begin.seconds + time.monotonic() - self._started

    def add(self, encoded: Encoded, writers: Sequence[IndexedDatasetWriter]) -> None:
        """Counts a batch that has been written."""
        self.bad.add(encoded)
        self.lengths.add(encoded.parts[0].lengths)
        self.read += encoded.bytes
        self.empty += encoded.empty
        self.filtered += encoded.filtered
        self.checked += encoded.checked
        self.largest = max(self.largest, encoded.largest)
        self.file, self.upto = encoded.file, encoded.upto
        if self.backend is None:
            self._run.notice(f"encoding with {encoded.backend_note}")
        self.backend = encoded.backend
        if self._run.progress is not None:
            before, behind = self._ends[self.file : self.file + 2]
            done = before + encoded.share * (behind - before)
            documents, tokens = sum(w.num_documents for w in writers), sum(w.num_tokens for w in writers)
            self._run.progress(documents, tokens, self.read, self.seconds, done / max(1, self._ends[-1]))

    def due(self) -> bool:
        """Whether it is time to save."""
        return self._run.resumable and time.monotonic() - self._saved >= self._run.save_seconds

    def save(self, journal: Journal, writers: Sequence[IndexedDatasetWriter], complete: bool = False) -> None:
        """Forces everything to disk, and then says so in the journal."""
        outputs = tuple(writer.sync() for writer in writers)
        bad_bytes = self.bad.sync()
        journal.add(
            Record(
                self.file,
                self.upto,
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
        accounts = _Accounts(run, begin)
        stack.callback(accounts.bad.close)
        journal = Journal(journal_path(run.output_prefix), known, begin if begin.outputs else None)
        stack.callback(journal.close)
        if not begin.complete:
            _encode_all(run, settings, tokenizer, writers, accounts, journal, begin)
            for writer in writers:
                if writer.num_documents == 0 and not run.may_be_empty:
                    raise DataError(
                        f"no documents for {writer.prefix}: {accounts.bad.count} bad lines, {accounts.empty} empty documents, "
                        f"{accounts.filtered} too short or too long",
                        "at least one document",
                        f"check --input and --json-keys (now {' '.join(settings.keys)})",
                    )
            if run.resumable:
                accounts.save(journal, writers, complete=True)
        for writer in writers:
            metadata_path(writer.prefix).unlink(missing_ok=True)
            writer.finish()
        _rearrange(run)
    written = begin.outputs if begin.complete else tuple((writer.num_documents, writer.num_tokens) for writer in writers)
    infos = [_info(prefix, settings, tokenizer, identity_checksum(known)) for prefix in run.prefixes]
    for prefix, info in zip(run.prefixes, infos, strict=True):
        write_metadata(prefix, info)
    journal_path(run.output_prefix).unlink(missing_ok=True)
    return Summary(
        outputs=run.prefixes,
        documents=sum(info.documents for info in infos),
        tokens=sum(info.tokens for info in infos),
        bytes=accounts.read,
        bad_lines=accounts.bad.count,
        empty=accounts.empty,
        filtered=accounts.filtered,
        duplicates=sum(documents for documents, _ in written) - sum(info.documents for info in infos),
        dtype=settings.dtype,
        vocab_size=tokenizer.vocab_size,
        largest_id=accounts.largest,
        eod_id=tokenizer.eod_id,
        tokens_per_document=(LengthSample.of(IndexedDataset(run.prefixes[0])) if run.dedup else accounts.lengths).quantiles(),
        backend=accounts.backend or "reference",
        checked=accounts.checked,
        seconds=accounts.seconds,
        resumed_at=begin.read,
        bad_lines_file=accounts.bad.close(),
    )


def _writers(run: _Run, settings: EncodeSettings, begin: Record, stack: contextlib.ExitStack) -> list[IndexedDatasetWriter]:
    """One writer a key; of a run that ended while it gave outputs their names, only of those that have none yet."""
    writers = []
    for number, prefix in enumerate(run.written):
        done = begin.outputs[number] if begin.outputs else None
        # Both files have their names, or, where documents are rearranged, are gone again.
        named = idx_path(prefix).exists() or (run.rearranged and not bin_path(prefix).exists())
        if begin.complete and named and not Path(f"{bin_path(prefix)}.partial").exists():
            Path(f"{prefix}.lengths.partial").unlink(missing_ok=True)
            continue
        writers.append(stack.enter_context(IndexedDatasetWriter(prefix, np.dtype(settings.dtype), done)))
    return writers


def _rearrange(run: _Run) -> None:
    for source, output in zip(run.written, run.prefixes, strict=True):
        if run.rearranged and idx_path(source).exists():
            rearrange(source, output, run.dedup, run.shuffle_seed, run.scratch)
            remove_dataset(source)


def _encode_all(
    run: _Run,
    settings: EncodeSettings,
    tokenizer: Tokenizer,
    writers: Sequence[IndexedDatasetWriter],
    accounts: _Accounts,
    journal: Journal,
    begin: Record,
) -> None:
    work = batches(run.spans, settings.keys, run.separator, (begin.file, begin.upto) if begin.outputs else (0, None), run.scratch)
    # Ended before the files are closed: workers end, whatever happens, before anything else does.
    encoders = (
        Workers(work, run.workers, settings, tokenizer, writers)
        if run.workers > 1
        else InProcessEncoder(work, settings, tokenizer, writers, ahead=run.resumable and spare_cores(1))
    )
    with encoders as encoder:
        for encoded in encoder:
            accounts.add(encoded, writers)
            if accounts.due():
                encoder.settle()
                accounts.save(journal, writers)


def _info(prefix: str, settings: EncodeSettings, tokenizer: Tokenizer, run_xxh64: str) -> DatasetMetadata:
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
    )
