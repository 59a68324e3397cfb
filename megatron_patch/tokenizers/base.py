"""One face for every tokenizer: text in, ids out, and back.

In: a type and a file. Out: a `Tokenizer`. Hugging Face's `tokenizers`, `sentencepiece` and `tiktoken` are the references; `fastokens`,
where it is installed and agrees with the reference on strings made to break it, encodes underneath (see `data.preprocess.encode`, which
goes on checking while it runs). No tokenizer here adds beginning-of-sequence or end-of-document ids by itself, and none runs code that
comes with a model.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_patch.errors import ConfigError, DataError
from megatron_patch.tokenizers.tiktoken import load_tiktoken

Flat = tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]
"""All ids of a batch of texts one after another, and how many each text has."""

TYPES = ("HuggingFaceTokenizer", "SentencePieceTokenizer", "Llama2Tokenizer", "GPT2BPETokenizer", "TikTokenizer", "NullTokenizer")
_EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>")


class Tokenizer(Protocol):
    """What every tokenizer can do."""

    name: str
    vocab_size: int
    eod_id: int | None
    bos_id: int | None

    def encode_flat(self, texts: Sequence[str]) -> Flat:
        """Ids of many texts."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that are no whole characters become U+FFFD."""
        ...


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of one text."""
    return [int(token) for token in tokenizer.encode_flat([text])[0]]


def _flat(rows: Sequence[Sequence[int]]) -> Flat:
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    ids = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.uint32, count=int(lengths.sum()))
    return ids, lengths


@dataclass
class HuggingFaceTokenizer:
    """A tokenizer.json, by the library `tokenizers`."""

    name: str
    backend: Any
    vocab_size: int
    eod_id: int | None
    bos_id: int | None

    def encode_flat(self, texts: Sequence[str]) -> Flat:
        """See `Tokenizer`."""
        return _flat([encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)])

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return str(self.backend.decode([int(token) for token in ids], skip_special_tokens=False))


@dataclass
class SentencePieceTokenizer:
    """A SentencePiece model."""

    name: str
    backend: Any
    vocab_size: int
    eod_id: int | None
    bos_id: int | None

    def encode_flat(self, texts: Sequence[str]) -> Flat:
        """See `Tokenizer`."""
        return _flat(self.backend.encode(list(texts), add_bos=False, add_eos=False))

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return str(self.backend.decode([int(token) for token in ids]))


@dataclass
class NullTokenizer:
    """Text that is ids already, with spaces between: "17 4 32"; the last id is the end of a document."""

    vocab_size: int
    eod_id: int | None
    name: str = "NullTokenizer"
    bos_id: int | None = None

    def encode_flat(self, texts: Sequence[str]) -> Flat:
        """See `Tokenizer`.

        Raises:
            DataError: a word that is no id of the vocabulary.
        """
        try:
            rows = [[int(word) for word in text.split()] for text in texts]
        except ValueError as error:
            raise DataError(f"NullTokenizer: {error}", "whole numbers with spaces between") from error
        for row in rows:
            if row and not 0 <= min(row) <= max(row) < self.vocab_size:
                raise DataError(f"NullTokenizer: ids {min(row)} to {max(row)}", f"0 to {self.vocab_size - 1}")
        return _flat(rows)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return " ".join(str(int(token)) for token in ids)


def _named_id(backend: Any, names: Sequence[str]) -> int | None:
    for name in names:
        token = backend.token_to_id(name)
        if token is not None:
            return int(token)
    return None


def _special_names(folder: Path, key: str) -> tuple[str, ...]:
    """What the folder's tokenizer_config.json calls a special token."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return ()
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path} cannot be read: {error}", "a JSON object") from error
    name = value.get("content") if isinstance(value, dict) else value
    return (name,) if isinstance(name, str) else ()


def _hugging_face(model: str, eod_token: str | None) -> HuggingFaceTokenizer:
    from tokenizers import Tokenizer as Backend

    path = Path(model)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"--tokenizer-model {model}: {file} does not exist", "a tokenizer.json or a folder with one", "check the path")
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the library raises bare exceptions
        raise DataError(f"{file} is no tokenizer: {error}", "a tokenizer.json of Hugging Face's tokenizers") from error
    backend.no_truncation()
    backend.no_padding()
    eod = _eod(backend, (eod_token,) if eod_token else (*_special_names(file.parent, "eos_token"), *_EOD_NAMES), eod_token)
    bos = _named_id(backend, (*_special_names(file.parent, "bos_token"), *_BOS_NAMES))
    vocab = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    return HuggingFaceTokenizer(str(file), backend, vocab, eod, bos)


def _eod(backend: Any, names: Sequence[str], asked: str | None) -> int | None:
    eod = _named_id(backend, names)
    if asked is not None and eod is None:
        raise DataError(f"--eod-token {asked} is not in the vocabulary", "a token of the vocabulary", "check its spelling")
    return eod


def _sentence_piece(model: str, eod_token: str | None) -> SentencePieceTokenizer:
    import sentencepiece

    if not Path(model).is_file():
        raise DataError(f"--tokenizer-model {model} does not exist", "a SentencePiece .model file", "check the path")
    backend = sentencepiece.SentencePieceProcessor()
    try:
        backend.load(model)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{model} is no SentencePiece model: {error}", "a SentencePiece .model file") from error
    eod = backend.eos_id() if backend.eos_id() >= 0 else None
    if eod_token is not None:
        eod = backend.piece_to_id(eod_token)
        if backend.id_to_piece(eod) != eod_token:
            raise DataError(f"--eod-token {eod_token} is not in the vocabulary", "a piece of the vocabulary", "check its spelling")
    bos = backend.bos_id() if backend.bos_id() >= 0 else None
    return SentencePieceTokenizer(model, backend, backend.get_piece_size(), eod, bos)


def _gpt2(vocab_file: str | None, merge_file: str | None, eod_token: str | None) -> HuggingFaceTokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    if vocab_file is None or merge_file is None:
        raise DataError("GPT2BPETokenizer without its files", "--vocab-file vocab.json --merge-file merges.txt", "give both")
    try:
        backend = Backend(models.BPE.from_file(vocab_file, merge_file))
    except Exception as error:  # the library raises bare exceptions
        raise DataError(f"{vocab_file} and {merge_file} are no GPT-2 vocabulary: {error}", "vocab.json and merges.txt") from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id("<|endoftext|>") is not None:
        backend.add_special_tokens(["<|endoftext|>"])
    eod = _eod(backend, (eod_token,) if eod_token else _EOD_NAMES, eod_token)
    return HuggingFaceTokenizer(vocab_file, backend, max(backend.get_vocab().values()) + 1, eod, None)


def _merges_of(model: str, told: str | None) -> str | None:
    """The merges that belong to a vocab.json; None where the model is a tokenizer.json, or a folder with one."""
    path = Path(model)
    if path.is_dir() or path.name == "tokenizer.json":
        return None
    beside = [
        path.with_name(name)
        for name in ("merges.txt", f"{path.stem.replace('vocab', 'merges')}.txt", f"{path.stem.replace('vocab', 'merge')}.txt")
    ]
    return next((str(file) for file in (*([Path(told)] if told else []), *beside) if file.is_file()), None)


def load_tokenizer(
    tokenizer_type: str,
    tokenizer_model: str | None = None,
    *,
    vocab_file: str | None = None,
    merge_file: str | None = None,
    vocab_size: int | None = None,
    eod_token: str | None = None,
    tiktoken_pattern: str | None = None,
    special_tokens: Sequence[str] | None = None,
) -> Tokenizer:
    """Loads a tokenizer from local files.

    Args:
        tokenizer_type: one of `TYPES`.
        tokenizer_model: its file or folder; of GPT2BPETokenizer also its vocab.json, where its merges are told or beside it.
        vocab_file: of GPT2BPETokenizer.
        merge_file: of GPT2BPETokenizer.
        vocab_size: of NullTokenizer.
        eod_token: the end-of-document token, where the usual names do not fit.
        tiktoken_pattern: of TikTokenizer, see `tiktoken_files`.
        special_tokens: of TikTokenizer, see `tiktoken_files`.

    Raises:
        DataError: an unknown type, or files that are missing or broken.
    """
    if tokenizer_type not in TYPES:
        raise DataError(f"--tokenizer-type {tokenizer_type}", ", ".join(TYPES), "choose one of them")
    if tokenizer_type == "NullTokenizer":
        if vocab_size is None and tokenizer_model is not None and tokenizer_model.isdigit():
            vocab_size = int(tokenizer_model)
        if vocab_size is None or vocab_size < 2:
            raise DataError("NullTokenizer without the size of its vocabulary", "--vocab-size N from 2", "give it")
        return NullTokenizer(vocab_size, eod_id=vocab_size - 1)
    if tokenizer_type == "GPT2BPETokenizer" and (tokenizer_model is None or (merge_file := _merges_of(tokenizer_model, merge_file))):
        return _gpt2(vocab_file or tokenizer_model, merge_file, eod_token)
    if tokenizer_model is None:
        raise DataError(f"{tokenizer_type} without --tokenizer-model", "a local file or folder", "give --tokenizer-model")
    if tokenizer_type in ("SentencePieceTokenizer", "Llama2Tokenizer"):
        return _sentence_piece(tokenizer_model, eod_token)
    if tokenizer_type == "TikTokenizer":
        return load_tiktoken(tokenizer_model, eod_token, tiktoken_pattern, special_tokens)
    return _hugging_face(tokenizer_model, eod_token)


def load_from_metadata(told: Mapping[str, Any], tokenizer_type: str | None = None, tokenizer_model: str | None = None) -> Tokenizer:
    """The tokenizer that a dataset's side file tells of, or the one given in its place.

    Args:
        told: entries of the side file.
        tokenizer_type: as the user gives it, or None.
        tokenizer_model: as the user gives it, or None: for instance because the files are elsewhere now.

    Raises:
        ConfigError: no tokenizer is known, or not how it splits text.
        DataError: its files are missing or broken.
    """
    kind, model = tokenizer_type or told.get("tokenizer_type"), tokenizer_model or told.get("tokenizer_model")
    if kind is None:
        raise ConfigError("the checkpoint does not know its tokenizer", "--tokenizer-type and --tokenizer-model", "give them")
    more = told if kind == told.get("tokenizer_type") else {}
    pattern = more.get("tiktoken_pattern") or None
    if kind == "TikTokenizer" and pattern is None:
        raise ConfigError(
            "TikTokenizer without its pattern, which neither its file nor the data's side file tells",
            "data preprocessed by this version, or the tokenizer as tokenizer.json",
            "give --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json",
        )
    special = more.get("special_tokens") or None
    tokenizer = load_tokenizer(kind, model, merge_file=more.get("merge_file") or None, tiktoken_pattern=pattern, special_tokens=special)
    # Documents of the data end with what was asked for when they were made.
    if more.get("eod_id") is not None:
        tokenizer.eod_id = int(more["eod_id"])
    return tokenizer


def tokenizer_to_show(told: tuple[str, str] | None, tokenizer_type: str | None, tokenizer_model: str | None) -> Tokenizer | None:
    """The tokenizer to show a dataset's text with: the one given, else the one that its side file tells of.

    Args:
        told: type and model there; None: there is no side file.
        tokenizer_type: as the user gives it, or None.
        tokenizer_model: as the user gives it, or None.

    Returns:
        None where none is known, or the one that is told of is not there any more: ids are shown then.

    Raises:
        DataError: the one given is missing or broken.
    """
    kind, model = tokenizer_type or (told[0] if told else None), tokenizer_model or (told[1] if told else None)
    if kind is None:
        return None
    try:
        return load_tokenizer(kind, model)
    except DataError as error:
        if tokenizer_type:
            raise
        print(f"tokens are shown as ids: {error.what}", file=sys.stderr)
        return None


def tokenizer_of_checkpoint(
    data_metadata: Mapping[str, Any], tokenizer_type: str | None, tokenizer_model: str | None, vocab_size: int
) -> Tokenizer:
    """The tokenizer for a checkpoint's texts: the one given, else the one that its training data was made with.

    Args:
        data_metadata: what the checkpoint knows of its data; may be empty.
        tokenizer_type: as the user gives it, or None.
        tokenizer_model: as the user gives it, or None.
        vocab_size: of the model.

    Raises:
        ConfigError: no tokenizer is known, or one with more ids than the model has.
        DataError: its files are missing or broken.
    """
    tokenizer = load_from_metadata(data_metadata, tokenizer_type, tokenizer_model)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {vocab_size}", "the tokenizer of the training data")
    return tokenizer
