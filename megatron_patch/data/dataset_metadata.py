"""PREFIX.json beside a dataset: how it was tokenized, what it holds, and its checksums. Optional to read, always written by our tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_patch.data.storage import exists, read_bytes
from megatron_patch.errors import DataError
from megatron_patch.utils.files import write_durably
from megatron_patch.utils.records import record_from_json

FORMAT = "megatron_patch/dataset-1"
COMPATIBLE_FIELDS = ("tokenizer_type", "vocab_size", "eod_id", "append_eod", "prepend_bos", "tokenizer_xxh64", "tiktoken_pattern")


@dataclass(frozen=True)
class DatasetMetadata:
    """What a side file says.

    Args:
        tokenizer_type: as `load_tokenizer` takes it.
        tokenizer_model: its file or folder.
        vocab_size: ids are below this.
        eod_id: id of the end-of-document token, or None.
        documents: number of documents.
        tokens: number of tokens.
        dtype: of the tokens.
        append_eod: whether each document ends with the end-of-document token.
        prepend_bos: whether each begins with the beginning-of-sequence token.
        patch_align: documents are padded with end-of-document tokens to multiples of this; 1: they are not.
        bin_bytes: size of PREFIX.bin.
        idx_bytes: size of PREFIX.idx.
        bin_xxh64: checksum of PREFIX.bin.
        idx_xxh64: checksum of PREFIX.idx.
        tokenizer_xxh64: checksum of the tokenizer's files; "": unknown.
        run_xxh64: checksum of what the run read and of its settings; "": unknown.
        merge_file: of GPT2BPETokenizer, whose `tokenizer_model` is its vocabulary.
        tiktoken_pattern: of TikTokenizer, as `load_tokenizer` takes it.
        special_tokens: of TikTokenizer.
    """

    tokenizer_type: str
    tokenizer_model: str
    vocab_size: int
    eod_id: int | None
    documents: int
    tokens: int
    dtype: str
    append_eod: bool
    prepend_bos: bool
    patch_align: int
    bin_bytes: int
    idx_bytes: int
    bin_xxh64: str
    idx_xxh64: str
    tokenizer_xxh64: str = ""
    run_xxh64: str = ""
    merge_file: str = ""
    tiktoken_pattern: str = ""
    special_tokens: tuple[str, ...] = ()


def metadata_path(prefix: str) -> Path:
    """The side file of a dataset."""
    return Path(f"{prefix}.json")


def read_metadata(prefix: str) -> DatasetMetadata | None:
    """Reads a side file; None where there is none.

    Raises:
        DataError: it is no side file of this format.
    """
    path = f"{prefix}.json"
    if not exists(path):
        return None
    try:
        data = json.loads(read_bytes(path))
        if data.pop("format", None) != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        info = record_from_json(DatasetMetadata, {f.name: data[f.name] for f in fields(DatasetMetadata) if f.name in data})
        if info.vocab_size < 1 or info.patch_align < 1:
            raise ValueError("vocab_size and patch_align must be whole numbers from 1")
        return info
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} is no side file: {error}", "what tools/preprocess_data.py writes", "remove it or preprocess again"
        ) from error


def write_metadata(prefix: str, info: DatasetMetadata) -> None:
    """Writes a side file in one step.

    Raises:
        DataError: it cannot be written.
    """
    path = metadata_path(prefix)
    try:
        write_durably(path, json.dumps({"format": FORMAT, **asdict(info)}, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}", "a writable folder with free space") from error


def check_compatible(
    one: DatasetMetadata, other: DatasetMetadata, one_prefix: str, other_prefix: str, names: Sequence[str] = COMPATIBLE_FIELDS
) -> None:
    """Datasets that are joined, or read in one run, must have been tokenized alike.

    Args:
        one: a side file.
        other: another.
        one_prefix: of the first dataset, for messages.
        other_prefix: of the other.
        names: the entries that must be equal.

    Raises:
        DataError: naming the first difference.
    """
    for name in names:
        mine, theirs = getattr(one, name), getattr(other, name)
        if mine != theirs and "" not in (mine, theirs):
            raise DataError(
                f"{one_prefix} and {other_prefix} differ in {name}: {mine} and {theirs}",
                "data that was preprocessed alike",
                "preprocess one of them again",
            )
