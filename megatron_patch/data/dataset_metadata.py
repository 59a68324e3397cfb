"""A dataset's metadata file PREFIX.json: how the data was tokenized, its sizes and its checksums.

In: a dataset prefix. Out: `DatasetMetadata`. The tools of this repository always write the file; datasets of Megatron-LM have none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_patch.data.storage import exists, read_bytes
from megatron_patch.errors import DataError
from megatron_patch.utils.files import write_durably
from megatron_patch.utils.records import record_from_json

_MOST_BYTES = 1 << 24
FORMAT = "megatron_patch/dataset-1"
FIELDS_THAT_MUST_MATCH = (
    "tokenizer_type",
    "vocab_size",
    "eod_id",
    "append_eod",
    "prepend_bos",
    "bos_id",
    "tokenizer_xxh64",
    "tiktoken_pattern",
)


@dataclass(frozen=True)
class DatasetMetadata:
    """The content of a metadata file.

    Args:
        tokenizer_type: a name in `tokenizers.base.TOKENIZERS`.
        tokenizer_model: its file or folder.
        vocab_size: all token ids are below this.
        eod_id: id of the end-of-document token, or None.
        documents: number of documents.
        tokens: number of tokens.
        dtype: type of the tokens.
        append_eod: whether each document ends with the end-of-document token.
        prepend_bos: whether each document begins with the beginning-of-sequence token.
        patch_align: documents are padded with end-of-document tokens to multiples of this; 1 for no padding.
        bin_bytes: size of PREFIX.bin.
        idx_bytes: size of PREFIX.idx.
        bin_xxh64: xxh64 checksum of PREFIX.bin.
        idx_xxh64: xxh64 checksum of PREFIX.idx.
        tokenizer_xxh64: checksum of the tokenizer's files; "" if unknown.
        run_xxh64: checksum of the inputs and settings of the preprocessing run; "" if unknown.
        merge_file: merges.txt of GPT2BPETokenizer, whose `tokenizer_model` is its vocab.json.
        tiktoken_pattern: pattern of TikTokenizer, see `tokenizers.tiktoken`.
        special_tokens: special tokens of TikTokenizer, see `tokenizers.tiktoken`.
        bos_id: id of the beginning-of-sequence token; None if there is none, or if it is unknown.
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
    bos_id: int | None = None


def metadata_path(prefix: str) -> Path:
    """Returns the path of a dataset's metadata file."""
    return Path(f"{prefix}.json")


def read_metadata(prefix: str) -> DatasetMetadata | None:
    """Reads a dataset's metadata file; returns None if it does not exist.

    Raises:
        DataError: the file is not a metadata file of this format.
    """
    path = f"{prefix}.json"
    if not exists(path):
        return None
    try:
        data = json.loads(read_bytes(path, _MOST_BYTES))
        if data.pop("format", None) != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        metadata = record_from_json(DatasetMetadata, {f.name: data[f.name] for f in fields(DatasetMetadata) if f.name in data})
        if metadata.vocab_size < 1 or metadata.patch_align < 1:
            raise ValueError("vocab_size and patch_align must be whole numbers from 1")
        return metadata
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} is not a dataset's metadata file: {error}",
            "a file that tools/preprocess_data.py wrote",
            "remove the file, or preprocess the data again",
        ) from error


def write_metadata(prefix: str, metadata: DatasetMetadata) -> None:
    """Writes a dataset's metadata file atomically.

    Raises:
        DataError: the file cannot be written.
    """
    path = metadata_path(prefix)
    try:
        write_durably(path, json.dumps({"format": FORMAT, **asdict(metadata)}, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}", "a writable folder with free space", "free space") from error


def check_compatible(
    one: DatasetMetadata, other: DatasetMetadata, one_prefix: str, other_prefix: str, names: Sequence[str] = FIELDS_THAT_MUST_MATCH
) -> None:
    """Checks that two datasets that will be merged or read in one run were tokenized in the same way.

    Args:
        one: metadata of the first dataset.
        other: metadata of the second dataset.
        one_prefix: prefix of the first dataset, for messages.
        other_prefix: prefix of the second dataset, for messages.
        names: fields that must be equal, unless one is unknown.

    Raises:
        DataError: a field differs; the message names the first one.
    """
    for name in names:
        left, right = getattr(one, name), getattr(other, name)
        # "" means unknown; older files have no bos_id.
        unknown = "" in (left, right) or (name == "bos_id" and None in (left, right))
        if left != right and not unknown:
            raise DataError(
                f"{one_prefix} and {other_prefix} differ in {name}: {left} and {right}",
                "data that was preprocessed in the same way",
                "preprocess one of them again",
            )
