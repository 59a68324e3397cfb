"""Encodes and writes in this process, for --workers 1: threads read and encode ahead while the caller's thread writes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from megatron_patch.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_patch.preprocess.encode import EncodedBatch, Encoder, EncodeSettings
from megatron_patch.preprocess.prefetch import prefetch_if
from megatron_patch.raw_text.parse_documents import ParsedBatch, parse_batch
from megatron_patch.raw_text.readers import Batch
from megatron_patch.tokenizers.base import Tokenizer


class InProcessEncoder:
    """Encodes and writes batches in this process. A context manager, which ends its threads.

    Args:
        work: the batches.
        settings: how to encode.
        tokenizer: the tokenizer that `load_checked_tokenizer` returned for these settings.
        writers: one for each key.
        prefetch: whether threads read and encode ahead; False if no core is free, or if the input is a pipe that may never end.
    """

    def __init__(
        self,
        work: Iterable[Batch],
        settings: EncodeSettings,
        tokenizer: Tokenizer,
        writers: Sequence[IndexedDatasetWriter],
        prefetch: bool = True,
    ) -> None:
        self._work, self._encoder, self._writers, self._prefetch = work, Encoder(settings, tokenizer), writers, prefetch
        self._threads = contextlib.ExitStack()
        self._encoded: Iterable[EncodedBatch] = ()

    def __enter__(self) -> InProcessEncoder:
        keys = self._encoder.settings.keys
        parsed: Iterable[ParsedBatch] = (parse_batch(batch, keys) for batch in self._work)
        with contextlib.ExitStack() as stack:
            parsed = stack.enter_context(prefetch_if(self._prefetch, parsed))
            self._encoded = stack.enter_context(prefetch_if(self._prefetch, map(self._encoder.encode, parsed)))
            self._threads = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.close()

    def __iter__(self) -> Iterator[EncodedBatch]:
        """Yields each batch after it has been written, in order."""
        for encoded in self._encoded:
            for writer, column in zip(self._writers, encoded.columns, strict=True):
                writer.append(column.tokens, column.lengths)
            yield encoded

    def wait_for_writes(self) -> None:
        """Returns at once: a batch has been written before it is yielded."""
