"""One worker that is this process: batches in, tokens at the ends of the outputs; what `Workers` do with processes of their own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_patch.data.indexed_dataset import IndexedDatasetWriter
from megatron_patch.data.preprocess.ahead import ahead_if
from megatron_patch.data.preprocess.documents import Texts, read_texts
from megatron_patch.data.preprocess.encode import Encoded, Encoder, EncodeSettings
from megatron_patch.data.preprocess.readers import Batch
from megatron_patch.tokenizer import Tokenizer


class EncoderHere:
    """Encodes and writes in this process: one thread reads ahead, one encodes, and the caller's writes; a context manager, which ends them.

    Args:
        work: the batches.
        settings: how to encode.
        tokenizer: as `checked_tokenizer` gave it for them.
        writers: one a key.
        ahead: with threads; without, where there is no core for them, or the input may keep one waiting for ever.
    """

    def __init__(
        self,
        work: Iterable[Batch],
        settings: EncodeSettings,
        tokenizer: Tokenizer,
        writers: Sequence[IndexedDatasetWriter],
        ahead: bool = True,
    ) -> None:
        self._work, self._encoder, self._writers, self._ahead = work, Encoder(settings, tokenizer), writers, ahead
        self._threads = contextlib.ExitStack()
        self._encoded: Iterable[Encoded] = ()

    def __enter__(self) -> EncoderHere:
        keys = self._encoder.settings.keys
        read: Iterable[Texts] = (read_texts(batch, keys) for batch in self._work)
        with contextlib.ExitStack() as stack:
            read = stack.enter_context(ahead_if(self._ahead, read))
            self._encoded = stack.enter_context(ahead_if(self._ahead, map(self._encoder.encode, read)))
            self._threads = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.close()

    def __iter__(self) -> Iterator[Encoded]:
        """Each batch that has been given its places, in order."""
        for encoded in self._encoded:
            for writer, part in zip(self._writers, encoded.parts, strict=True):
                if part.file:
                    writer.append_file(Path(part.file), part.lengths)
                    os.unlink(part.file)
                else:
                    writer.append(part.tokens, part.lengths)
            yield encoded

    def settle(self) -> None:
        """Nothing is under way between two batches."""
