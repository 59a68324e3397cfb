"""Small tokenizer.json files, built from their parts."""

from __future__ import annotations

import json

from megatron_patch.tokenizers.byte_level import byte_letters

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def added(number, content, special=True, **flags):
    """Returns an entry of `added_tokens`."""
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": content, "special": special, **usual, **flags}


def byte_level_json(*tokens, ordinary=(), **parts):
    """Returns a byte-level BPE without merges: 256 bytes, then ordinary pieces, then added tokens.

    Args:
        tokens: entries of `added_tokens`.
        ordinary: pieces of ordinary vocabulary, with the ids from 256 on.
        parts: other parts of the file, in place of the usual ones.
    """
    vocab = {piece: number for number, piece in enumerate([*byte_letters(), *ordinary])}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    model |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": []}
    usual = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": list(tokens), "normalizer": None}
    usual |= {"pre_tokenizer": BYTE_LEVEL, "post_processor": None, "decoder": BYTE_LEVEL, "model": model}
    return {**usual, **parts}


def write(folder, content, **files):
    """Writes a tokenizer.json and other JSON files to a folder, and returns it.

    Args:
        folder: the folder, which may exist.
        content: the content of tokenizer.json.
        files: the contents of other files, by name without .json.
    """
    folder.mkdir(exist_ok=True, parents=True)
    for name, value in {"tokenizer": content, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder
