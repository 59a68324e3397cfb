"""Strings that tell tokenizers apart: they break what is not quite the same. In: a tokenizer. Out: strings, the same ones in every run.

Two encoders that are meant to be the same are compared on them, and text that is encoded and decoded is compared with itself.
"""

from __future__ import annotations

import functools
import random
import sys
import unicodedata
from collections.abc import Iterable, Sequence

from megatron_patch.tokenizers.base import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from megatron_patch.tokenizers.tiktoken import TikTokenizer

_WORDS = (
    *("a", "Z", "the", "don't", "WE'LL", "1234567890", "3.14", "_", "__init__", "#", "...", "—", "é", "ß", "İ", "Ω", "жизнь", "日本語"),
    *("한국어", "مرحبا", "नमस्ते", "🙂", "🇩🇪", "▁", "Ġ", "ﬁ", "½", "{}", "http://x.y/z?a=b"),
)
_SPACES = (" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u200b", "\ufeff", "\u2028")
_SPECIAL = (
    *("<|endoftext|>", "<s>", "</s>", "<unk>", " The", "e\u0301", "\U0001f468\u200d\U0001f469", "\x00", "\x7f", "a" * 40, "\\n"),
    *("\U0001d400", "<0x41>", "<0x0A>"),
)
# One of each class that patterns of byte-level BPE tell apart.
_CLASSES = (" ", "\n", "\r", "\t", "a", "S", "1", "'", "!", "é")
# Blocks of characters that Unicode 13 to 17 added, of which libraries with older tables do not know the class: the first character of each.
_NEW_BLOCKS = (
    *(0x08BE, 0x0B55, 0x0C5D, 0x0CDD, 0x0CF3, 0x0D04, 0x0DDF, 0x0ECE, 0x1712, 0x1C89, 0x1DFA, 0x20C0, 0x2C2F, 0x2FFC, 0x31EF, 0x9FFD),
    *(0xA7C0, 0xA7CB, 0xA7CD, 0xA7D0, 0xA7F2, 0x105C0, 0x10570, 0x10780, 0x10D40, 0x10E80, 0x10EC2, 0x10F70, 0x11240, 0x11380, 0x11AB0),
    *(0x11B00, 0x11BC0, 0x11F00, 0x11FB0, 0x12F90, 0x13430, 0x13460, 0x16100, 0x16A70, 0x16D40, 0x16FE4, 0x18AF3, 0x1AFF0, 0x1B132),
    *(0x1CC00, 0x1CF00, 0x1D2C0, 0x1DF00, 0x1E030, 0x1E290, 0x1E4D0, 0x1E5D0, 0x1E7E0, 0x1F6DC, 0x1F774, 0x1FA75, 0x1FBF0, 0x2A6D7),
    *(0x2B739, 0x2EBF0, 0x30000, 0x31350, 0x323B0),
)
# Neighbors of the surrogates, noncharacters, private use, signs that change in case, compositions that Unicode excludes.
_EDGES = (
    *(0xD7FF, 0xE000, 0xF8FF, 0xFFFD, 0xFFFE, 0xFFFF, 0x10000, 0x1FFFF, 0x10FFFD, 0x10FFFF, 0x017F, 0x212A, 0x0130, 0x0131, 0x1E9E, 0x00DF),
    *(0x0149, 0x01C5, 0x0345, 0x03C2, 0x1E9B, 0xFB01, 0xFF10, 0xFF21, 0x0958, 0x2126, 0x212B, 0x2ADC, 0xFB1D, 0x1D15E, 0x0344, 0x2329),
)
# Letters and marks that Unicode 16 composes.
_NEW_COMPOSITIONS = (
    *(0x105D2, 0x0307, 0x105DA, 0x0307, 0x11382, 0x113C9, 0x11384, 0x113BB, 0x113C2, 0x113C2, 0x1611E, 0x1611E, 0x16121, 0x1611F),
    *(0x16D63, 0x16D67, 0x16D67, 0x16D67, 0x16D69, 0x16D67),
)
_PRIVATE_PLANES = 0xF0000
# White space, control and format characters, and letters in title case: their first and last characters, as of Unicode 15.
_ODD_RANGES = (
    *((0x0000, 0x0020), (0x007F, 0x00A0), (0x00AD, 0x00AD), (0x01C5, 0x01C5), (0x01C8, 0x01C8), (0x01F2, 0x01F2), (0x0600, 0x0605)),
    *((0x061C, 0x061C), (0x06DD, 0x06DD), (0x070F, 0x070F), (0x0890, 0x0891), (0x08E2, 0x08E2), (0x1680, 0x1680), (0x180E, 0x180E)),
    *((0x1F88, 0x1F8A), (0x1F98, 0x1F9A), (0x1FBC, 0x1FBC), (0x1FFC, 0x1FFC), (0x2000, 0x200F), (0x2028, 0x202F), (0x205F, 0x206F)),
    *((0x3000, 0x3000), (0xFEFF, 0xFEFF), (0xFFF9, 0xFFFB), (0x110BD, 0x110BD), (0x110CD, 0x110CD), (0x13430, 0x1343F)),
    *((0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0001, 0xE0001), (0xE0020, 0xE0022), (0xE007F, 0xE007F)),
)
_MARKS = range(0x0300, 0x0370, 16)
_SCRIPTS = (*range(0, 0x3400, 128), *range(0xA000, 0xAC00, 256), *range(0xF900, 0x20000, 512))
_DETAILED_TOKENS = 48  # added tokens with strings of their own; the others occur in strings of several
_LONG_TOKEN = 100  # characters of an added token from which it is not cut at every place
_STRING_CHARACTERS = 2000
_RUN = 1100  # longer than the parts in which a library may look at a text


def adversarial_strings(seed: int = 0, count: int = 300) -> list[str]:
    """Returns strings that tend to break tokenizers: mixed scripts, odd white space, long runs, special tokens, control characters,
    combining marks.

    Args:
        seed: seed of the random combinations.
        count: number of random combinations, in addition to each part by itself.
    """
    pieces = (*_WORDS, *_SPACES, *_SPECIAL)
    draw = random.Random(seed)
    return ["", *pieces, *("".join(draw.choices(pieces, k=draw.randint(1, 24))) for _ in range(count))]


def every_sequence(letters: Sequence[str], length: int) -> str:
    """Returns the shortest text that contains every sequence of so many of the letters (a de Bruijn sequence, with its start repeated)."""
    count = len(letters)
    word, found = [0] * count * length, list[int]()

    def extend(position: int, period: int) -> None:
        if position > length:
            if length % period == 0:
                found.extend(word[1 : period + 1])
            return
        word[position] = word[position - period]
        extend(position + 1, period)
        for letter in range(word[position - period] + 1, count):
            word[position] = letter
            extend(position + 1, position)

    extend(1, 1)
    return "".join(letters[index] for index in (*found, *found[: length - 1]))


@functools.cache
def odd_code_points() -> tuple[str, ...]:
    """Returns characters on whose class libraries disagree, or may: all white space, control and format characters, what newer versions of
    Unicode added, edges of the code space, and a sample of every script.
    """
    ranges = (number for first, last in _ODD_RANGES for number in range(first, last + 1))
    return tuple(map(chr, sorted({*_NEW_BLOCKS, *_EDGES, *_MARKS, *_SCRIPTS, *ranges})))


def code_point_strings(characters: Sequence[str], form: str = "a*b  *x **1* '*.*\n*S") -> list[str]:
    """Returns strings with each character between letters, digits, spaces, marks and line ends, many characters to a string.

    Args:
        characters: the characters.
        form: what is written for each, with stars in its place.
    """
    forms = [form.replace("*", letter) for letter in characters]
    return ["".join(forms[start : start + 64]) for start in range(0, len(forms), 64)]


@functools.cache
def decomposed_strings() -> tuple[str, ...]:
    """Returns strings of letters and marks apart, which normalization composes, and of marks in an order that it changes."""
    numbers = (*range(0x00C0, 0x3400), *range(0xF900, 0xFB50), *range(0x11000, 0x12000), *range(0x1D100, 0x1D200))
    parts = [unicodedata.normalize("NFD", chr(number)) for number in numbers if _is_composed(chr(number))]
    marks = [chr(number) for number in range(0x0300, 0x0370)]
    random.Random(2).shuffle(marks)
    newer = "".join(map(chr, _NEW_COMPOSITIONS))
    return "".join(parts[::2]), "q".join(parts[1::2]), f"a{''.join(marks)}", newer, "\u1112\u1161\u11ab \u1100\u1161 \u1161\u11a8"


def _is_composed(letter: str) -> bool:
    decomposition = unicodedata.decomposition(letter)
    return bool(decomposition) and not decomposition.startswith("<")


def every_code_point() -> list[str]:
    """Returns strings with every assigned character, but for large blocks whose members are all alike (Chinese, Korean, private use)."""
    alike = ((0x3400, 0x4DC0), (0x4E00, 0xA000), (0xAC00, 0xD7A4), (0xD800, 0xF900), (0x17000, 0x18D00), (0x20000, 0x31400))
    skipped = {number for start, end in alike for number in range(start + 1, end)}
    return code_point_strings(_assigned(number for number in range(_PRIVATE_PLANES) if number not in skipped), "a*  *1")


def characters_with_spaces() -> list[str]:
    """Returns strings that together hold every assigned character, with spaces between them."""
    characters = _assigned(range(sys.maxunicode + 1))
    return [" ".join(characters[start : start + _STRING_CHARACTERS]) for start in range(0, len(characters), _STRING_CHARACTERS)]


def _assigned(numbers: Iterable[int]) -> list[str]:
    """Returns the characters with these numbers, without numbers that stand for none."""
    return [letter for letter in map(chr, numbers) if unicodedata.category(letter) not in ("Cn", "Cs")]


def long_strings() -> list[str]:
    """Returns texts longer than the parts in which a library may look at a text, with long runs of one class, and two that differ late."""
    draw = random.Random(1)
    words = "".join(draw.choices((*_WORDS, *_SPACES, " ", " ", "the time"), k=1100))
    runs = "".join(f"x{letter * _RUN}y" for letter in (" ", "\n", "a", "1", "!"))
    return [f"{words}x  y", f"{words}x   ", words + runs]


def added_tokens(tokenizer: Tokenizer) -> list[str]:
    """Returns the texts of a tokenizer's own special and added tokens, those that do more than match their text first."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokens = tokenizer.backend.get_added_tokens_decoder().values()
        flagged = sorted(tokens, key=lambda token: not (token.lstrip or token.rstrip or token.single_word or token.normalized))
        return [token.content for token in flagged if token.content]
    if isinstance(tokenizer, TikTokenizer):
        return sorted(tokenizer.backend.special_tokens_set)
    if isinstance(tokenizer, SentencePieceTokenizer):
        backend = tokenizer.backend
        ids = range(backend.get_piece_size())
        # A user-defined symbol has the score 0, as the first merge of a BPE model has.
        own = [number for number in ids if backend.get_score(number) == 0.0 and not (backend.is_byte(number) or backend.is_unused(number))]
        return [backend.id_to_piece(number).replace("▁", " ") for number in own]
    return []


def token_strings(tokens: Sequence[str], seed: int = 0, count: int = 250) -> list[str]:
    """Returns strings of added tokens: doubled, cut, joined where one begins as another ends, at both ends, with and without spaces,
    letters, digits and marks next to them, in capitals and small letters.

    Args:
        tokens: the texts of the tokens; the first ones get the most strings.
        seed: seed of the random combinations.
        count: number of random combinations.
    """
    found = [f"a{token}b" for token in tokens if len(token) > _LONG_TOKEN][:_DETAILED_TOKENS]
    tokens = [token for token in tokens if len(token) <= _LONG_TOKEN]
    if not tokens:
        return found
    first = tokens[:_DETAILED_TOKENS]
    for token in first:
        found += [
            token,
            f"{token}{token}",
            f" {token} ",
            f"\n{token}\n",
            f"a{token}b",
            f"  {token}",
            f"{token}  ",
            f"{token[:-1]} {token[1:]}",
        ]
        found.append(f"_{token}_{token}1é{token}\u0301-{token}. {token.upper()} {token.lower()}{token[:-1]}x{token}")
        for other in first:
            joined = [token + other[size:] for size in range(1, len(other)) if token.endswith(other[:size])]
            before = [f"{token[:size]}{other}" for size in range(1, len(token)) if token[size:].startswith(other)]
            # Tokens that repeat a few characters meet at many places.
            found += [text for ways in (joined, before) for text in dict.fromkeys([*ways[:2], *ways[-1:]])]
    found += ["".join(f"{token}{glue}" for token in tokens) for glue in ("", " ")]
    draw = random.Random(seed)
    glue = (
        "",
        "",
        "",
        "",
        " ",
        "  ",
        "\n",
        " \n",
        "\t",
        "\u00a0",
        "a",
        "Z",
        "é",
        "\u0301",
        "_",
        "1",
        ".",
        "-",
        "<",
        ">",
        "日",
        "'s",
        " rest",
    )
    for _ in range(count):
        parts = []
        for _ in range(draw.randint(1, 8)):
            token, way = draw.choice(first if draw.random() < 0.8 else tokens), draw.random()
            cut = draw.randint(1, max(1, len(token) - 1))
            parts.append(token[:cut] if way < 0.15 else token[cut:] if way < 0.3 else token.upper() if way < 0.35 else token)
            parts.append(draw.choice(glue))
        found.append("".join(parts))
    return found


@functools.cache
def common_strings() -> tuple[str, ...]:
    """Returns the strings for every tokenizer."""
    ends = [f"a{first}{second}{third}" for first in _CLASSES[:4] for second in _CLASSES[:4] for third in (*_CLASSES[:4], "a", "")]
    sequences = every_sequence(_CLASSES, 4)
    return (*adversarial_strings(), *ends, sequences, *code_point_strings(odd_code_points()), *decomposed_strings(), *long_strings())


def start_strings(tokenizer: Tokenizer) -> list[str]:
    """Returns the strings on which an encoder must agree with a tokenizer before it encodes in its place."""
    return [*common_strings(), *token_strings(added_tokens(tokenizer))]
