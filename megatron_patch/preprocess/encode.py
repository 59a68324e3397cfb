"""From a batch of lines to token arrays, in a worker.

In: a `Batch`. Out: `Encoded`: for each key flat ids and document lengths, with beginning, end and padding tokens in place, and what was
left out. Encoding goes through what is faster (fast_backend.py) where that agrees with the reference: on strings made to break
tokenizers, on many of the first documents of this input, and on one document of every later megabyte or less; one disagreement, and the
reference encodes everything.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from megatron_patch.errors import DataError
from megatron_patch.preprocess.fast_tokenizer import fast_backend
from megatron_patch.preprocess.segments import Cutter, cutter_of, segments
from megatron_patch.raw_text.large_documents import LargeText, whole
from megatron_patch.raw_text.parse_documents import Texts
from megatron_patch.raw_text.readers import Batch, no_scratch
from megatron_patch.tokenizers.base import Tokenizer, load_tokenizer
from megatron_patch.tokenizers.tiktoken import PATTERNS

# Of a document that is compared with the reference: the reference is slow, and most of a run may be long documents.
_CHECKED_CHARS = 500
_CHECKED_AT_START = 32  # documents that each process compares before it is content with one now and then
_CHECKED_EVERY = 1 << 18  # characters, which a batch has unless files are small


def _chars(text: str | LargeText) -> int:
    return len(text) if isinstance(text, str) else sum(map(len, text.pieces()))


class BackendDisagrees(Exception):
    """The fast backend gave other ids than the reference while running."""


@dataclass(frozen=True)
class EncodeSettings:
    """How to encode.

    Args:
        tokenizer_type: as `load_tokenizer` takes it.
        tokenizer_model: its file or folder.
        vocab_file: of GPT2BPETokenizer.
        merge_file: of GPT2BPETokenizer.
        vocab_size: of NullTokenizer.
        eod_token: the end-of-document token, where the usual names do not fit.
        tiktoken_pattern: of TikTokenizer.
        special_tokens: of TikTokenizer.
        keys: JSON keys, with dots for nested ones.
        append_eod: end each document with the end-of-document token.
        prepend_bos: begin each with the beginning-of-sequence token.
        patch_align: pad each document with end-of-document tokens to a multiple of this.
        dtype: of the result, as NumPy names it.
        backend: "auto", "words" or "reference", as `fast_backend` takes it.
        min_chars: shorter texts are left out.
        max_chars: longer ones, too.
        min_tokens: as min_chars, in tokens without those that are added.
        max_tokens: as max_chars.
    """

    tokenizer_type: str
    tokenizer_model: str | None
    vocab_file: str | None = None
    merge_file: str | None = None
    vocab_size: int | None = None
    eod_token: str | None = None
    tiktoken_pattern: str | None = None
    special_tokens: tuple[str, ...] | None = None
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    prepend_bos: bool = False
    patch_align: int = 1
    dtype: str = "uint16"
    backend: str = "auto"
    min_chars: int | None = None
    max_chars: int | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class Part:
    """The documents of one key.

    Args:
        tokens: of all, one after another, with beginning, end and padding.
        lengths: of each.
        file: holds the tokens instead, where a document is long; whoever takes them removes it.
    """

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int64]
    file: str = ""


@dataclass(frozen=True)
class Encoded:
    """A batch, encoded.

    Args:
        source: where it came from.
        file: number of the input.
        upto: the unit of the input behind it.
        share: of the input, that has been read then.
        start: its first byte in the file, where it is known.
        lines: lines of the batch, so that line numbers can be added up.
        bytes: size of the batch.
        parts: one for each key.
        empty: texts without a token, left out.
        filtered: texts too short or too long, left out.
        checked: texts of the fast backend that were compared with the reference.
        largest: of the texts' ids.
        backend: what encoded it: "reference", or the name of what did in its place.
        backend_note: the same in words.
        bad: (line in the batch from 1, first byte in the batch, reason) of lines left out.
    """

    source: str
    file: int
    upto: int
    share: float
    start: int | None
    lines: int
    bytes: int
    parts: tuple[Part, ...]
    empty: int
    filtered: int
    checked: int
    largest: int
    backend: str
    backend_note: str
    bad: tuple[tuple[int, int, str], ...] = field(default_factory=tuple)


def make_tokenizer(settings: EncodeSettings) -> Tokenizer:
    """The reference tokenizer of some settings.

    Raises:
        DataError: as `load_tokenizer`; a tiktoken file without its pattern.
    """
    if settings.tokenizer_type == "TikTokenizer" and settings.tiktoken_pattern is None:
        raise DataError(
            "TikTokenizer without --tiktoken-pattern",
            f"{', '.join(PATTERNS)}, or a regular expression: the file does not hold it",
            "give the pattern that the model was made with",
        )
    return load_tokenizer(
        settings.tokenizer_type,
        settings.tokenizer_model,
        vocab_file=settings.vocab_file,
        merge_file=settings.merge_file,
        vocab_size=settings.vocab_size,
        eod_token=settings.eod_token,
        tiktoken_pattern=settings.tiktoken_pattern,
        special_tokens=settings.special_tokens,
    )


def checked_tokenizer(settings: EncodeSettings) -> Tokenizer:
    """The reference tokenizer, which has the tokens that the settings ask for.

    Raises:
        DataError: it cannot be loaded, or lacks one.
    """
    tokenizer = make_tokenizer(settings)
    if (settings.append_eod or settings.patch_align > 1) and tokenizer.eod_id is None:
        raise DataError(
            f"{tokenizer.name} has no end-of-document token by a usual name",
            "--eod-token NAME, a token of the vocabulary",
            "name it",
        )
    if settings.prepend_bos and tokenizer.bos_id is None:
        raise DataError(f"{tokenizer.name} has no beginning-of-sequence token", "a tokenizer with one", "leave out --prepend-bos")
    return tokenizer


class Encoder:
    """Encodes batches in one process.

    Args:
        settings: how.
        tokenizer: what `checked_tokenizer` gave for them, where it is loaded already.

    Raises:
        DataError: a tokenizer that cannot be loaded or lacks a token that is asked for.
    """

    def __init__(self, settings: EncodeSettings, tokenizer: Tokenizer | None = None) -> None:
        self.settings = settings
        self._empty = self._filtered = self._checked = self._largest = self._checked_before = self._unchecked = 0
        self.tokenizer = tokenizer if tokenizer is not None else checked_tokenizer(settings)
        self.fast, self.backend_note = fast_backend(self.tokenizer, settings.backend)

    def encode(self, texts: Texts) -> Encoded:
        """Encodes a batch that has been read.

        Raises:
            BackendDisagrees: the fast backend is not to be trusted with this input.
            DataError: an id is outside the vocabulary, a long document cannot be read any more, or there is no space for it.
        """
        batch = texts.batch
        self._checked_before += self._checked
        self._empty = self._filtered = self._checked = self._largest = 0
        parts = [self._column(column, batch) for column in texts.columns]
        return Encoded(
            batch.source,
            batch.file,
            batch.upto,
            batch.share,
            batch.start if batch.data is None and not batch.temporary else None,
            texts.lines,
            batch.size,
            tuple(parts),
            self._empty,
            self._filtered,
            self._checked,
            self._largest,
            self.fast.name if self.fast is not None else "reference",
            self.backend_note,
            texts.bad,
        )

    @functools.cached_property
    def _cut(self) -> Cutter | None:
        return cutter_of(self.tokenizer)

    def _column(self, texts: Sequence[str | LargeText], batch: Batch) -> Part:
        """One key's documents; with a long one among them, and where texts can be cut, through a file."""
        try:
            texts = self._wanted(texts)
            if not any(isinstance(text, LargeText) for text in texts) or self._cut is None or not batch.scratch:
                return self._encode(list(map(whole, texts)))
            os.makedirs(batch.scratch, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=batch.scratch, prefix="encoded-", delete=False) as file:
                lengths = self._encode_into(texts, self._cut, cast("BinaryIO", file))
        except EOFError as error:
            raise batch.shorter() from error
        except OSError as error:
            raise no_scratch(batch.scratch, error) from error
        return Part(np.empty(0, self.settings.dtype), lengths, file.name)

    def _encode_into(self, texts: Sequence[str | LargeText], cut: Cutter, file: BinaryIO) -> npt.NDArray[np.int64]:
        """Encodes texts into a file. Returns the documents' lengths."""
        lengths = [np.empty(0, np.int64)]
        for text in texts:
            if isinstance(text, LargeText):
                lengths.append(self._encode_long(text, cut, file))
            else:
                part = self._encode([text])
                file.write(part.tokens.data)
                lengths.append(part.lengths)
        return np.concatenate(lengths)

    def _encode_long(self, text: LargeText, cut: Cutter, file: BinaryIO) -> npt.NDArray[np.int64]:
        """Encodes a text segment by segment into a file. Returns the document's length, or no length where it is left out."""
        start, count, largest, settings = file.tell(), 0, 0, self.settings
        file.write(np.full(int(settings.prepend_bos), self.tokenizer.bos_id or 0, settings.dtype).data)
        for segment in segments(text.pieces(), cut):
            ids, _ = self._ids([segment])
            largest = max(largest, self._largest_of(ids))
            file.write(ids.astype(settings.dtype).data)
            count += ids.size
        least, most = settings.min_tokens, settings.max_tokens
        left_out = (least is not None and count < least) or (most is not None and count > most)
        if left_out or not count:
            self._filtered += int(bool(count))
            self._empty += int(not count)
            file.seek(start)
            file.truncate()
            return np.empty(0, np.int64)
        self._largest = max(self._largest, largest)
        framed = self._framed(np.array([count]))
        file.write(np.full(int(framed[0]) - int(settings.prepend_bos) - count, self.tokenizer.eod_id or 0, settings.dtype).data)
        return framed

    def _wanted(self, texts: Sequence[str | LargeText]) -> list[str | LargeText]:
        """Leaves out what is empty, too short or too long."""
        full = [text for text in texts if text]
        self._empty += len(texts) - len(full)
        least, most = self.settings.min_chars, self.settings.max_chars
        if least is None and most is None:
            return full
        kept = [text for text in full if (least is None or _chars(text) >= least) and (most is None or _chars(text) <= most)]
        self._filtered += len(full) - len(kept)
        return kept

    def _ids(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """The reference's ids; those of the fast backend are compared with it in part."""
        if self.fast is None:
            return self.tokenizer.encode_flat(texts)
        ids, lengths = self.fast.encode_flat(texts)
        self._check(texts, ids, lengths)
        return ids, lengths

    def _encode(self, texts: Sequence[str]) -> Part:
        if not texts:
            return Part(np.empty(0, self.settings.dtype), np.empty(0, np.int64))
        ids, lengths = self._ids(texts)
        full = lengths > 0
        self._empty += int((~full).sum())
        kept = full
        if self.settings.min_tokens is not None:
            kept = kept & (lengths >= self.settings.min_tokens)
        if self.settings.max_tokens is not None:
            kept = kept & (lengths <= self.settings.max_tokens)
        self._filtered += int((full & ~kept).sum())
        if not kept.all():
            ids, lengths = ids[np.repeat(kept, lengths)], lengths[kept]
        return self.frame(ids, lengths)

    def _check(self, texts: Sequence[str], ids: npt.NDArray[np.uint32], lengths: npt.NDArray[np.int64]) -> None:
        """Compares documents with the reference: many at first, then one now and then; of a long one a part, encoded once more."""
        self._unchecked += sum(map(len, texts))
        count = max(_CHECKED_AT_START - self._checked_before - self._checked, int(self._unchecked >= _CHECKED_EVERY))
        if count <= 0:
            return
        self._unchecked, count = 0, min(count, len(texts))
        for number in [(2 * place + 1) * len(texts) // (2 * count) for place in range(count)]:
            start = int(lengths[:number].sum())
            text, mine = texts[number], ids[start : start + int(lengths[number])]
            if len(text) > _CHECKED_CHARS:
                # Each time another part: what is rare stands anywhere.
                begin = (self._checked_before + self._checked) * 7919 % (len(text) - _CHECKED_CHARS + 1)
                text = text[begin : begin + _CHECKED_CHARS]
                mine = self.fast.encode_flat([text])[0] if self.fast is not None else mine
            if not np.array_equal(mine, self.tokenizer.encode_flat([text])[0]):
                raise BackendDisagrees(text[:200])
            self._checked += 1

    def _largest_of(self, ids: npt.NDArray[np.uint32]) -> int:
        """The largest of some ids, which are not yet of the dataset's type.

        Raises:
            DataError: it is outside the vocabulary, and might not fit.
        """
        largest = int(ids.max(initial=0))
        if largest >= self.tokenizer.vocab_size:
            raise DataError(
                f"{self.tokenizer.name} gave the id {largest}",
                f"ids below the size of its vocabulary, {self.tokenizer.vocab_size}",
                "repair the tokenizer's files",
            )
        return largest

    def _framed(self, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Lengths with beginning, end and padding."""
        framed = lengths + int(self.settings.prepend_bos) + int(self.settings.append_eod)
        return -(-framed // self.settings.patch_align) * self.settings.patch_align

    def frame(self, ids: npt.NDArray[np.uint32], lengths: npt.NDArray[np.int64]) -> Part:
        """Puts each document between its beginning and end tokens and pads it to whole patches.

        Args:
            ids: of all documents, one after another.
            lengths: of each.
        """
        settings = self.settings
        self._largest = max(self._largest, self._largest_of(ids))
        begin = int(settings.prepend_bos)
        framed = self._framed(lengths)
        starts = np.cumsum(framed) - framed
        behind = framed - lengths - begin
        tokens = np.full(int(framed.sum()), self.tokenizer.eod_id if self.tokenizer.eod_id is not None else 0, dtype=settings.dtype)
        text = np.ones(tokens.size, bool)
        text[np.repeat(starts + begin + lengths - (np.cumsum(behind) - behind), behind) + np.arange(int(behind.sum()))] = False
        if begin:
            text[starts] = False
            tokens[starts] = self.tokenizer.bos_id
        tokens[text] = ids
        return Part(tokens, framed)
