"""A preprocessing run: batches are encoded, in worker processes or in this one, and written in the order of the input.

In: input files and settings. Out: PREFIX_KEY_document.bin, .idx and .json, and a summary. The number of batches in memory is limited,
whatever the size of the input. Output has temporary names until all of it is written. A progress log has records at intervals; a run
that was killed resumes from it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_patch.data.dataset_metadata import DatasetMetadata, metadata_path, read_metadata, write_metadata
from megatron_patch.data.indexed_dataset import IndexedDataset, bin_path, idx_path, optimal_dtype
from megatron_patch.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_patch.errors import DataError
from megatron_patch.preprocess.dedup_shuffle import contains_document, dedup_and_shuffle, remove_dataset
from megatron_patch.preprocess.encode import EncodeSettings, FastEncoderDisagrees, lengths_with_special_tokens, load_checked_tokenizer
from megatron_patch.preprocess.in_process import InProcessEncoder
from megatron_patch.preprocess.outputs import make_output_folder, output_prefixes
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
from megatron_patch.preprocess.run_state import Counters, ReportProgress, Run
from megatron_patch.preprocess.summary import LengthSample, Summary, special_tokens, summary_of_finished_run
from megatron_patch.preprocess.workers import Workers, prepare_workers
from megatron_patch.raw_text.inputs import expand, shard_inputs
from megatron_patch.raw_text.json_lines import shown_names
from megatron_patch.raw_text.readers import read_batches
from megatron_patch.tokenizers.base import Tokenizer
from megatron_patch.tokenizers.round_trip import check_round_trip
from megatron_patch.utils.files import checksum
from megatron_patch.utils.units import plural


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
        DataError: the input cannot be read, the tokenizer does not fit, the disk is full, a worker died, there are no documents, the
            outputs cannot be created, or the unfinished run cannot be resumed.
    """
    if workers < 1 or settings.patch_align < 1:
        raise DataError(f"--workers is {workers} and --patch-align is {settings.patch_align}", "whole numbers from 1")
    parts = tuple(shard_inputs(expand(inputs), *(shard or (0, 1))))
    prefixes = tuple(output_prefixes(output_prefix, settings.keys))
    run = Run(
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
    make_output_folder(output_prefix, prefixes)
    settings = replace(settings, dtype=str(optimal_dtype(tokenizer.vocab_size)))
    shown = separator.decode("utf-8", "replace") if separator is not None else None
    ids = (tokenizer.eod_id, tokenizer.bos_id)
    known = identity(parts, settings, ids, separator=shown, dedup=dedup, shuffle_seed=shuffle_seed)
    begin = _starting_record(run, known, overwrite, resume)
    if begin is None:
        notice("the run is already finished: nothing to do")
        return summary_of_finished_run(run.prefixes, tokenizer)
    if begin.read:
        settings = replace(settings, backend="reference") if begin.distrusted else settings
        done = plural(sum(count for count, _ in begin.outputs), "document")
        notice(f"resuming after {begin.read / 1e6:,.0f} MB of input, {done}")
    text_note = check_round_trip(tokenizer)
    try:
        return _run(run, settings, tokenizer, known, begin, text_note)
    except DataError:
        if (kept := last_record(progress_log_path(output_prefix))) is not None:
            notice(f"{kept.read / 1e6:,.0f} MB of the input are saved: fix the problem and run again with --resume to continue from there")
        raise
    except FastEncoderDisagrees as disagreement:
        if not run.resumable:
            raise DataError(f"the fast encoder {disagreement}", do="use --backend reference") from None
        notice(f"the fast encoder {disagreement}; starting again with the reference tokenizer only")
        settings = replace(settings, backend="reference")
        progress_log_path(output_prefix).unlink(missing_ok=True)
        return _run(run, settings, tokenizer, known, Record(distrusted=True), text_note)


def _starting_record(run: Run, known: dict[str, object], overwrite: bool, resume: bool) -> Record | None:
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


def _run(run: Run, settings: EncodeSettings, tokenizer: Tokenizer, known: dict[str, object], begin: Record, text_note: str) -> Summary:
    shutil.rmtree(run.scratch, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, run.scratch, ignore_errors=True)
        writers = _writers(run, settings, begin, stack)
        counters = Counters(run, begin)
        stack.callback(counters.bad.close)
        progress_log = ProgressLog(progress_log_path(run.output_prefix), known, begin if begin.outputs else None)
        stack.callback(progress_log.close)
        if not begin.complete:
            _encode_all(run, settings, tokenizer, writers, counters, progress_log, begin)
            for writer in writers:
                if writer.num_documents == 0:
                    error = _no_documents(writer.prefix, counters, settings)
                    if not run.may_be_empty:
                        raise error
                    run.notice(f"this shard is empty: {error.what}")
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
    if counters.bad.mostly_bad is not None:
        run.notice(f"warning: {counters.bad.mostly_bad}; the first bad line is {counters.bad.first}")
    return Summary(
        outputs=run.prefixes,
        documents=sum(info.documents for info in infos),
        tokens=sum(info.tokens for info in infos),
        bytes=counters.read,
        bad_lines=counters.bad.count,
        empty=0 if settings.keep_empty else counters.empty,
        kept_empty=_kept_empty(run, settings, tokenizer, counters),
        filtered=counters.filtered,
        duplicates=sum(documents for documents, _ in written) - sum(info.documents for info in infos),
        dtype=settings.dtype,
        vocab_size=tokenizer.vocab_size,
        largest_id=counters.largest,
        **special_tokens(tokenizer),
        tokens_per_document=(LengthSample.of(IndexedDataset(run.prefixes[0])) if run.dedup else counters.lengths).quantiles(),
        backend=counters.backend or "reference",
        encoder=counters.encoder_note,
        checked=counters.checked,
        text_checks=counters.text_checks,
        text_notes=(*([text_note] if text_note else []), *counters.text_checks.sentences()),
        seconds=counters.seconds,
        resumed_at=begin.read,
        first_bad_line=counters.bad.first,
        mostly_bad=counters.bad.mostly_bad,
        bad_lines_file=counters.bad.close(),
    )


def _kept_empty(run: Run, settings: EncodeSettings, tokenizer: Tokenizer, counters: Counters) -> int:
    """Returns how many documents of the outputs have no token of their own."""
    if not settings.keep_empty:
        return 0
    if run.dedup:  # equal documents are left out, so there is at most one in each output
        begin = [tokenizer.bos_id or 0] * settings.prepend_bos
        length = int(lengths_with_special_tokens(settings, np.zeros(1, np.int64))[0])
        empty = begin + [tokenizer.eod_id or 0] * (length - len(begin))
        return sum(contains_document(IndexedDataset(prefix), empty) for prefix in run.prefixes)
    return counters.empty + counters.text_checks.without_tokens


def _no_documents(prefix: str, counters: Counters, settings: EncodeSettings) -> DataError:
    first = counters.bad.first
    if counters.bad.count + counters.empty + counters.filtered + counters.text_checks.without_tokens == 0:
        return DataError(
            f"there are no documents for {prefix}: the input "
            + (f"has nothing but blank lines or a byte-order mark ({plural(counters.read, 'byte')})" if counters.read else "is empty"),
            "at least one document",
            "check --input",
        )
    return DataError(
        f"there are no documents for {prefix}: {plural(counters.bad.count, 'bad line')}, "
        f"{plural(counters.empty, 'empty document')}, {counters.filtered:,} too short or too long"
        + "".join(f"; {sentence}" for sentence in counters.text_checks.sentences())
        + (f"; the first bad line is {first}" if first is not None else ""),
        "at least one document",
        f"give --json-keys keys that the documents have (given: {shown_names(settings.keys)}), or check --input",
    )


def _writers(run: Run, settings: EncodeSettings, begin: Record, stack: contextlib.ExitStack) -> list[IndexedDatasetWriter]:
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


def _change_order(run: Run) -> None:
    for source, output in zip(run.ordered_prefixes, run.prefixes, strict=True):
        if run.changes_order and idx_path(source).exists():
            dedup_and_shuffle(source, output, run.dedup, run.shuffle_seed, run.scratch)
            remove_dataset(source)


def _encode_all(
    run: Run,
    settings: EncodeSettings,
    tokenizer: Tokenizer,
    writers: Sequence[IndexedDatasetWriter],
    counters: Counters,
    progress_log: ProgressLog,
    begin: Record,
) -> None:
    start = (begin.file, begin.next_unit) if begin.outputs else (0, None)
    work = read_batches(run.parts, settings.keys, run.separator, start, run.notice)
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
