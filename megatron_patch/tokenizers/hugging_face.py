"""Tokenizers of Hugging Face's library `tokenizers`. In: a tokenizer.json, or GPT-2's vocab.json and merges.txt. Out: a tokenizer.

The library reads plain data; code that comes with a model is never run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_patch.errors import DataError
from megatron_patch.tokenizers.interface import Flat, TokenizerOptions, flatten

_EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>")


@dataclass
class HuggingFaceTokenizer:
    """A tokenizer of the library `tokenizers`."""

    name: str
    backend: Any
    vocab_size: int
    eod_id: int | None
    bos_id: int | None

    def encode_flat(self, texts: Sequence[str]) -> Flat:
        """Returns the token ids of several texts, without special tokens."""
        return flatten([encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)])

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, special tokens by their names."""
        return str(self.backend.decode([int(token) for token in ids], skip_special_tokens=False))


def load_hugging_face(options: TokenizerOptions) -> HuggingFaceTokenizer:
    """Loads a tokenizer.json, or a folder that holds one; the folder's tokenizer_config.json names the special tokens.

    Raises:
        DataError: the file is missing or damaged, or the end-of-document token is not in the vocabulary.
    """
    from tokenizers import Tokenizer as Backend

    if options.model is None:
        raise DataError("HuggingFaceTokenizer without --tokenizer-model", "a local file or folder", "give --tokenizer-model")
    path = Path(options.model)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"--tokenizer-model {options.model}: {file} does not exist", "a tokenizer.json or a folder that holds one", "check the path"
        )
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the library raises bare exceptions
        raise DataError(
            f"{file} is not a tokenizer: {error}", "a tokenizer.json of Hugging Face's tokenizers", "give another --tokenizer-model"
        ) from error
    backend.no_truncation()
    backend.no_padding()
    eod = _eod_id(backend, options.eod_token, (*_special_names(file.parent, "eos_token"), *_EOD_NAMES))
    bos = _first_id(backend, (*_special_names(file.parent, "bos_token"), *_BOS_NAMES))
    vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    return HuggingFaceTokenizer(str(file), backend, vocab_size, eod, bos)


def load_gpt2(options: TokenizerOptions) -> HuggingFaceTokenizer:
    """Loads GPT-2's vocab.json and merges.txt, or a tokenizer.json where --tokenizer-model names one.

    Raises:
        DataError: a file is missing or damaged, or the end-of-document token is not in the vocabulary.
    """
    merge_file = options.merge_file
    if options.model is not None:
        merge_file = _merges_of(options.model, merge_file)
        if merge_file is None:
            return load_hugging_face(options)
    return _from_merges(options.vocab_file or options.model, merge_file, options.eod_token)


def _from_merges(vocab_file: str | None, merge_file: str | None, eod_token: str | None) -> HuggingFaceTokenizer:
    """Returns the byte-level BPE of GPT-2 with this vocabulary and these merges."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    if vocab_file is None or merge_file is None:
        raise DataError(
            "GPT2BPETokenizer without its files", "--vocab-file vocab.json --merge-file merges.txt", "give --vocab-file and --merge-file"
        )
    try:
        backend = Backend(models.BPE.from_file(vocab_file, merge_file))
    except Exception as error:  # the library raises bare exceptions
        raise DataError(
            f"{vocab_file} and {merge_file} are not a GPT-2 vocabulary: {error}", "vocab.json and merges.txt", "check both paths"
        ) from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id("<|endoftext|>") is not None:
        backend.add_special_tokens(["<|endoftext|>"])
    eod = _eod_id(backend, eod_token, _EOD_NAMES)
    return HuggingFaceTokenizer(vocab_file, backend, max(backend.get_vocab().values()) + 1, eod, None)


def _merges_of(model: str, given: str | None) -> str | None:
    """Returns the merges file that belongs to a vocab.json; None where the model is a tokenizer.json or a folder that holds one."""
    path = Path(model)
    if path.is_dir() or path.name == "tokenizer.json":
        return None
    candidates = [
        path.with_name(name)
        for name in ("merges.txt", f"{path.stem.replace('vocab', 'merges')}.txt", f"{path.stem.replace('vocab', 'merge')}.txt")
    ]
    return next((str(file) for file in (*([Path(given)] if given else []), *candidates) if file.is_file()), None)


def _first_id(backend: Any, names: Sequence[str]) -> int | None:
    """Returns the id of the first of some tokens that the vocabulary has."""
    for name in names:
        token = backend.token_to_id(name)
        if token is not None:
            return int(token)
    return None


def _eod_id(backend: Any, given: str | None, usual: Sequence[str]) -> int | None:
    """Returns the id of the end-of-document token: of the one given, else of the first usual one that the vocabulary has."""
    eod = _first_id(backend, (given,) if given else usual)
    if given is not None and eod is None:
        raise DataError(f"--eod-token {given} is not in the vocabulary", "a token of the vocabulary", "check its spelling")
    return eod


def _special_names(folder: Path, key: str) -> tuple[str, ...]:
    """Returns the special token that the folder's tokenizer_config.json names under a key, if it does."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return ()
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path} cannot be read: {error}", "a JSON object", "repair or remove the file") from error
    name = value.get("content") if isinstance(value, dict) else value
    return (name,) if isinstance(name, str) else ()
