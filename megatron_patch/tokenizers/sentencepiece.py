"""Tokenizers of SentencePiece. In: a .model file. Out: a tokenizer, and the same one as a tokenizer.json for the fast encoder.

The conversion is refused where a model does something that a tokenizer.json cannot express: a normalization other than spaces to ▁,
pieces that are recognized before all others, a model other than BPE. The fast encoder is used only where it agrees with SentencePiece.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.errors import DataError
from megatron_patch.tokenizers.interface import Flat, TokenizerOptions, flatten
from megatron_patch.tokenizers.library_errors import MOST_FILE_BYTES, encode_texts, library_errors
from megatron_patch.tokenizers.special_tokens import FLAGS, ROLES, Choice, Role, given_token
from megatron_patch.utils.files import read_small

_SPACE = "▁"
_PROBES = ("a", "a b", " a", "a  b ", "\ta\n", "ﬁ½é e\u0301 Ａ", "\u3000x\u00a0y", "\r\n", "İ ß", "x\u200by\ufeff")


@dataclass
class SentencePieceTokenizer:
    """A tokenizer of SentencePiece."""

    name: str
    backend: Any
    vocab_size: int
    eod_id: int | None
    bos_id: int | None
    no_eod: str = ""
    no_bos: str = ""

    def encode_flat(self, texts: Sequence[str]) -> Flat:
        """Returns the token ids of several texts, without special tokens.

        Raises:
            DataError: the library cannot encode a text.
        """
        return flatten(encode_texts(self.name, self._encode, texts))

    def _encode(self, texts: list[str]) -> Any:
        return self.backend.encode(texts, add_bos=False, add_eos=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids.

        Raises:
            DataError: the library cannot decode the ids.
        """
        with library_errors(f"{self.name} cannot decode", "ids of its vocabulary", "check that text and tokenizer belong together"):
            return str(self.backend.decode([int(token) for token in ids]))

    def token_text(self, token: int) -> str:
        """Returns the piece of a token."""
        return str(self.backend.id_to_piece(token))


def load_sentencepiece(options: TokenizerOptions) -> SentencePieceTokenizer:
    """Loads a SentencePiece model.

    Raises:
        DataError: the file is missing or damaged, or the end-of-document token is not in the vocabulary.
    """
    import sentencepiece

    model = options.model
    if model is None:
        raise DataError("SentencePieceTokenizer without --tokenizer-model", "a SentencePiece .model file", "give --tokenizer-model")
    if not Path(model).is_file():
        what = "is not a file" if Path(model).exists() else "does not exist"
        raise DataError(f"--tokenizer-model {model} {what}", "a SentencePiece .model file", "check the path")
    backend = sentencepiece.SentencePieceProcessor()
    with library_errors(f"{model} is not a SentencePiece model", "a SentencePiece .model file", "give another --tokenizer-model"):
        backend.load_from_serialized_proto(read_small(model, MOST_FILE_BYTES))
    if backend.get_piece_size() == 0:
        raise DataError(f"{model} has an empty vocabulary", "a trained model", "give another --tokenizer-model")
    eod, bos = (_choose(role, options, backend) for role in ROLES)
    return SentencePieceTokenizer(model, backend, backend.get_piece_size(), eod.token, bos.token, eod.reason, bos.reason)


def _choose(role: Role, options: TokenizerOptions, backend: Any) -> Choice:
    """Returns the token that the options give for a role, or the one that the model itself has.

    Raises:
        DataError: the piece given is not in the vocabulary.
    """
    known, given = given_token(role, options)
    if known is not None:
        return Choice(known)
    if given is None:
        own = int(backend.eos_id() if role == "eos" else backend.bos_id())
        return Choice(own) if own >= 0 else Choice(None, f"the model has no {role} piece")
    found = int(backend.piece_to_id(given))
    if backend.id_to_piece(found) != given:
        raise DataError(f"{FLAGS[role]} {given} is not in the vocabulary", "a piece of the vocabulary", "check its spelling")
    return Choice(found)


def replaces_spaces_alone(backend: Any) -> bool:
    """Returns whether normalization turns each space into ▁, may put one ▁ before the text, and changes nothing else."""
    prefix = _SPACE if backend.normalize("a").startswith(_SPACE) else ""
    return all(backend.normalize(text) == prefix + text.replace(" ", _SPACE) for text in _PROBES)


def sentencepiece_json(backend: Any, normalized: bool = False) -> str | None:
    """Returns the tokenizer in Hugging Face's format, or None where that format cannot express it.

    Special tokens are left out: in text their names are text, as for SentencePiece.

    Args:
        backend: the loaded model.
        normalized: whether the tokenizer is for texts that the model has normalized already.
    """
    prefix = bool(backend.normalize("a").startswith(_SPACE))
    if not normalized and not replaces_spaces_alone(backend):
        return None
    count = backend.get_piece_size()
    pieces = [backend.id_to_piece(number) for number in range(count)]
    plain = {
        pieces[number]: backend.get_score(number)
        for number in range(count)
        if not (backend.is_control(number) or backend.is_unknown(number) or backend.is_byte(number) or backend.is_unused(number))
    }
    # A BPE model numbers its merges: 0, -1, -2 and so on. User-defined symbols have the score 0, too.
    numbered = all(score == int(score) for score in plain.values())
    if not numbered or sum(score == 0.0 for score in plain.values()) > 1 or len(set(pieces)) < count:
        return None
    # Names with a space never match a text: normalization leaves none.
    names = [piece if piece in plain or backend.is_byte(number) else f" {number}" for number, piece in enumerate(pieces)]
    merges = [
        [piece[:split], piece[split:]]
        for piece, _ in sorted(plain.items(), key=lambda item: -item[1])
        for split in range(1, len(piece))
        if piece[:split] in plain and piece[split:] in plain
    ]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    normalizers = [{"type": "Prepend", "prepend": _SPACE}, replace] if prefix else [replace]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": names[backend.unk_id()],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": any(backend.is_byte(number) for number in range(count)),
        "ignore_merges": False,
        "vocab": {name: number for number, name in enumerate(names)},
        "merges": merges,
    }
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None if normalized else {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    return json.dumps(tokenizer)
