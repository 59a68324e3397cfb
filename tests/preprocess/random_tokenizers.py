"""Tokenizers at random, and texts that are hard for them. In: a seed. Out: what preprocessing loads, and the library's own encoding."""

from __future__ import annotations

import base64
import functools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.preprocess.encode import EncodeSettings
from megatron_patch.tokenizers.byte_level import byte_letters
from megatron_patch.tokenizers.fuzz_strings import adversarial_strings, odd_code_points
from megatron_patch.tokenizers.tiktoken import PATTERNS

CORPUS = [
    "the patches of don't  and\n12 x y it's 日本語 a1 größer, int a = b; return self  # 3.14",
    "a  b   c\n\n\td WE'LL 1234567890 жизнь 한국어 é e\u0301 🙂 <sep> x->y << 2 >> </s> http://x.y/z?a=b",
    "aaaa aaa aa a bb bbb    foo foobar oo bar ABC abc Abc l'été don don't 1.5e-3 __init__ ...",
] * 20
TOKENS = (
    *("<<", ">", "->", "</s>", "<|user|>", "<|", "|>", "<s>", "s>", "<", "user", "foo", "oo", " x", "x ", "  ", "\n", "\n\n", "<a>", "a>b"),
    *(
        "ab",
        "ba",
        "aba",
        "é",
        "e\u0301",
        "E",
        "FOO",
        "日本",
        "本語",
        "<|user|><|im|>",
        "<|im|>",
        "=>",
        "==",
        "▁",
        "Ġ",
        "'s",
        "don",
        "1",
        "12",
    ),
    *("[MASK]", "[", "mask", "\t", "ſ", "ﬁ", "İ", "\u00a0", "..", "."),
)
# Patterns that are not the well-known ones.
OTHER_PATTERNS = (
    r"\s+(?!\S)|\s?\S+|\s+",
    r"'s| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+x?",
    r"\p{Lu}?\p{Ll}+|\d|\s|.",
    r"[\p{L}\p{M}]+|\p{N}{1,2}| ?[\p{P}\p{S}]+|\s+$|\s+",
    r"(?i:'ll|'s)|\w+|\W",
)


@dataclass(frozen=True)
class RandomTokenizer:
    """A tokenizer at random.

    Args:
        settings: how preprocessing loads it.
        encode: encodes a text with the library itself.
        tokens: its own added tokens or symbols.
        whole: whether its ids give back every text without white space.
        description: what was drawn.
    """

    settings: EncodeSettings
    encode: Callable[[str], list[int]]
    tokens: tuple[str, ...]
    whole: bool
    description: str


def make(seed: int, folder: Path) -> RandomTokenizer:
    """Returns the tokenizer of a seed, whose files are written into a folder."""
    draw = random.Random(seed)
    kind = draw.choices((_byte_level, _sentencepiece, _hugging_face_pieces, _tiktoken), (8, 5, 3, 2))[0]
    return kind(draw, folder / str(seed))


@functools.cache
def _byte_level_model(crossing: bool) -> str:
    """A byte-level BPE as text; its merges cross words if `crossing`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not crossing)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    return str(backend.to_str())


def _byte_level(draw: random.Random, path: Path) -> RandomTokenizer:
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    backend = Tokenizer.from_str(_byte_level_model(draw.random() < 0.5))
    pattern = draw.choices(("own", draw.choice(list(PATTERNS)), draw.choice(OTHER_PATTERNS)), (2, 4, 1))[0]
    prefix = draw.random() < 0.1
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=pattern == "own")
    split = pre_tokenizers.Split(Regex(PATTERNS.get(pattern, pattern)), "isolated")
    backend.pre_tokenizer = level if pattern == "own" else pre_tokenizers.Sequence([split, level])
    backend.decoder = decoders.ByteLevel()
    ways = {
        "none": None,
        "NFC": normalizers.NFC(),
        "lower": normalizers.Lowercase(),
        "replace": normalizers.Replace("a", "bb"),
        "NFKC": normalizers.NFKC(),
    }
    normalizer = draw.choices(list(ways), (6, 2, 1, 1, 1))[0]
    if ways[normalizer] is not None:
        backend.normalizer = ways[normalizer]
    content = json.loads(backend.to_str())
    content["model"]["ignore_merges"] = draw.random() < 0.3
    return _hugging_face(draw, path, Tokenizer.from_str(json.dumps(content)), f"byte-level {pattern!r} {normalizer}", True)


def _hugging_face_pieces(draw: random.Random, path: Path) -> RandomTokenizer:
    """WordPiece, or a BPE or unigram model over characters, as models of SentencePiece are converted."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    kind = draw.choice(("WordPiece", "BPE", "Unigram"))
    special = ["<unk>"]
    if kind == "WordPiece":
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=draw.random() < 0.5)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    else:
        before = [None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])][int(draw.random() < 0.5)]
        if kind == "BPE":
            bytes_too = draw.random() < 0.5
            special += [f"<0x{byte:02X}>" for byte in range(256)] if bytes_too else []
            backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=bytes_too, fuse_unk=draw.random() < 0.5))
            trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
        else:
            backend = Tokenizer(models.Unigram())
            trainer = trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=special, show_progress=False)
        if before is not None:
            backend.normalizer = before
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=draw.choice(("always", "never", "first")))
            backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(CORPUS, trainer)
    return _hugging_face(draw, path, backend, kind, False)


def _hugging_face(draw: random.Random, path: Path, backend: Any, what: str, whole: bool) -> RandomTokenizer:
    """Adds tokens at random and writes tokenizer.json."""
    from tokenizers import AddedToken, Tokenizer

    tokens, strips = draw.sample(TOKENS, draw.choice((0, 1, 3, 8))), draw.choice((0.0, 0.0, 0.2))
    mixed, normalized = draw.random() < 0.5, draw.random() < 0.5
    # The library fails for texts in which two tokens take the white space between them from both sides.
    side = draw.choice(("lstrip", "rstrip"))
    normalized_texts = set()
    for token in list(tokens):
        text = backend.normalizer.normalize_str(token) if backend.normalizer is not None else token
        if text in normalized_texts:
            tokens.remove(token)
            continue
        normalized_texts.add(text)
        flags = {side: draw.random() < strips, "single_word": draw.random() < strips, "special": draw.random() < 0.5}
        backend.add_tokens([AddedToken(token, normalized=draw.random() < 0.5 if mixed else normalized, **flags)])
    path.mkdir()
    backend.save(str(path / "tokenizer.json"))
    direct = Tokenizer.from_file(str(path / "tokenizer.json"))
    added = {token.content: str(token) for token in direct.get_added_tokens_decoder().values() if token.content in tokens}
    return RandomTokenizer(
        EncodeSettings("HuggingFaceTokenizer", str(path / "tokenizer.json"), dtype="int32"),
        lambda text: list(direct.encode(text, add_special_tokens=False).ids),
        tuple(tokens),
        # The letter of a byte as an added token shares the byte's id.
        whole and not any(token in byte_letters() and not token.isascii() for token in tokens),
        f"{what} {list(added.values())}",
    )


def _sentencepiece(draw: random.Random, path: Path) -> RandomTokenizer:
    import sentencepiece

    plain = draw.random() < 0.4
    options: dict[str, Any] = {
        "model_type": draw.choice(("bpe", "bpe", "unigram")),
        "byte_fallback": draw.random() < 0.7,
        "normalization_rule_name": draw.choice(("identity", "identity", "identity", "nfkc", "nmt_nfkc", "nmt_nfkc_cf")),
        "remove_extra_whitespaces": draw.random() < 0.3,
        "add_dummy_prefix": draw.random() < 0.8,
        "split_digits": draw.random() < 0.5,
        "allow_whitespace_only_pieces": draw.random() < 0.5,
        "treat_whitespace_as_suffix": draw.random() < 0.1,
        "user_defined_symbols": [
            token for token in draw.sample(TOKENS, draw.choice((0, 0, 2, 5))) if token.strip() and token not in ("<s>", "</s>")
        ],
    }
    if plain:  # as Llama's and Mistral's
        options |= {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
        options |= {"add_dummy_prefix": True, "treat_whitespace_as_suffix": False}
    model = Path(f"{path}.model")
    with model.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in CORPUS for line in text.split("\n") if line),
            model_writer=file,
            vocab_size=500,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
    direct = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return RandomTokenizer(
        EncodeSettings("SentencePieceTokenizer", str(model), dtype="int32"),
        lambda text: list(direct.encode(text)),
        tuple(options["user_defined_symbols"]),
        options["byte_fallback"] and options["normalization_rule_name"] == "identity" and not options["remove_extra_whitespaces"],
        f"SentencePiece {options}",
    )


def _tiktoken(draw: random.Random, path: Path) -> RandomTokenizer:
    import tiktoken

    letters = {letter: byte for byte, letter in enumerate(byte_letters())}
    vocabulary = json.loads(_byte_level_model(draw.random() < 0.5))["model"]["vocab"]
    ranks = {bytes(letters[letter] for letter in piece): rank for piece, rank in vocabulary.items()}
    path.write_bytes(b"".join(base64.b64encode(piece) + b" %d\n" % rank for piece, rank in ranks.items()))
    pattern = draw.choice((*PATTERNS, *(pattern + r"|[\s\S]" for pattern in OTHER_PATTERNS)))
    direct = tiktoken.Encoding("x", pat_str=PATTERNS.get(pattern, pattern), mergeable_ranks=ranks, special_tokens={})
    return RandomTokenizer(
        EncodeSettings("TikTokenizer", str(path), tiktoken_pattern=pattern, dtype="int32"),
        direct.encode_ordinary,
        (),
        True,
        f"tiktoken {pattern!r}",
    )


def texts_for(seed: int, tokens: tuple[str, ...], count: int = 120) -> list[str]:
    """Returns texts that are hard for a tokenizer with these added tokens; other ones than the product itself compares."""
    draw = random.Random(seed + 1_000_003)
    plain = (*adversarial_strings(count=0), *CORPUS[:3])
    odd = odd_code_points()

    def part() -> str:
        way = draw.random()
        if tokens and way < 0.4:
            token = draw.choice(tokens)
            cut = draw.randint(0, len(token))
            return draw.choice((token, token, token + token, token[:cut], token[cut:], token.upper(), token.lower()))
        if way < 0.75:
            return draw.choice(plain)
        if way < 0.85:
            return draw.choice(odd)
        if way < 0.9:
            return chr(draw.choice((draw.randrange(0x20, 0x3000), draw.randrange(0x3000, 0xD800), draw.randrange(0x10000, 0x20000))))
        return draw.choice((" ", "\n", "\t", "a", "1")) * draw.choice((1, 2, 3, 40))

    texts = ["".join(part() + draw.choice(("", "", " ", "  ", "\n")) for _ in range(draw.randint(1, 12))) for _ in range(count)]
    return [*texts, " ".join(texts), " ".join(draw.choices(CORPUS[0].split(" "), k=3000)), ""]
