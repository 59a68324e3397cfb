"""The fast backend: `fastokens` over the tokenizer of the reference, where it is to be trusted.

In: a reference tokenizer. Out: an encoder with the same results, or None and the reason. It must load the tokenizer and agree with the
reference on strings made to break tokenizers; texts that hold a piece of the vocabulary which no merges make (such as <0x0A>, the name of
a byte, which fastokens would take for the byte) go to the reference one by one.
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

from megatron_patch.preprocess.word_cache import Warming, WordCache, cuts_of, is_built
from megatron_patch.tokenizers.base import Flat, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from megatron_patch.tokenizers.byte_level import byte_letters
from megatron_patch.tokenizers.sentencepiece import sentencepiece_json
from megatron_patch.tokenizers.tiktoken import TikTokenizer

Array = npt.NDArray[np.uint32]
_MOST_UNREACHABLE = 2000
_WARM_BYTES = 4_000_000  # which a reference encodes in the time that fastokens takes to load


def fuzz_strings(seed: int = 0, count: int = 300) -> list[str]:
    """Strings made to break tokenizers: mixed scripts, odd white space, long runs, special tokens, controls, combining marks."""
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


class FastBackend:
    """fastokens over the same tokenizer.

    Args:
        tokenizer: the reference.

    Raises:
        TypeError: a tokenizer that fastokens has no form for.
        Exception: whatever fastokens raises when it cannot load it.
    """

    name = "fastokens"

    def __init__(self, tokenizer: Tokenizer) -> None:
        import fastokens

        self._reference = tokenizer
        self._unreachable = _finder([])
        if isinstance(tokenizer, HuggingFaceTokenizer):
            text = tokenizer.backend.to_str()
            self._native = fastokens.Tokenizer.from_json_str(text)
            self._unreachable = _finder(unreachable_pieces(text))
        elif isinstance(tokenizer, TikTokenizer):
            self._native = fastokens.Tokenizer.from_tiktoken(tokenizer.name, pattern=tokenizer.pattern)
        elif isinstance(tokenizer, SentencePieceTokenizer) and (text := sentencepiece_json(tokenizer.backend)) is not None:
            self._native = fastokens.Tokenizer.from_json_str(text)
            self._unreachable = _finder(unreachable_pieces(text))
        else:
            raise TypeError(f"no form of {tokenizer.name}")
        # Here its threads are made, once for a process: as many as it may use processors.
        with _one_processor():
            self._native.encode_batch_flat(["a", "b"], add_special_tokens=False)

    def encode_flat(self, texts: Sequence[str]) -> Flat:
        """See `Tokenizer`."""
        ids, offsets = self._native.encode_batch_flat(list(texts), add_special_tokens=False)
        ends = np.frombuffer(offsets, dtype=np.uint64).astype(np.int64)
        flat, lengths = np.frombuffer(ids, dtype=np.uint32), ends[1:] - ends[:-1]
        odd = [number for number, text in enumerate(texts) if self._unreachable(text)]
        return self._with_reference(texts, odd, flat, lengths) if odd else (flat, lengths)

    def _with_reference(self, texts: Sequence[str], odd: Sequence[int], flat: Array, lengths: npt.NDArray[np.int64]) -> Flat:
        """The ids of some texts put in from the reference."""
        rows = np.split(flat, np.cumsum(lengths)[:-1])
        lengths = lengths.copy()
        for number in odd:
            rows[number] = self._reference.encode_flat([texts[number]])[0]
            lengths[number] = rows[number].size
        return np.concatenate(rows), lengths


@contextlib.contextmanager
def _one_processor() -> Iterator[None]:
    """Lets this thread use a single processor: a worker encodes in one, with one memory for words, and --workers says how many."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def unreachable_pieces(text: str) -> list[str]:
    """What text must hold for a piece of a tokenizer.json to be in it that is no special token and that no merge makes.

    Raises:
        TypeError: a model without merges.
    """
    whole = orjson.loads(text)
    model = whole["model"]
    if model.get("type") != "BPE":
        raise TypeError(f"a {model.get('type')} model")
    if model.get("ignore_merges"):
        return []
    made = {"".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]}
    added = {token["content"] for token in whole["added_tokens"]}
    pieces = [piece for piece in model["vocab"] if len(piece) > 1 and piece not in made and piece not in added and " " not in piece]
    letters = {letter: byte for byte, letter in enumerate(byte_letters())}
    byte_level = '"ByteLevel"' in json.dumps(whole["pre_tokenizer"])
    if byte_level:
        pieces = [bytes(letters.get(letter, 0) for letter in piece).decode("utf-8", "ignore") for piece in pieces]
    return [piece for piece in (piece.replace("▁", " ").strip() for piece in pieces) if piece]


def _finder(pieces: Sequence[str]) -> Callable[[str], bool]:
    """Whether a text holds one of some strings; quick where they begin alike and the text holds none.

    Raises:
        ValueError: too many to look for.
    """
    if not pieces:
        return lambda text: False
    if len(pieces) > _MOST_UNREACHABLE:
        raise ValueError(f"{len(pieces)} pieces that no merges make")
    first, last = min(pieces), max(pieces)  # what these begin with, all between them do
    beginning = first[: next((place for place, letter in enumerate(first) if letter != last[place : place + 1]), len(first))]
    pattern = re.compile("|".join(map(re.escape, pieces)))
    return lambda text: beginning in text and pattern.search(text) is not None


def same(first: Flat, second: Flat) -> bool:
    """Whether two encodings are equal."""
    return np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])


def fast_backend(tokenizer: Tokenizer, backend: str = "auto") -> tuple[FastBackend | WordCache | None, str]:
    """(what encodes in the reference's place, or None; why). It must agree with the reference on every fuzz string.

    For byte-level BPE that is fastokens, which remembers words itself. For SentencePiece, and where fastokens cannot serve, it is a memory
    for words: before the reference, and before fastokens as soon as there are so many new words that loading it pays.

    Args:
        tokenizer: the reference.
        backend: "auto"; "words": without fastokens; "reference".
    """
    if backend == "reference":
        return None, "the reference tokenizer"
    later = backend == "auto" and isinstance(tokenizer, SentencePieceTokenizer)
    fast, note = _fastokens(tokenizer) if backend == "auto" and not later else (None, "the reference tokenizer")
    cuts = cuts_of(tokenizer) if fast is None and is_built() else None
    if cuts is None:
        return _fastokens(tokenizer) if later else (fast, note)
    encoder = Warming(tokenizer, lambda: _fastokens(tokenizer)[0], _WARM_BYTES) if later else tokenizer
    memory = WordCache(tokenizer, encoder, cuts, "words")
    # The second time each word is one that it remembers.
    texts = 2 * fuzz_strings()
    if same(memory.encode_flat(texts), tokenizer.encode_flat(texts)):
        return memory, f"remembered words of {note}, checked against it"
    return _fastokens(tokenizer) if later else (fast, note)


def _fastokens(tokenizer: Tokenizer) -> tuple[FastBackend | None, str]:
    """The backend of fastokens, or None; and why."""
    try:
        backend = FastBackend(tokenizer)
        texts = fuzz_strings()
        if not same(backend.encode_flat(texts), tokenizer.encode_flat(texts)):
            return None, "the reference tokenizer (fastokens disagrees on fuzz strings)"
    except ImportError:
        return None, "the reference tokenizer (fastokens is not installed)"
    except TypeError:
        return None, "the reference tokenizer (no fast backend for its type)"
    except Exception as error:  # whatever a young library may raise, the reference serves
        return None, f"the reference tokenizer (fastokens cannot load it: {error})"
    return backend, "fastokens, checked against the reference"
