"""The fast encoder in place of the reference tokenizer: `fastokens` or, for SentencePiece, the word cache (word_cache.py).

In: a reference tokenizer. Out: an encoder with the same results, or None and the reason. On web-sized documents `fastokens` takes a
fraction of the CPU time of the reference libraries, once it is loaded: 1/100 for Llama-3, 1/120 or less for Qwen3, 1/6 for Mistral's
SentencePiece BPE (benchmarks/results/preprocess_encoders-cpu-2026-11-30.json).

Two things keep the ids right. The encoder must agree with the reference on adversarial strings before it is used. Texts that contain a
piece of the vocabulary that no merges produce (such as <0x0A>, the name of a byte, which fastokens would read as the byte) go to the
reference one by one.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import orjson

from megatron_patch.preprocess.word_cache import WordCache, is_built, supports
from megatron_patch.tokenizers.base import Flat, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from megatron_patch.tokenizers.byte_level import byte_letters
from megatron_patch.tokenizers.sentencepiece import replaces_spaces_alone, sentencepiece_json
from megatron_patch.tokenizers.tiktoken import TikTokenizer

Array = npt.NDArray[np.uint32]
_MAX_PIECES_WITHOUT_MERGES = 2000


def adversarial_strings(seed: int = 0, count: int = 300) -> list[str]:
    """Returns strings that tend to break tokenizers: mixed scripts, odd white space, long runs, special tokens, control characters,
    combining marks.

    Args:
        seed: seed of the random combinations.
        count: number of random combinations, in addition to each part by itself.
    """
    words = [
        "a",
        "Z",
        "the",
        "don't",
        "WE'LL",
        "1234567890",
        "3.14",
        "_",
        "__init__",
        "#",
        "...",
        "—",
        "é",
        "ß",
        "İ",
        "Ω",
        "жизнь",
        "日本語",
        "한국어",
        "مرحبا",
        "नमस्ते",
        "🙂",
        "🇩🇪",
        "▁",
        "Ġ",
        "ﬁ",
        "½",
        "{}",
        "http://x.y/z?a=b",
    ]
    spaces = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u200b", "\ufeff", "\u2028"]
    special = [
        "<|endoftext|>",
        "<s>",
        "</s>",
        "<unk>",
        " The",
        "e\u0301",
        "\U0001f468\u200d\U0001f469",
        "\x00",
        "\x7f",
        "a" * 40,
        "\\n",
        "\U0001d400",
        "<0x41>",
        "<0x0A>",
    ]
    pieces = words + spaces + special
    draw = random.Random(seed)
    return ["", *pieces, *("".join(draw.choices(pieces, k=draw.randint(1, 24))) for _ in range(count))]


class FastokensEncoder:
    """Encodes with fastokens; the ids are those of the reference tokenizer.

    Args:
        tokenizer: the reference.

    Raises:
        TypeError: fastokens has no format for this tokenizer.
        Exception: whatever fastokens raises when it cannot load it.
    """

    name = "fastokens"

    def __init__(self, tokenizer: Tokenizer) -> None:
        import fastokens

        self._reference = tokenizer
        self._needs_reference = _contains_any([])
        self._normalize: Callable[[list[str]], list[str]] | None = None
        if isinstance(tokenizer, HuggingFaceTokenizer):
            text = tokenizer.backend.to_str()
            self._native = fastokens.Tokenizer.from_json_str(text)
            self._needs_reference = _contains_any(pieces_without_merges(text))
        elif isinstance(tokenizer, TikTokenizer):
            self._native = fastokens.Tokenizer.from_tiktoken(tokenizer.name, pattern=tokenizer.pattern)
        elif isinstance(tokenizer, SentencePieceTokenizer):
            if not replaces_spaces_alone(tokenizer.backend):
                self._normalize = tokenizer.backend.normalize  # NFKC, for instance: SentencePiece does this part itself
            text = sentencepiece_json(tokenizer.backend, normalized=self._normalize is not None)
            if text is None:
                raise TypeError(f"fastokens has no format for {tokenizer.name}")
            self._native = fastokens.Tokenizer.from_json_str(text)
            self._needs_reference = _contains_any(pieces_without_merges(text))
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
        # Normalization writes spaces as ▁.
        indices = [index for index, text in enumerate(inputs) if self._needs_reference(text.replace("▁", " "))]
        return self._with_reference(texts, indices, flat, lengths) if indices else (flat, lengths)

    def _with_reference(self, texts: Sequence[str], indices: Sequence[int], flat: Array, lengths: npt.NDArray[np.int64]) -> Flat:
        """Replaces the ids of the texts at some indices by those of the reference."""
        rows = np.split(flat, np.cumsum(lengths)[:-1])
        lengths = lengths.copy()
        for index in indices:
            rows[index] = self._reference.encode_flat([texts[index]])[0]
            lengths[index] = rows[index].size
        return np.concatenate(rows), lengths


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


def _contains_any(pieces: Sequence[str]) -> Callable[[str], bool]:
    """Returns a function that checks whether a text contains one of the pieces. It is fast for texts without their common prefix.

    Raises:
        ValueError: too many pieces to search for.
    """
    if not pieces:
        return lambda text: False
    if len(pieces) > _MAX_PIECES_WITHOUT_MERGES:
        raise ValueError(f"{len(pieces)} pieces that no merges produce")
    prefix = os.path.commonprefix(list(pieces))  # noqa: RUF071 - of characters, not of paths
    pattern = re.compile("|".join(map(re.escape, pieces)))
    return lambda text: prefix in text and pattern.search(text) is not None


def same_encoding(first: Flat, second: Flat) -> bool:
    """Returns whether two encodings are equal."""
    return np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])


def make_fast_encoder(tokenizer: Tokenizer, backend: str = "auto") -> tuple[FastokensEncoder | WordCache | None, str]:
    """Chooses what encodes in place of the reference tokenizer.

    Args:
        tokenizer: the reference.
        backend: "auto": the word cache or fastokens, if it agrees with the reference on every adversarial string; "reference": nothing.

    Returns:
        The fast encoder, or None if the reference encodes; and a note for the user: what encodes, and why.
    """
    if backend == "reference":
        return None, "the reference tokenizer"
    texts = adversarial_strings()
    if isinstance(tokenizer, SentencePieceTokenizer) and is_built() and supports(tokenizer):
        cache, twice = WordCache(tokenizer), 2 * texts  # the second time, every word is in the cache
        if same_encoding(cache.encode_flat(twice), tokenizer.encode_flat(twice)):
            return cache, "the word cache, checked against the reference"
    try:
        encoder = FastokensEncoder(tokenizer)
        if not same_encoding(encoder.encode_flat(texts), tokenizer.encode_flat(texts)):
            return None, "the reference tokenizer (fastokens gives other ids for adversarial strings)"
    except ImportError:
        return None, "the reference tokenizer (fastokens, which is much faster, is not installed: pip install fastokens)"
    except TypeError:
        return None, "the reference tokenizer (fastokens does not support this tokenizer)"
    except Exception as error:  # whatever a young library may raise, the reference can encode
        return None, f"the reference tokenizer (fastokens cannot load it: {error})"
    return encoder, "fastokens, checked against the reference"
