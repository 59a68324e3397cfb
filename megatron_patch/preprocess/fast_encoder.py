"""The fast encoder in place of the reference tokenizer: `fastokens` or, for SentencePiece, the word cache (word_cache.py).

In: a reference tokenizer. Out: an encoder with the same results, or None and the reason. On web-sized documents `fastokens` takes a
fraction of the CPU time of the reference libraries, once it is loaded: 1/100 for Llama-3, 1/120 or less for Qwen3, 1/6 for Mistral's
SentencePiece BPE (benchmarks/results/preprocess_encoders-cpu-2026-11-30.json).

Two things keep the ids right. The encoder must agree with the reference on the strings of tokenizers/fuzz_strings.py before it is used,
among them the tokenizer's own added tokens. And some texts go to the reference one by one, because fastokens is known to err there: those
that contain a piece of the vocabulary that no merges produce (such as <0x0A>, the name of a byte, which fastokens would read as the byte),
an added token that it may find elsewhere (added_tokens.py), or U+180E, which some of its patterns take for white space.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import orjson

from megatron_patch.errors import DataError
from megatron_patch.preprocess.added_tokens import ambiguous_tokens
from megatron_patch.preprocess.segments import has_known_pattern
from megatron_patch.preprocess.word_cache import WordCache, is_built, supports
from megatron_patch.tokenizers.base import Flat, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from megatron_patch.tokenizers.byte_level import byte_letters
from megatron_patch.tokenizers.fuzz_strings import every_code_point, start_strings
from megatron_patch.tokenizers.library_errors import is_library_failure
from megatron_patch.tokenizers.sentencepiece import replaces_spaces_alone, sentencepiece_json
from megatron_patch.tokenizers.tiktoken import TikTokenizer
from megatron_patch.utils.console import shortened

Array = npt.NDArray[np.uint32]
_MAX_SEARCHED_PIECES = 2000
_SHOWN_TOKENS = 3
# Mongolian vowel separator: white space until Unicode 6.3, and still in some libraries of regular expressions.
_FORMER_SPACE = "\u180e"
_TextTest = Callable[[str], bool]


class Untrusted(Exception):
    """A fast encoder is known to give other ids than the reference for a class of tokenizers. The argument says why."""


class FastokensEncoder:
    """Encodes with fastokens; the ids are those of the reference tokenizer.

    Args:
        tokenizer: the reference.

    Attributes:
        ambiguous: added tokens that fastokens may find elsewhere; the reference encodes the texts that contain one.

    Raises:
        TypeError: fastokens has no format for this tokenizer.
        Untrusted: fastokens errs for this class of tokenizers.
        Exception: whatever fastokens raises when it cannot load it.
    """

    name = "fastokens"

    def __init__(self, tokenizer: Tokenizer) -> None:
        import fastokens

        self._reference = tokenizer
        self._has_unmerged = self._has_ambiguous = _contains_any([])
        self._normalize: Callable[[list[str]], list[str]] | None = None
        self.ambiguous: list[str] = []
        if isinstance(tokenizer, HuggingFaceTokenizer):
            text = tokenizer.backend.to_str()
            self.ambiguous = ambiguous_tokens(list(tokenizer.backend.get_added_tokens_decoder().values()))
            if self.ambiguous and tokenizer.backend.normalizer is not None:
                raise Untrusted(
                    f"it finds added tokens, such as {_shown(self.ambiguous)}, at other places than a normalizer lets them be found"
                )
            self._has_ambiguous = _contains_any(self.ambiguous)
            self._native = fastokens.Tokenizer.from_json_str(text)
            self._has_unmerged = _contains_any(pieces_without_merges(text))
        elif isinstance(tokenizer, TikTokenizer):
            self._native = fastokens.Tokenizer.from_tiktoken(tokenizer.name, pattern=tokenizer.pattern)
        elif isinstance(tokenizer, SentencePieceTokenizer):
            if not replaces_spaces_alone(tokenizer.backend):
                self._normalize = tokenizer.backend.normalize  # NFKC, for instance: SentencePiece does this part itself
            converted = sentencepiece_json(tokenizer.backend, normalized=self._normalize is not None)
            if converted is None:
                raise TypeError(f"fastokens has no format for {tokenizer.name}")
            self._native = fastokens.Tokenizer.from_json_str(converted)
            self._has_unmerged = _contains_any(pieces_without_merges(converted))
        else:
            raise TypeError(f"fastokens has no format for {tokenizer.name}")
        # The first call starts fastokens' threads: as many as this process may use cores.
        with _one_core():
            self._native.encode_batch_flat(["a", "b"], add_special_tokens=False)

    def encode_flat(self, texts: Sequence[str]) -> Flat:
        """Encodes many texts; see `Tokenizer.encode_flat`."""
        inputs = list(texts) if self._normalize is None else self._normalize(list(texts))
        ids, offsets = self._native.encode_batch_flat(inputs, add_special_tokens=False)
        ends = np.frombuffer(offsets, dtype=np.uint64).astype(np.int64)
        flat, lengths = np.frombuffer(ids, dtype=np.uint32), ends[1:] - ends[:-1]
        indices = [index for index, text in enumerate(inputs) if self._needs_reference(text)]
        return self._with_reference(texts, indices, flat, lengths) if indices else (flat, lengths)

    def _needs_reference(self, text: str) -> bool:
        # Normalization writes spaces as ▁.
        return _FORMER_SPACE in text or self._has_ambiguous(text) or self._has_unmerged(text.replace("▁", " "))

    def _with_reference(self, texts: Sequence[str], indices: Sequence[int], flat: Array, lengths: npt.NDArray[np.int64]) -> Flat:
        """Replaces the ids of the texts at some indices by those of the reference."""
        rows = np.split(flat, np.cumsum(lengths)[:-1])
        lengths = lengths.copy()
        ids, counts = self._reference.encode_flat([texts[index] for index in indices])
        for index, row in zip(indices, np.split(ids, np.cumsum(counts)[:-1]), strict=True):
            rows[index] = row
            lengths[index] = row.size
        return np.concatenate(rows), lengths


def _shown(tokens: Sequence[str]) -> str:
    more = len(tokens) - _SHOWN_TOKENS
    return ", ".join(map(repr, tokens[:_SHOWN_TOKENS])) + (f" and {more} more" if more > 0 else "")


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """Restricts this thread to one core. A worker encodes in a single thread: --workers decides how many cores are used."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def pieces_without_merges(tokenizer_json: str) -> list[str]:
    """Returns the texts of all vocabulary pieces that are not special tokens and that no merge produces.

    Args:
        tokenizer_json: the text of a tokenizer.json.

    Raises:
        TypeError: the model is not a BPE.
    """
    content = orjson.loads(tokenizer_json)
    model = content["model"]
    if model.get("type") != "BPE":
        raise TypeError(f"a {model.get('type')} model")
    if model.get("ignore_merges"):
        return []
    merged = {"".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]}
    added = {token["content"] for token in content["added_tokens"]}
    pieces = [piece for piece in model["vocab"] if len(piece) > 1 and piece not in merged and piece not in added and " " not in piece]
    letters = {letter: byte for byte, letter in enumerate(byte_letters())}
    byte_level = '"ByteLevel"' in json.dumps(content["pre_tokenizer"])
    if byte_level:
        pieces = [bytes(letters.get(letter, 0) for letter in piece).decode("utf-8", "ignore") for piece in pieces]
    return [piece for piece in (piece.replace("▁", " ").strip() for piece in pieces) if piece]


def _contains_any(pieces: Sequence[str]) -> _TextTest:
    """Returns a function that checks whether a text contains one of the pieces. It is fast for texts without their common prefix.

    Raises:
        Untrusted: too many pieces to search for.
    """
    if not pieces:
        return lambda text: False
    if len(pieces) > _MAX_SEARCHED_PIECES:
        raise Untrusted(f"it may err for texts with any of {len(pieces):,} tokens, such as {_shown(pieces)}")
    prefix = os.path.commonprefix(list(pieces))  # noqa: RUF071 - of characters, not of paths
    pattern = re.compile("|".join(map(re.escape, pieces)))
    return lambda text: prefix in text and pattern.search(text) is not None


def different_text(texts: Sequence[str], first: Flat, second: Flat) -> str | None:
    """Returns the shortest of some texts whose ids are different in two encodings; None if all are equal."""
    if np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1]):
        return None
    rows = (np.split(ids, np.cumsum(lengths)[:-1]) for ids, lengths in (first, second))
    return min((text for text, one, other in zip(texts, *rows, strict=True) if not np.array_equal(one, other)), key=len)


def make_fast_encoder(tokenizer: Tokenizer, backend: str = "auto") -> tuple[FastokensEncoder | WordCache | None, str]:
    """Chooses what encodes in place of the reference tokenizer.

    Args:
        tokenizer: the reference.
        backend: "auto": the word cache or fastokens, if it agrees with the reference on all `start_strings`; "reference": nothing.

    Returns:
        The fast encoder, or None if the reference encodes; and a note for the user: what encodes, and why.
    """
    if backend == "reference":
        return None, "the reference tokenizer"
    texts = start_strings(tokenizer)
    try:
        expected = tokenizer.encode_flat(texts)
    except DataError as error:
        return None, f"the reference tokenizer (which fails for strings that a fast encoder must agree on: {error.what})"
    if isinstance(tokenizer, SentencePieceTokenizer) and is_built() and supports(tokenizer):
        cache = WordCache(tokenizer)
        # The second time, every word is in the cache.
        if all(different_text(texts, cache.encode_flat(texts), expected) is None for _ in range(2)):
            return cache, "the word cache, checked against the reference"
    try:
        encoder = FastokensEncoder(tokenizer)
        if (text := different_text(texts, encoder.encode_flat(texts), expected)) is not None:
            return None, f"the reference tokenizer (fastokens gives other ids for {shortened(text, 60)!r})"
        if not has_known_pattern(tokenizer):
            texts = every_code_point()
            if different_text(texts, encoder.encode_flat(texts), tokenizer.encode_flat(texts)) is not None:
                return None, "the reference tokenizer (fastokens gives other ids for some characters under this tokenizer's pattern)"
    except ImportError:
        return None, "the reference tokenizer (fastokens, which is much faster, is not installed: pip install fastokens)"
    except TypeError:
        return None, "the reference tokenizer (fastokens does not support this tokenizer)"
    except Untrusted as reason:
        return None, f"the reference tokenizer (fastokens is not used: {reason})"
    except BaseException as error:  # whatever a young library may raise, the reference can encode
        if not is_library_failure(error):
            raise
        return None, f"the reference tokenizer (fastokens cannot load it: {error})"
    if encoder.ambiguous:
        return encoder, (
            f"fastokens, checked against the reference, which encodes the texts that contain {_shown(encoder.ambiguous)}: "
            "fastokens may find these added tokens elsewhere"
        )
    return encoder, "fastokens, checked against the reference"
