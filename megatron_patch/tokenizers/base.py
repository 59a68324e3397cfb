"""Registers the tokenizers, and loads one. In: a type and local files. Out: a `Tokenizer` (`tokenizers.interface`).

Hugging Face's `tokenizers`, `sentencepiece` and `tiktoken` are the references. Preprocessing encodes with the faster `fastokens` where
that is installed and agrees with the reference (`preprocess.fast_encoder`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_patch.errors import ConfigError, DataError
from megatron_patch.tokenizers.hugging_face import HuggingFaceTokenizer, load_gpt2, load_hugging_face
from megatron_patch.tokenizers.interface import Flat, Tokenizer, TokenizerOptions, encode
from megatron_patch.tokenizers.null import NullTokenizer, load_null
from megatron_patch.tokenizers.sentencepiece import SentencePieceTokenizer, load_sentencepiece
from megatron_patch.tokenizers.special_tokens import FLAGS
from megatron_patch.tokenizers.tiktoken import load_tiktoken
from megatron_patch.utils.console import print_line
from megatron_patch.utils.registry import lookup

__all__ = [
    "TOKENIZERS",
    "Flat",
    "HuggingFaceTokenizer",
    "NullTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "TokenizerOptions",
    "encode",
    "load_from_metadata",
    "load_tokenizer",
    "load_tokenizer_for_display",
    "prompt_ids",
    "require_special_tokens",
    "token_text",
    "tokenizer_of_checkpoint",
    "without_eod",
]

TOKENIZERS: dict[str, Callable[[TokenizerOptions], Tokenizer]] = {
    "HuggingFaceTokenizer": load_hugging_face,
    "SentencePieceTokenizer": load_sentencepiece,
    "Llama2Tokenizer": load_sentencepiece,
    "GPT2BPETokenizer": load_gpt2,
    "TikTokenizer": load_tiktoken,
    "NullTokenizer": load_null,
}
"""The loaders of --tokenizer-type by name; your own script may add loaders.

A loader takes the options that were given, returns a `Tokenizer`, and raises DataError where its files are missing or damaged."""


def load_tokenizer(
    tokenizer_type: str,
    tokenizer_model: str | None = None,
    *,
    vocab_file: str | None = None,
    merge_file: str | None = None,
    vocab_size: int | None = None,
    eod_token: str | None = None,
    bos_token: str | None = None,
    eod_id: int | None = None,
    bos_id: int | None = None,
    tiktoken_pattern: str | None = None,
    special_tokens: Sequence[str] | None = None,
) -> Tokenizer:
    """Loads a tokenizer from local files.

    Args:
        tokenizer_type: a name in `TOKENIZERS`.
        tokenizer_model: its file or folder; for GPT2BPETokenizer also a vocab.json whose merges file is given or lies next to it.
        vocab_file: this and the arguments below are explained in `TokenizerOptions`.
        merge_file: see `TokenizerOptions`.
        vocab_size: see `TokenizerOptions`.
        eod_token: see `TokenizerOptions`.
        bos_token: see `TokenizerOptions`.
        eod_id: see `TokenizerOptions`.
        bos_id: see `TokenizerOptions`.
        tiktoken_pattern: see `TokenizerOptions`.
        special_tokens: see `TokenizerOptions`.

    Raises:
        DataError: an unknown type, or files that are missing or damaged.
    """
    load = lookup(TOKENIZERS, tokenizer_type, "--tokenizer-type", error=DataError)
    return load(
        TokenizerOptions(
            model=tokenizer_model,
            vocab_file=vocab_file,
            merge_file=merge_file,
            vocab_size=vocab_size,
            eod_token=eod_token,
            bos_token=bos_token,
            eod_id=eod_id,
            bos_id=bos_id,
            tiktoken_pattern=tiktoken_pattern,
            special_tokens=special_tokens,
        )
    )


def require_special_tokens(tokenizer: Tokenizer, eod: bool, bos: bool) -> None:
    """Checks that a tokenizer has the special tokens that are added to documents.

    Args:
        tokenizer: the tokenizer.
        eod: whether documents end with the end-of-document token.
        bos: whether documents begin with the beginning-of-sequence token.

    Raises:
        DataError: it lacks one; the message says why.
    """
    roles = (
        (eod, tokenizer.eod_id, "no_eod", "end-of-document", FLAGS["eos"]),
        (bos, tokenizer.bos_id, "no_bos", "beginning-of-sequence", FLAGS["bos"]),
    )
    for needed, token, reason, words, flag in roles:
        if needed and token is None:
            why = getattr(tokenizer, reason, "")
            raise DataError(
                f"{tokenizer.name} has no {words} token" + (f": {why}" if why else ""),
                f"a tokenizer whose files name one, or {flag} NAME",
                f"name a token of the vocabulary with {flag}",
            )


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Returns the name of a token in the vocabulary, or its text where the tokenizer's library has no names."""
    named = getattr(tokenizer, "token_text", None)
    return str(named(token)) if named is not None else tokenizer.decode([token])


def load_from_metadata(metadata: Mapping[str, Any], tokenizer_type: str | None = None, tokenizer_model: str | None = None) -> Tokenizer:
    """Loads the tokenizer that a dataset's metadata file names, or the one given instead.

    Args:
        metadata: entries of the metadata file; may be empty.
        tokenizer_type: the type that the user gave, or None.
        tokenizer_model: the file or folder that the user gave, for example because the files have moved; or None.

    Raises:
        ConfigError: no tokenizer is known, or the pattern of a TikTokenizer is not.
        DataError: its files are missing or damaged.
    """
    kind, model = tokenizer_type or metadata.get("tokenizer_type"), tokenizer_model or metadata.get("tokenizer_model")
    if kind is None:
        raise ConfigError(
            "the metadata of the data names no tokenizer",
            "--tokenizer-type and --tokenizer-model",
            "give --tokenizer-type and --tokenizer-model",
        )
    more = metadata if kind == metadata.get("tokenizer_type") else {}
    pattern = more.get("tiktoken_pattern") or None
    if kind == "TikTokenizer" and pattern is None:
        raise ConfigError(
            "the pattern of the TikTokenizer is unknown: neither its file nor the dataset's metadata file holds it",
            "data preprocessed by this version, or the tokenizer as tokenizer.json",
            "give --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json",
        )
    # The documents of the data begin and end with the tokens that were chosen when the data was made.
    eod, bos = more.get("eod_id"), more.get("bos_id")
    merges = more.get("merge_file") or None
    tokenizer = load_tokenizer(
        kind,
        model,
        merge_file=merges if merges is not None and Path(merges).is_file() else None,  # otherwise it has moved with its vocab.json
        eod_id=None if eod is None else int(eod),
        bos_id=None if bos is None else int(bos),
        tiktoken_pattern=pattern,
        special_tokens=more.get("special_tokens") or None,
    )
    tokenizer.eod_id = tokenizer.eod_id if eod is None else int(eod)
    return tokenizer


def load_tokenizer_for_display(known: tuple[str, str] | None, tokenizer_type: str | None, tokenizer_model: str | None) -> Tokenizer | None:
    """Loads the tokenizer for printing a dataset's text: the one given, else the one that its metadata file names.

    Args:
        known: type and model in the metadata file; None without a metadata file.
        tokenizer_type: the type that the user gave, or None.
        tokenizer_model: the file or folder that the user gave, or None.

    Returns:
        None where no tokenizer is known, or the one of the metadata file cannot be loaded; the caller prints token ids then.

    Raises:
        DataError: the files of the tokenizer given are missing or damaged.
    """
    kind, model = tokenizer_type or (known[0] if known else None), tokenizer_model or (known[1] if known else None)
    if kind is None:
        return None
    try:
        return load_tokenizer(kind, model)
    except DataError as error:
        if tokenizer_type:
            raise
        print_line(f"tokens are printed as ids: {error.what}", stderr=True)
        return None


def tokenizer_of_checkpoint(
    data_metadata: Mapping[str, Any], tokenizer_type: str | None, tokenizer_model: str | None, vocab_size: int
) -> Tokenizer:
    """Loads the tokenizer for a checkpoint's texts: the one given, else the one of its training data.

    Args:
        data_metadata: the metadata of the training data, as the checkpoint holds it; may be empty.
        tokenizer_type: the type that the user gave, or None.
        tokenizer_model: the file or folder that the user gave, or None.
        vocab_size: number of token ids of the model.

    Raises:
        ConfigError: no tokenizer is known, or it has more ids than the model.
        DataError: its files are missing or damaged.
    """
    tokenizer = load_from_metadata(data_metadata, tokenizer_type, tokenizer_model)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {vocab_size}",
            f"a tokenizer of at most {vocab_size} ids",
            "give the tokenizer of the training data",
        )
    return tokenizer


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Returns the ids of a prompt; those of an empty one are the end-of-document token, after which a document starts."""
    return encode(tokenizer, prompt) or ([tokenizer.eod_id] if tokenizer.eod_id is not None else [])


def without_eod(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Returns generated ids without the end-of-document token that ends them, if any."""
    return list(ids[:-1] if ids and ids[-1] == tokenizer.eod_id else ids)
