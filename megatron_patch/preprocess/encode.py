"""Encodes the texts of a batch as token arrays, in a worker.

In: a `ParsedBatch`. Out: an `EncodedBatch`: for each key the ids of all documents and the documents' lengths, with beginning, end and
padding tokens added, and what was left out. A fast encoder (fast_encoder.py) encodes as long as it agrees with the reference tokenizer:
on adversarial strings, on the first documents of this input, and then on one document about every 262,000 characters. After a single
disagreement the reference encodes everything. Text that the ids do not give back is counted: in every document where ids stand for bytes,
else in the same samples (tokenizers/round_trip.py).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_patch.errors import DataError
from megatron_patch.preprocess.fast_encoder import make_fast_encoder
from megatron_patch.preprocess.segments import SplitPoint, segments, split_point_of
from megatron_patch.raw_text.large_documents import LargeText, load_text
from megatron_patch.raw_text.parse_documents import ParsedBatch
from megatron_patch.tokenizers.base import Flat, Tokenizer, load_tokenizer, require_special_tokens
from megatron_patch.tokenizers.library_errors import failures_as
from megatron_patch.tokenizers.round_trip import RoundTrip, TextChecks
from megatron_patch.tokenizers.tiktoken import PATTERNS
from megatron_patch.utils.console import shortened
from megatron_patch.utils.files import reason

# Largest part of one document to compare with the reference, which is slow.
_CHECKED_CHARS = 500
_CHECKED_AT_START = 32  # documents that each process compares before it compares one per `_CHECKED_EVERY` characters
_CHECKED_EVERY = 1 << 18  # characters between two comparisons; a batch has more unless its files are small


def _count_chars(text: str | LargeText) -> int:
    return len(text) if isinstance(text, str) else sum(map(len, text.pieces()))


class FastEncoderDisagrees(Exception):
    """The fast encoder failed during a run, or returned other ids than the reference tokenizer. The argument says what it did."""


@dataclass(frozen=True)
class EncodeSettings:
    """How to encode.

    Args:
        tokenizer_type: the kind of tokenizer, as for `load_tokenizer`.
        tokenizer_model: the tokenizer's file or folder.
        vocab_file: vocab.json of GPT2BPETokenizer.
        merge_file: merges.txt of GPT2BPETokenizer.
        vocab_size: vocabulary size of NullTokenizer.
        eod_token: the end-of-document token, where the tokenizer's files do not name it.
        bos_token: the beginning-of-sequence token, where the tokenizer's files do not name it.
        tiktoken_pattern: pattern by which TikTokenizer splits text.
        special_tokens: special tokens of TikTokenizer.
        keys: JSON keys that hold the text, with dots for nested keys.
        append_eod: ends each document with the end-of-document token.
        prepend_bos: begins each document with the beginning-of-sequence token.
        patch_align: pads each document with end-of-document tokens to a multiple of this many tokens.
        dtype: NumPy name of the dtype of the token ids.
        backend: "auto" or "reference"; `make_fast_encoder` explains them.
        min_chars: documents with fewer characters are left out.
        max_chars: documents with more characters are left out.
        min_tokens: documents with fewer tokens are left out; added tokens do not count.
        max_tokens: documents with more tokens are left out; added tokens do not count.
        keep_empty: documents without a token are kept, without sequences, as Megatron's tool keeps them.
    """

    tokenizer_type: str
    tokenizer_model: str | None
    vocab_file: str | None = None
    merge_file: str | None = None
    vocab_size: int | None = None
    eod_token: str | None = None
    bos_token: str | None = None
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
    keep_empty: bool = False


@dataclass(frozen=True)
class EncodedColumn:
    """The encoded documents of one key.

    Args:
        tokens: tokens of all documents, one after another, with added tokens.
        lengths: int64, the number of tokens of each document.
    """

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int64]


@dataclass(frozen=True)
class EncodedBatch:
    """An encoded batch.

    Args:
        source: the path of its input.
        file: index of the input.
        next_unit: the unit of the input after the batch.
        fraction: share of the input that has been read after the batch, from 0 to 1.
        start: the first byte of the batch in its file; None if it is not known.
        lines: lines of the batch, to compute the line numbers of later batches.
        bytes: size of the batch.
        columns: one for each key.
        empty: documents without a token and without text other than white space, left out unless they are to be kept.
        filtered: documents that are too short or too long, left out.
        checked: documents for which the fast encoder was compared with the reference.
        text_checks: what comparing documents with what their ids give back found; among it, the documents that have text but no token.
        largest: the largest id of the texts.
        backend: "reference", or the name of the fast encoder.
        encoder_note: the note of `make_fast_encoder`.
        bad: (line in the batch from 1, first byte in the batch, reason) of each line that is left out.
    """

    source: str
    file: int
    next_unit: int
    fraction: float
    start: int | None
    lines: int
    bytes: int
    columns: tuple[EncodedColumn, ...]
    empty: int
    filtered: int
    checked: int
    text_checks: TextChecks
    largest: int
    backend: str
    encoder_note: str
    bad: tuple[tuple[int, int, str], ...] = field(default_factory=tuple)


def make_tokenizer(settings: EncodeSettings) -> Tokenizer:
    """Loads the reference tokenizer.

    Raises:
        DataError: as `load_tokenizer`; TikTokenizer without its pattern.
    """
    if settings.tokenizer_type == "TikTokenizer" and settings.tiktoken_pattern is None:
        raise DataError(
            "TikTokenizer needs --tiktoken-pattern, which its file does not contain",
            f"{', '.join(PATTERNS)}, or a regular expression",
            "give the pattern that the tokenizer was trained with",
        )
    return load_tokenizer(
        settings.tokenizer_type,
        settings.tokenizer_model,
        vocab_file=settings.vocab_file,
        merge_file=settings.merge_file,
        vocab_size=settings.vocab_size,
        eod_token=settings.eod_token,
        bos_token=settings.bos_token,
        tiktoken_pattern=settings.tiktoken_pattern,
        special_tokens=settings.special_tokens,
    )


def load_checked_tokenizer(settings: EncodeSettings) -> Tokenizer:
    """Loads the reference tokenizer and checks that it has the special tokens that the settings require.

    Raises:
        DataError: it cannot be loaded, or lacks a special token.
    """
    tokenizer = make_tokenizer(settings)
    require_special_tokens(tokenizer, eod=settings.append_eod or settings.patch_align > 1, bos=settings.prepend_bos)
    return tokenizer


def lengths_with_special_tokens(settings: EncodeSettings, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns documents' lengths with beginning, end and padding tokens. As in Megatron, no end follows where there is no token.

    Args:
        settings: which tokens are added.
        lengths: int64, the number of ids of each document.
    """
    begun = lengths + int(settings.prepend_bos)
    delimited = begun + (begun > 0) * int(settings.append_eod)
    return -(-delimited // settings.patch_align) * settings.patch_align


class Encoder:
    """Encodes batches in one process.

    Args:
        settings: how to encode.
        tokenizer: the tokenizer that `load_checked_tokenizer` returned for these settings; None: it is loaded here.

    Raises:
        DataError: as `load_checked_tokenizer`.
    """

    def __init__(self, settings: EncodeSettings, tokenizer: Tokenizer | None = None) -> None:
        self.settings = settings
        self._empty = self._filtered = self._checked = self._largest = self._comparisons = self._unchecked = 0
        self._text_checks = TextChecks()
        self.tokenizer = tokenizer if tokenizer is not None else load_checked_tokenizer(settings)
        self._round_trip = RoundTrip(self.tokenizer)
        self.fast_encoder, self.encoder_note = make_fast_encoder(self.tokenizer, settings.backend)

    def encode(self, parsed: ParsedBatch) -> EncodedBatch:
        """Encodes a batch.

        Raises:
            FastEncoderDisagrees: the fast encoder fails, or gives other ids than the reference for this input.
            DataError: an id is outside the vocabulary, a pattern loses text, or a large document cannot be read any more.
        """
        batch = parsed.batch
        self._empty = self._filtered = self._checked = self._largest = 0
        self._text_checks = TextChecks()
        try:
            columns = tuple(map(self._column, parsed.columns))
        except EOFError as error:
            raise batch.became_shorter() from error
        except OSError as error:
            raise batch.unreadable(error) from error
        return EncodedBatch(
            batch.source,
            batch.file,
            batch.next_unit,
            batch.fraction,
            batch.start if batch.data is None else None,
            parsed.lines,
            batch.size,
            columns,
            self._empty,
            self._filtered,
            self._checked,
            self._text_checks,
            self._largest,
            self.fast_encoder.name if self.fast_encoder is not None else "reference",
            self.encoder_note,
            parsed.bad,
        )

    @functools.cached_property
    def _split_point(self) -> SplitPoint | None:
        return split_point_of(self.tokenizer)

    def _column(self, texts: Sequence[str | LargeText]) -> EncodedColumn:
        """Encodes the documents of one key."""
        texts = self._select(texts)
        if len(texts) == 1 and isinstance(texts[0], LargeText) and self._split_point is not None:
            return self._encode_large(texts[0], self._split_point)
        return self._encode([load_text(text) for text in texts])

    def _encode_large(self, text: LargeText, split_point: SplitPoint) -> EncodedColumn:
        """Encodes a large text segment by segment, so that only its ids are held in memory."""
        settings, count, largest = self.settings, 0, 0
        others, self._text_checks = self._text_checks, TextChecks()
        tokens = bytearray(np.full(int(settings.prepend_bos), self.tokenizer.bos_id or 0, settings.dtype).tobytes())
        start = ""
        for segment in segments(text.pieces(), split_point):
            start = start or segment.strip()
            ids, _ = self._ids([segment])
            largest = max(largest, self._largest_id(ids))
            tokens += ids.astype(settings.dtype).data
            count += ids.size
        self._text_checks = others + self._text_checks.as_one_document()
        if not self._keep(np.array([count]), [start]).all():
            return EncodedColumn(np.empty(0, settings.dtype), np.empty(0, np.int64))
        self._largest = max(self._largest, largest)
        length = lengths_with_special_tokens(settings, np.array([count]))
        padding = int(length[0]) - int(settings.prepend_bos) - count
        tokens += np.full(padding, self.tokenizer.eod_id or 0, settings.dtype).tobytes()
        return EncodedColumn(np.frombuffer(tokens, settings.dtype), length)

    def _select(self, texts: Sequence[str | LargeText]) -> list[str | LargeText]:
        """Leaves out texts that are too short or too long, and empty ones unless they are to be kept."""
        full = [text for text in texts if text or self.settings.keep_empty]
        self._empty += len(texts) - len(full)
        least, most = self.settings.min_chars, self.settings.max_chars
        if least is None and most is None:
            return full
        kept = [text for text in full if (least is None or _count_chars(text) >= least) and (most is None or _count_chars(text) <= most)]
        self._filtered += len(full) - len(kept)
        return kept

    def _ids(self, texts: Sequence[str]) -> Flat:
        """Encodes texts, and counts those that lose text. Some of the results are compared with the reference, and with the texts."""
        ids, lengths = self._encode_unchecked(texts)
        self._text_checks += self._round_trip.count(texts, ids, lengths)
        self._check(texts, ids, lengths)
        return ids, lengths

    def _encode_unchecked(self, texts: Sequence[str]) -> Flat:
        """Returns the ids of the fast encoder, or else of the reference tokenizer."""
        if self.fast_encoder is None:
            return self.tokenizer.encode_flat(texts)
        with failures_as(lambda error: FastEncoderDisagrees(f"failed: {reason(error)}")):
            return self.fast_encoder.encode_flat(texts)

    def _count_without_tokens(self, text: str) -> None:
        """Counts a document without tokens: as empty if it has nothing but white space."""
        if text.strip():
            self._text_checks += TextChecks(without_tokens=1, example_without_tokens=shortened(text, 60))
        else:
            self._empty += 1

    def _encode(self, texts: Sequence[str]) -> EncodedColumn:
        if not texts:
            return EncodedColumn(np.empty(0, self.settings.dtype), np.empty(0, np.int64))
        ids, lengths = self._ids(texts)
        kept = self._keep(lengths, texts)
        if not kept.all():
            ids, lengths = ids[np.repeat(kept, lengths)], lengths[kept]
        return self.add_special_tokens(ids, lengths)

    def _keep(self, lengths: npt.NDArray[np.int64], texts: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Returns which documents are kept, by the number of their ids; counts those that are left out or have no ids.

        Args:
            lengths: int64, the number of ids of each document.
            texts: the text of each document; of a large one its start.
        """
        full = (lengths > 0) | self.settings.keep_empty
        kept = full
        if self.settings.min_tokens is not None:
            kept = kept & (lengths >= self.settings.min_tokens)
        if self.settings.max_tokens is not None:
            kept = kept & (lengths <= self.settings.max_tokens)
        self._filtered += int((full & ~kept).sum())
        for index in np.flatnonzero((lengths == 0) & (kept | ~full)).tolist():
            self._count_without_tokens(texts[index])
        return kept

    def _check(self, texts: Sequence[str], ids: npt.NDArray[np.uint32], lengths: npt.NDArray[np.int64]) -> None:
        """Compares documents with the reference and with what their ids give back: many at the start, then one per `_CHECKED_EVERY`
        characters; of a long one only a part.
        """
        if not self._round_trip.applies:
            return
        self._unchecked += sum(map(len, texts))
        before = self._comparisons
        count = max(_CHECKED_AT_START - before, int(self._unchecked >= _CHECKED_EVERY))
        if count <= 0:
            return
        self._unchecked, count = 0, min(count, len(texts))
        self._comparisons += count
        ends = np.cumsum(lengths)
        for turn in range(count):
            index = (2 * turn + 1) * len(texts) // (2 * count)
            text, found = texts[index], ids[int(ends[index] - lengths[index]) : int(ends[index])]
            if len(text) > _CHECKED_CHARS:
                # Another part each time, because rare text may be anywhere.
                begin = (before + turn) * 7919 % (len(text) - _CHECKED_CHARS + 1)
                text = text[begin : begin + _CHECKED_CHARS]
                found = self._encode_unchecked([text])[0]
            if self.fast_encoder is not None:
                if not np.array_equal(found, self.tokenizer.encode_flat([text])[0]):
                    raise FastEncoderDisagrees(f"returned other ids than the reference tokenizer for {text[:200]!r}")
                self._checked += 1
            if not self._round_trip.counts_all:
                loss = self._round_trip.loss(text, found.tolist())
                self._text_checks += TextChecks(compared=1, incomplete=int(bool(loss.letters)), example=loss.excerpt)

    def _largest_id(self, ids: npt.NDArray[np.uint32]) -> int:
        """Returns the largest id, before ids are converted to the dataset's dtype.

        Raises:
            DataError: it is outside the vocabulary, so it may not fit the dtype.
        """
        largest = int(ids.max(initial=0))
        if largest >= self.tokenizer.vocab_size:
            raise DataError(
                f"{self.tokenizer.name} returned the id {largest}",
                f"ids below {self.tokenizer.vocab_size}, the size of its vocabulary",
                "check the tokenizer's files: vocabulary and special tokens do not match",
            )
        return largest

    def add_special_tokens(self, ids: npt.NDArray[np.uint32], lengths: npt.NDArray[np.int64]) -> EncodedColumn:
        """Adds beginning and end tokens to each document, and pads it to a multiple of `patch_align` tokens, according to the settings.

        Args:
            ids: token ids of all documents, one after another.
            lengths: int64, the number of ids of each document.
        """
        settings = self.settings
        self._largest = max(self._largest, self._largest_id(ids))
        begin = int(settings.prepend_bos)
        padded = lengths_with_special_tokens(settings, lengths)
        starts = np.cumsum(padded) - padded
        after = padded - lengths - begin
        tokens = np.full(int(padded.sum()), self.tokenizer.eod_id if self.tokenizer.eod_id is not None else 0, dtype=settings.dtype)
        text = np.ones(tokens.size, bool)
        text[np.repeat(starts + begin + lengths - (np.cumsum(after) - after), after) + np.arange(int(after.sum()))] = False
        if begin:
            text[starts] = False
            tokens[starts] = self.tokenizer.bos_id
        tokens[text] = ids
        return EncodedColumn(tokens, padded)
