"""The run of the preprocessor: batches out to workers, token arrays back in order, into one writer a key.

In: input files and settings. Out: PREFIX_KEY_document.bin, .idx and .json, and a summary. Only so many batches are under way at a time,
whatever the size of the input. Nothing appears under its final name until everything is written.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_patch.data.indexed_dataset import IndexedDatasetWriter, bin_path, idx_path, optimal_dtype
from megatron_patch.data.preprocess.encode import BackendDisagrees, Encoded, Encoder, EncodeSettings
from megatron_patch.data.preprocess.readers import Batch, batches, expand
from megatron_patch.data.preprocess.workers import encode_in_order
from megatron_patch.data.side_file import DatasetInfo, info_path, write_info
from megatron_patch.errors import DataError
from megatron_patch.files import checksum

_LISTED_BAD_LINES = 100_000


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Args:
        outputs: the prefixes written.
        documents: of all outputs.
        tokens: of all outputs.
        bytes: read, unpacked.
        bad_lines: left out.
        empty: documents without text, left out.
        dtype: of the tokens.
        vocab_size: of the tokenizer.
        eod_id: its end-of-document token, or None.
        tokens_per_document: quantiles of the first output: 5 %, 50 %, 95 %, longest.
        backend: what encoded.
        seconds: it took.
        bad_lines_file: their list, or None.
    """

    outputs: tuple[str, ...]
    documents: int
    tokens: int
    bytes: int
    bad_lines: int
    empty: int
    dtype: str
    vocab_size: int
    eod_id: int | None
    tokens_per_document: tuple[int, ...]
    backend: str
    seconds: float
    bad_lines_file: str | None

    def to_json(self) -> dict[str, Any]:
        """As plain values, with rates."""
        seconds = max(self.seconds, 1e-9)
        return {
            **asdict(self),
            "megabytes_per_second": round(self.bytes / 1e6 / seconds, 3),
            "tokens_per_second": round(self.tokens / seconds),
        }


def output_prefixes(prefix: str, keys: Sequence[str]) -> list[str]:
    """PREFIX_KEY_document of each key, as Megatron names them; dots of nested keys become underscores."""
    return [f"{prefix}_{key.replace('.', '_')}_document" for key in keys]


class _LengthSample:
    """Document lengths for quantiles, in bounded memory: a histogram by eighths of powers of two."""

    def __init__(self) -> None:
        self._counts: collections.Counter[int] = collections.Counter()
        self.longest = 0

    def add(self, lengths: np.ndarray) -> None:
        if lengths.size:
            bins, counts = np.unique(np.round(np.log2(lengths) * 8).astype(int), return_counts=True)
            self._counts.update(dict(zip(bins.tolist(), counts.tolist(), strict=True)))
            self.longest = max(self.longest, int(lengths.max()))

    def quantile(self, share: float) -> int:
        target, seen = share * sum(self._counts.values()), 0
        for step in sorted(self._counts):
            seen += self._counts[step]
            if seen >= target:
                return min(self.longest, round(2 ** (step / 8)))
        return 0


def _encode_here(work: Iterable[Batch], encoder: Encoder) -> Generator[Encoded]:
    yield from map(encoder, work)


class _BadLines:
    """The list of lines that were left out."""

    def __init__(self, path: Path, policy: Literal["skip", "fail"]) -> None:
        self._path, self._policy = path, policy
        self._file: Any = None
        self._lines: collections.Counter[str] = collections.Counter()
        self.count = 0

    def add(self, encoded: Encoded) -> None:
        for line, reason in encoded.bad:
            number = self._lines[encoded.source] + line
            if self._policy == "fail":
                raise DataError(
                    f"{encoded.source}, line {number}: {reason}",
                    "lines that are JSON objects with the key",
                    "repair it, or use --on-bad-line skip",
                )
            if self._file is None:
                self._file = self._path.open("w", encoding="utf-8")
            if self.count < _LISTED_BAD_LINES:
                self._file.write(json.dumps({"file": encoded.source, "line": number, "reason": reason}) + "\n")
            self.count += 1
        self._lines[encoded.source] += encoded.lines

    def close(self) -> str | None:
        if self._file is None:
            return None
        self._file.close()
        return str(self._path)


Progress = Callable[[int, int, int, float], None]
"""Called with (documents, tokens, bytes, seconds) now and then."""


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    settings: EncodeSettings,
    workers: int = 1,
    on_bad_line: Literal["skip", "fail"] = "skip",
    overwrite: bool = False,
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
        overwrite: replace outputs that exist.
        progress: told how far it is.
        notice: told in words what the user should know.

    Raises:
        DataError: input that cannot be read, a tokenizer that does not fit, no space left, a dead worker, no documents at all.
    """
    if workers < 1 or settings.patch_align < 1:
        raise DataError(f"--workers {workers}, --patch-align {settings.patch_align}", "whole numbers from 1")
    files = expand(inputs)
    prefixes = output_prefixes(output_prefix, settings.keys)
    existing = [str(path) for prefix in prefixes for path in (bin_path(prefix), idx_path(prefix)) if path.exists()]
    if existing and not overwrite:
        raise DataError(f"{existing[0]} exists", "an --output-prefix that is free", "choose another, or use --overwrite")
    encoder = Encoder(settings)
    settings = replace(settings, dtype=str(optimal_dtype(encoder.tokenizer.vocab_size)))
    encoder.settings = settings
    notice(f"encoding with {encoder.backend_note}")
    try:
        return _run(files, prefixes, output_prefix, settings, encoder, workers, on_bad_line, progress)
    except BackendDisagrees as disagreement:
        if "-" in files:
            raise DataError(f"fastokens gave other ids than the reference for {disagreement}", do="use --backend reference") from None
        notice(f"fastokens gave other ids than the reference for {str(disagreement)!r}; starting again with the reference alone")
        settings = replace(settings, backend="reference")
        return _run(files, prefixes, output_prefix, settings, Encoder(settings), workers, on_bad_line, progress)


def _run(
    files: Sequence[str],
    prefixes: Sequence[str],
    output_prefix: str,
    settings: EncodeSettings,
    encoder: Encoder,
    workers: int,
    on_bad_line: Literal["skip", "fail"],
    progress: Progress | None,
) -> Summary:
    started = time.monotonic()
    read = empty = 0
    lengths = _LengthSample()
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(IndexedDatasetWriter(prefix, np.dtype(settings.dtype))) for prefix in prefixes]
        bad = _BadLines(Path(f"{output_prefix}_bad_lines.jsonl"), on_bad_line)
        stack.callback(bad.close)
        work = batches(files)
        # Closed before the files are: workers end, whatever happens, before anything else does.
        encoded_batches = stack.enter_context(
            contextlib.closing(encode_in_order(work, workers, settings) if workers > 1 else _encode_here(work, encoder))
        )
        for encoded in encoded_batches:
            bad.add(encoded)
            for writer, part in zip(writers, encoded.parts, strict=True):
                writer.append(part.tokens, part.lengths)
            lengths.add(encoded.parts[0].lengths)
            read += encoded.bytes
            empty += encoded.empty
            if progress is not None:
                progress(sum(w.num_documents for w in writers), sum(w.num_tokens for w in writers), read, time.monotonic() - started)
        for writer in writers:
            if writer.num_documents == 0:
                raise DataError(
                    f"no documents for {writer.prefix}: {bad.count} bad lines, {empty} empty documents",
                    "at least one document",
                    f"check --input and --json-keys (now {' '.join(settings.keys)})",
                )
        for writer in writers:
            writer.finish()
            info_path(writer.prefix).unlink(missing_ok=True)
    for writer in writers:
        write_info(writer.prefix, _info(writer, settings, encoder))
    tokens_per_document = (*(lengths.quantile(share) for share in (0.05, 0.5, 0.95)), lengths.longest)
    return Summary(
        outputs=tuple(prefixes),
        documents=sum(writer.num_documents for writer in writers),
        tokens=sum(writer.num_tokens for writer in writers),
        bytes=read,
        bad_lines=bad.count,
        empty=empty,
        dtype=settings.dtype,
        vocab_size=encoder.tokenizer.vocab_size,
        eod_id=encoder.tokenizer.eod_id,
        tokens_per_document=tokens_per_document,
        backend="fastokens" if encoder.fast is not None else "reference",
        seconds=time.monotonic() - started,
        bad_lines_file=bad.close(),
    )


def _info(writer: IndexedDatasetWriter, settings: EncodeSettings, encoder: Encoder) -> DatasetInfo:
    tokens, index = bin_path(writer.prefix), idx_path(writer.prefix)
    return DatasetInfo(
        tokenizer_type=settings.tokenizer_type,
        tokenizer_model=os.path.abspath(settings.tokenizer_model)
        if settings.tokenizer_model
        else str(settings.vocab_size or settings.vocab_file),
        vocab_size=encoder.tokenizer.vocab_size,
        eod_id=encoder.tokenizer.eod_id,
        documents=writer.num_documents,
        tokens=writer.num_tokens,
        dtype=settings.dtype,
        append_eod=settings.append_eod,
        prepend_bos=settings.prepend_bos,
        patch_align=settings.patch_align,
        bin_bytes=tokens.stat().st_size,
        idx_bytes=index.stat().st_size,
        bin_xxh64=checksum(tokens),
        idx_xxh64=checksum(index),
    )
