"""From text to what pretraining reads: a tokenizer and datasets. In: files. Out: their paths and counts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from megatron_patch.api.arguments import path, switch, whole
from megatron_patch.errors import ConfigError
from megatron_patch.preprocess import pipeline
from megatron_patch.preprocess import train_tokenizer as tokenizer_training
from megatron_patch.preprocess.encode import EncodeSettings
from megatron_patch.preprocess.summary import Summary
from megatron_patch.utils.console import print_line
from megatron_patch.utils.registry import suggestion
from megatron_patch.utils.units import parse_count

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
_FIXED = ("tokenizer_type", "tokenizer_model", "keys", "append_eod", "dtype")
_COUNTS = ("vocab_size", "patch_align", "min_chars", "max_chars", "min_tokens", "max_tokens")


def as_paths(paths: Paths) -> list[str]:
    """Returns one path or several as a list of texts."""
    if isinstance(paths, (str, os.PathLike)) or not isinstance(paths, Iterable):
        return [path("the input", paths)]
    return [path("an input", one) for one in paths]


def _notice(text: str) -> None:
    print_line(text, stderr=True)


def train_tokenizer(
    inputs: Paths, output: str | os.PathLike[str], vocab_size: int | str, *, json_key: str = "text", max_bytes: int | str = "200M"
) -> Path:
    """Trains a byte-level BPE tokenizer.

    Args:
        inputs: files or globs: .jsonl, .txt, .parquet, also compressed.
        output: folder to write tokenizer.json and tokenizer_config.json to.
        vocab_size: number of ids, including the 256 bytes and the end-of-document token.
        json_key: JSON key of the text.
        max_bytes: bytes of text to read at most.

    Returns:
        The path of tokenizer.json.

    Raises:
        ConfigError: a number is not one.
        DataError: the text cannot be read or is too short, or the output cannot be written.
    """
    return tokenizer_training.train_tokenizer(
        as_paths(inputs), path("output", output), parse_count(str(vocab_size)), json_key, parse_count(str(max_bytes)), notice=_notice
    )


def preprocess(
    inputs: Paths,
    output_prefix: str | os.PathLike[str],
    *,
    tokenizer_type: str = "HuggingFaceTokenizer",
    tokenizer_model: str | os.PathLike[str] | None = None,
    json_keys: str | Sequence[str] = ("text",),
    append_eod: bool = False,
    workers: int = 1,
    on_bad_line: Literal["skip", "fail"] = "skip",
    overwrite: bool = False,
    resume: bool = False,
    dedup: bool = False,
    shuffle_documents: int | None = None,
    txt_separator: str | bytes | None = None,
    **settings: Any,
) -> Summary:
    """Turns text into the datasets that pretraining reads.

    Args:
        inputs: files or globs: .jsonl, .txt, .parquet, also compressed.
        output_prefix: the outputs are PREFIX_KEY_document.bin, .idx and .json, for each key.
        tokenizer_type: kind of tokenizer.
        tokenizer_model: the tokenizer's file or folder.
        json_keys: one JSON key of the text, or several; each key has its own output.
        append_eod: whether each document ends with the end-of-document token.
        workers: number of processes that encode. With more than one, a script must call this function below `if __name__ == "__main__":`,
            because the processes import the script.
        on_bad_line: leave bad lines out and list them, or stop at the first one.
        overwrite: replace existing outputs.
        resume: resume an unfinished run, if there is one.
        dedup: leave out documents whose tokens equal those of an earlier one.
        shuffle_documents: seed of a random order of the documents; None: the order of the input.
        txt_separator: text between the documents of a .txt file; None: each file is one document.
        settings: further fields of `megatron_patch.preprocess.encode.EncodeSettings`, such as `prepend_bos=True` or `max_tokens=4096`.

    Returns:
        What was written: `outputs` (the prefixes for `data_path`), `documents`, `tokens`, `vocab_size`, `bad_lines` and more.

    Raises:
        ConfigError: a setting or a kind of tokenizer is unknown.
        DataError: the input or the tokenizer cannot be read, there are no documents, or the outputs exist or cannot be written.
    """
    known = [field.name for field in fields(EncodeSettings) if field.name not in _FIXED]
    for name in settings:
        if name not in known:
            raise ConfigError(f"preprocess: unknown setting {name}", ", ".join(known), suggestion(name, known) or f"remove {name}")
        if name in _COUNTS and settings[name] is not None:
            settings[name] = whole(name, settings[name], 0)
    if on_bad_line not in ("skip", "fail"):
        raise ConfigError(f"on_bad_line={on_bad_line!r}", '"skip" or "fail"', "choose one of them")
    keys = (json_keys,) if isinstance(json_keys, str) else tuple(json_keys)
    if not keys or not all(isinstance(key, str) for key in keys):
        raise ConfigError(f"json_keys={json_keys!r}"[:200], "at least one key, each a text", 'write json_keys=["text"], for example')
    model = None if tokenizer_model is None else path("tokenizer_model", tokenizer_model)
    encode = EncodeSettings(tokenizer_type, model, keys=keys, append_eod=switch("append_eod", append_eod), **settings)
    return pipeline.preprocess(
        as_paths(inputs),
        path("output_prefix", output_prefix),
        encode,
        workers=whole("workers", workers, 1),
        on_bad_line=on_bad_line,
        overwrite=switch("overwrite", overwrite),
        resume=switch("resume", resume),
        separator=txt_separator.encode() if isinstance(txt_separator, str) else txt_separator,
        dedup=switch("dedup", dedup),
        shuffle_seed=None if shuffle_documents is None else whole("shuffle_documents", shuffle_documents, 0),
        notice=_notice,
    )
