"""Finds text that a tokenizer loses: what its ids do not give back. In: a tokenizer, a text, the text's ids. Out: what is missing.

A byte-level tokenizer gives back every byte. What others do by their own definition is no fault: normalization (NFC, lower case), white
space that a pre-tokenizer removes or that a token takes up, the space that SentencePiece puts before a text. Such a tokenizer is compared
with its own normalized text, letter by letter. A character for which a model has only its unknown token is counted apart.

Where ids stand for bytes (byte_counts.py), every document is looked at; unknown tokens are counted in every document, too. Everything else
is found by comparing samples.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from megatron_patch.errors import DataError
from megatron_patch.tokenizers.base import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from megatron_patch.tokenizers.byte_counts import ByteCounts, make_byte_counts, may_be_spaces
from megatron_patch.tokenizers.byte_level import byte_letters
from megatron_patch.tokenizers.fuzz_strings import added_tokens, adversarial_strings, characters_with_spaces, common_strings, token_strings
from megatron_patch.tokenizers.tiktoken import PATTERNS, TikTokenizer
from megatron_patch.utils.console import shortened
from megatron_patch.utils.units import plural

_SPACE = "▁"
_SHOWN_CHARS = 60
_SHOWN_BEFORE = 20  # characters before the first one that was lost
_SHOWN_LETTERS = 8
_EXAMPLE_CHARS = 12
_COUNTS = ("documents", "counted", "compared", "unknown", "incomplete", "without_tokens")


@dataclass(frozen=True)
class Loss:
    """What the ids of one text do not give back.

    Args:
        lost: the characters that are missing, each as often as it is missing.
        unknown: whether an id is the unknown token, which stands for characters that the vocabulary lacks.
        excerpt: the text around the first missing character.
    """

    lost: str = ""
    unknown: bool = False
    excerpt: str = ""

    @property
    def letters(self) -> str:
        """The missing characters that are not white space."""
        return "".join(self.lost.split())


@dataclass(frozen=True)
class TextChecks:
    """What was found about the texts of documents, and what their ids give back.

    Args:
        documents: documents that were encoded.
        counted: of these, those whose bytes were all counted.
        compared: those of which a part was compared, because their bytes cannot be counted.
        unknown: documents with characters that the tokenizer does not know: their ids hold its unknown token.
        incomplete: counted or compared documents with other characters than white space that the tokenizer leaves out without any token.
        without_tokens: documents that have text other than white space but no token; all documents are looked at.
        example: an incomplete document, around the first character that is left out.
        example_without_tokens: the start of a document without tokens.
    """

    documents: int = 0
    counted: int = 0
    compared: int = 0
    unknown: int = 0
    incomplete: int = 0
    without_tokens: int = 0
    example: str = ""
    example_without_tokens: str = ""

    def __add__(self, other: TextChecks) -> TextChecks:
        counts = {name: getattr(self, name) + getattr(other, name) for name in _COUNTS}
        examples = {name: getattr(self, name) or getattr(other, name) for name in ("example", "example_without_tokens")}
        return TextChecks(**counts, **examples)

    def as_one_document(self) -> TextChecks:
        """Returns the checks of a document, given the sum of those of its parts."""
        return replace(self, **{name: min(1, getattr(self, name)) for name in _COUNTS})

    def sentences(self) -> list[str]:
        """Returns what the user needs to know, one sentence for each problem that was found."""
        found = []
        if self.unknown:
            documents = plural(self.documents, "document")
            found.append(
                f"{self.unknown:,} of {documents} hold characters that the tokenizer does not know (they become its unknown token)"
            )
        if self.incomplete:
            documents = plural(self.counted, "document") if self.counted else plural(self.compared, "compared document")
            left_out = "hold characters that the tokenizer leaves out without a token"
            found.append(f"{self.incomplete:,} of {documents} {left_out}, such as in {self.example!r}")
        if self.without_tokens:
            documents = plural(self.without_tokens, "document")
            found.append(f"the tokenizer has no token for the text of {documents}, such as {self.example_without_tokens!r}")
        return found


class RoundTrip:
    """Compares texts with what their ids give back.

    Args:
        tokenizer: the tokenizer.

    Attributes:
        applies: whether its ids can be read here: it is one of Hugging Face's, SentencePiece's or tiktoken's. Otherwise nothing is found.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.applies = isinstance(tokenizer, (HuggingFaceTokenizer, SentencePieceTokenizer, TikTokenizer))
        self._unknown: int | None = None
        self._added: dict[int, str] = {}
        if isinstance(tokenizer, SentencePieceTokenizer):
            self._unknown = int(tokenizer.backend.unk_id())
        elif isinstance(tokenizer, HuggingFaceTokenizer):
            self._unknown = _unknown_id(tokenizer.backend)
            self._added = {number: token.content for number, token in tokenizer.backend.get_added_tokens_decoder().items()}
            self._bytes = {letter: byte for byte, letter in enumerate(byte_letters())} if _is_byte_level(tokenizer.backend) else {}

    @functools.cached_property
    def _counts(self) -> ByteCounts | None:
        return make_byte_counts(self._tokenizer)

    @property
    def counts_all(self) -> bool:
        """Whether `count` finds every loss: comparing samples would find nothing more."""
        return self._counts is not None

    def count(self, texts: Sequence[str], ids: npt.NDArray[np.uint32], lengths: npt.NDArray[np.int64]) -> TextChecks:
        """Counts the texts with unknown tokens and, where bytes can be counted, those that lose other characters than white space.

        Args:
            texts: the texts.
            ids: their ids, one after another.
            lengths: int64, the number of ids of each text.

        Raises:
            DataError: the pattern of a TikTokenizer loses a part of a text.
        """
        checks = TextChecks(documents=len(texts), unknown=self._count_unknown(texts, ids, lengths))
        if self._counts is None:
            return checks
        ends = np.cumsum(lengths)
        incomplete, example = 0, ""
        for index, count in self._counts.lost(texts, ids, lengths).items():
            text = texts[index]
            sure = not may_be_spaces(text, count)
            if isinstance(self._tokenizer, TikTokenizer) or not sure or not example:
                loss = self.loss(text, ids[int(ends[index] - lengths[index]) : int(ends[index])].tolist())
                if isinstance(self._tokenizer, TikTokenizer):
                    raise lost_text(self._tokenizer, loss)
                sure, example = sure or bool(loss.letters), example or loss.excerpt
            incomplete += sure
        return checks + TextChecks(counted=len(texts), incomplete=incomplete, example=example)

    def _count_unknown(self, texts: Sequence[str], ids: npt.NDArray[np.uint32], lengths: npt.NDArray[np.int64]) -> int:
        if self._unknown is None:
            return 0
        found = np.searchsorted(np.cumsum(lengths), np.flatnonzero(ids == self._unknown), side="right")
        return sum(self._holds_unknown(texts[index], count) for index, count in collections.Counter(found.tolist()).items())

    def _holds_unknown(self, text: str, count: int) -> bool:
        """Returns whether so many unknown tokens are more than a text names itself."""
        if isinstance(self._tokenizer, HuggingFaceTokenizer):
            return count > text.count(str(self._tokenizer.backend.id_to_token(self._unknown)))
        return count > 0

    def loss(self, text: str, ids: Sequence[int]) -> Loss:
        """Returns what the ids of a text do not give back."""
        if isinstance(self._tokenizer, TikTokenizer):
            given = self._tokenizer.decode(ids)
            return Loss(missing(text, given), excerpt=_around_difference(text, given))
        if isinstance(self._tokenizer, SentencePieceTokenizer):
            return self._sentencepiece_loss(self._tokenizer.backend, text, ids)
        if isinstance(self._tokenizer, HuggingFaceTokenizer):
            return self._hugging_face_loss(self._tokenizer.backend, text, ids)
        return Loss()

    def _sentencepiece_loss(self, backend: Any, text: str, ids: Sequence[int]) -> Loss:
        if self._unknown in ids:
            return Loss(unknown=True)
        pieces = ((str(backend.id_to_piece(token)), backend.is_byte(token)) for token in map(int, ids))
        # A byte is written as <0x41>.
        data = b"".join(bytes([int(piece[3:-1], 16)]) if is_byte else piece.encode() for piece, is_byte in pieces)
        given = data.decode("utf-8", "replace")
        normalized = str(backend.normalize(text))
        lost = missing(normalized, given).replace(_SPACE, " ")
        # Normalization may have joined spaces, or have removed them.
        lost = lost or " " * (_count_spaces(text) - _count_spaces(given.replace(_SPACE, " ")))
        return Loss(lost, excerpt=_around_lost_letter(normalized, given) if lost.strip() else "")

    def _hugging_face_loss(self, backend: Any, text: str, ids: Sequence[int]) -> Loss:
        if self._unknown is not None and self._holds_unknown(text, list(ids).count(self._unknown)):
            return Loss(unknown=True)
        if self._bytes:
            normalized, given = _normalized(backend, text), _normalized(backend, self._byte_level_text(backend, ids))
            lost = missing(normalized, given)
            return Loss(lost, excerpt=_around_lost_letter(normalized, given) if lost.strip() else "")
        # Where each token stands in the text: normalization and prefixes of pieces change the tokens, but not their places.
        covered = bytearray(len(text))
        for start, end in backend.encode(text, add_special_tokens=False).offsets:
            covered[start:end] = b"\1" * (end - start)
        # What normalization removes, such as accents and control characters, is no loss.
        kept = set(_normalized(backend, text))
        uncovered = [index for index, seen in enumerate(covered) if not seen]
        left_out = [index for index in uncovered if text[index] in kept or _normalized(backend, text[index]).strip()]
        first = next((index for index in left_out if not text[index].isspace()), None)
        return Loss("".join(text[index] for index in left_out), excerpt="" if first is None else _around(text, first))

    def _byte_level_text(self, backend: Any, ids: Sequence[int]) -> str:
        """Returns the text of the ids of a byte-level tokenizer. `Tokenizer.decode` would read the letters of an added token as bytes."""
        data = bytearray()
        for token in map(int, ids):
            if token in self._added:
                data += self._added[token].encode()
                continue
            piece = str(backend.id_to_token(token))
            data += bytes(self._bytes[letter] for letter in piece) if all(letter in self._bytes for letter in piece) else piece.encode()
        return data.decode("utf-8", "replace")


def missing(expected: str, given: str) -> str:
    """Returns the characters of a text that another one lacks, each as often as it is missing, in the order of their first occurrence."""
    if expected == given:
        return ""
    return "".join((collections.Counter(expected) - collections.Counter(given)).elements())


def _around_difference(text: str, given: str) -> str:
    """Returns a text around its first character that is not in what was given back; empty if the two are equal."""
    if text == given:
        return ""
    return _around(text, next((index for index, letter in enumerate(text) if given[index : index + 1] != letter), 0))


def _around_lost_letter(text: str, given: str) -> str:
    """Returns a text around its first character, other than white space, that is not in what was given back."""
    letters = [index for index, letter in enumerate(text) if not letter.isspace()]
    kept = "".join(given.split())
    return _around(text, next((index for place, index in enumerate(letters) if kept[place : place + 1] != text[index]), 0))


def _around(text: str, index: int) -> str:
    """Returns a part of a text around a character, for a message."""
    start = 0 if len(text) <= _SHOWN_CHARS else max(0, index - _SHOWN_BEFORE)
    return ("…" if start else "") + shortened(text[start:], _SHOWN_CHARS)


def _count_spaces(text: str) -> int:
    return sum(map(str.isspace, text))


def _unknown_id(backend: Any) -> int | None:
    """Returns the id that the model of a tokenizer of the library `tokenizers` gives to what it does not know."""
    token = getattr(backend.model, "unk_token", None)
    if token is not None:
        found = backend.token_to_id(token)
        return int(found) if found is not None else None
    if type(backend.model).__name__ != "Unigram":
        return None
    found = orjson.loads(backend.to_str())["model"].get("unk_id")
    return int(found) if found is not None else None


def _normalized(backend: Any, text: str) -> str:
    return text if backend.normalizer is None else str(backend.normalizer.normalize_str(text))


def _is_byte_level(backend: Any) -> bool:
    """Returns whether the pieces of a tokenizer of the library `tokenizers` are letters that stand for bytes."""
    own = backend.pre_tokenizer
    return own is not None and '"ByteLevel"' in own.__getstate__().decode()


def check_round_trip(tokenizer: Tokenizer) -> str:
    """Encodes strings that are hard for tokenizers, and compares them with what their ids give back.

    Returns:
        A note about what the tokenizer leaves out by its own definition; empty if it gives everything back.

    Raises:
        DataError: the pattern of a TikTokenizer loses text, or the ids of a text differ from one loading of the tokenizer to the next.
    """
    round_trip = RoundTrip(tokenizer)
    if not round_trip.applies:
        return ""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        _check_added_tokens(tokenizer)
    # What a pattern loses may depend on what stands next to it.
    texts = common_strings() if isinstance(tokenizer, TikTokenizer) else adversarial_strings(count=100)
    texts = [*texts, *token_strings(added_tokens(tokenizer), count=50)]
    if isinstance(tokenizer, TikTokenizer) and tokenizer.pattern not in PATTERNS.values():
        texts += characters_with_spaces()  # fastokens keeps what a pattern does not match, so that nobody would notice
    try:
        with _without_threads():
            ids, lengths = tokenizer.encode_flat(texts)
        rows = np.split(ids, np.cumsum(lengths)[:-1])
        losses = [(text, round_trip.loss(text, row.tolist())) for text, row in zip(texts, rows, strict=True)]
    except DataError as error:
        return f"it fails for some strings of special tokens: {error.what}"
    if isinstance(tokenizer, TikTokenizer):
        if lost := "".join(loss.lost for _, loss in losses):
            # The shortest example, but of more than one word.
            examples = [(len(text) < _EXAMPLE_CHARS, len(text), loss.excerpt) for text, loss in losses if loss.lost]
            raise lost_text(tokenizer, Loss(lost, excerpt=min(examples)[-1]))
        return ""
    return _note(losses, spaces_alone=not any(loss.letters for _, loss in losses))


@contextlib.contextmanager
def _without_threads() -> Iterator[None]:
    """A context in which `tokenizers` starts no threads: a worker that is forked while other threads run may hang."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _check_added_tokens(tokenizer: HuggingFaceTokenizer) -> None:
    """Checks that no two added tokens are looked for as the same text: the library would take either, by the order in a random hash table.

    Raises:
        DataError: two are.
    """
    normalizer = tokenizer.backend.normalizer
    found: dict[str, str] = {}
    for token in tokenizer.backend.get_added_tokens_decoder().values():
        if normalizer is None or not token.normalized:
            continue
        other = found.setdefault(normalizer.normalize_str(token.content), token.content)
        if other != token.content:
            raise DataError(
                f"{tokenizer.name}: the added tokens {other!r} and {token.content!r} are the same text after normalization, so that "
                "the ids of a text change from one loading of the tokenizer to the next",
                "added tokens that differ after normalization",
                "set normalized to false for one of them, in the tokenizer's files",
            )


def _note(losses: Sequence[tuple[str, Loss]], spaces_alone: bool) -> str:
    lost = "".join(loss.lost for _, loss in losses)
    if not lost:
        return ""
    if spaces_alone:
        return "by its own definition the tokenizer does not give back all white space"
    return f"by its own definition the tokenizer leaves out some characters without a token, such as {_letters(lost)}"


def _letters(lost: str) -> str:
    """Returns some of the characters that were lost, for a message: spaces, ASCII letters and digits first."""
    different = sorted(dict.fromkeys(lost), key=lambda letter: (letter != " ", not letter.isascii(), not letter.isalnum()))
    return ", ".join(map(repr, different[:_SHOWN_LETTERS]))


def lost_text(tokenizer: Tokenizer, loss: Loss) -> DataError:
    """Returns the error for characters that a pattern loses."""
    return DataError(
        f"--tiktoken-pattern loses text, such as {_letters(loss.lost)}: the ids of {loss.excerpt!r} do not give it back ({tokenizer.name})",
        "a pattern that matches every character",
        "give the pattern that the tokenizer was made with, by its name or as a regular expression",
    )
