"""A SentencePiece model as a tokenizer.json, for the fast backend (which is used only where it agrees with SentencePiece itself).

In: a loaded model. Out: the text of a tokenizer.json, or None where the model does something that this format cannot say: another
normalization than spaces for ▁, pieces that are recognized before everything else, no BPE.
"""

from __future__ import annotations

import json
from typing import Any

_SPACE = "▁"
_PROBES = ("a", "a b", " a", "a  b ", "\ta\n", "ﬁ½é e\u0301 Ａ", "\u3000x\u00a0y", "\r\n", "İ ß", "x\u200by\ufeff")


def replaces_spaces_alone(backend: Any) -> bool:
    """Whether normalization makes ▁ of each space, perhaps puts one in front, and does nothing else."""
    prefix = _SPACE if backend.normalize("a").startswith(_SPACE) else ""
    return all(backend.normalize(text) == prefix + text.replace(" ", _SPACE) for text in _PROBES)


def sentencepiece_json(backend: Any, normalized: bool = False) -> str | None:
    """The same tokenizer in Hugging Face's format, without special tokens: in text they are text, as for SentencePiece.

    Args:
        backend: the loaded model.
        normalized: the tokenizer.json is for texts that the model has normalized already.
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
    # A BPE model numbers its merges: 0, -1, -2 and so on. Symbols that are recognized before everything else have the score 0, too.
    numbered = all(score == int(score) for score in plain.values())
    if not numbered or sum(score == 0.0 for score in plain.values()) > 1 or len(set(pieces)) < count:
        return None
    # What text never spells: after normalization it holds no space.
    names = [piece if piece in plain or backend.is_byte(number) else f" {number}" for number, piece in enumerate(pieces)]
    merges = [
        [piece[:cut], piece[cut:]]
        for piece, _ in sorted(plain.items(), key=lambda item: -item[1])
        for cut in range(1, len(piece))
        if piece[:cut] in plain and piece[cut:] in plain
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
    whole: dict[str, Any] = {
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
    return json.dumps(whole)
