"""Exports a checkpoint as a folder that transformers, vLLM and other programs load.

In: a checkpoint of any parallel layout. Out: safetensors files with their index, config.json, generation_config.json and the tokenizer's
files. One tensor is in memory at a time. The folder appears under its name when it is complete; until then OUTPUT.partial holds the
finished files, and an interrupted export that is started again verifies these and continues with the next one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from megatron_patch.checkpoint.commit import MANIFEST, ManifestEntry
from megatron_patch.checkpoint.safetensors_io import write_safetensors
from megatron_patch.convert.architectures import SpecialIds, architecture_of, config_of, with_kept_keys
from megatron_patch.convert.checkpoint_io import CheckpointWeights, check_output, groups_by_size
from megatron_patch.convert.tensor_names import MappedTensor, mapped_tensors
from megatron_patch.convert.tokenizer_files import copy_tokenizer, tokenizer_of
from megatron_patch.errors import CheckpointError, ConfigError
from megatron_patch.model.precision import DTYPES
from megatron_patch.tokenizers.base import Tokenizer
from megatron_patch.utils.files import MOST_JSON_BYTES, checksum, checksum_on_disk, fsync_folder, read_json, read_small, write_durably

_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_PROGRESS = "progress.json"


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote.

    Args:
        folder: the export.
        files: names of the files of weights.
        kept: files reused from an interrupted export.
        bytes: size of all weights.
        dtype: "fp32", "bf16" or "fp16".
        tokenizer: names of the tokenizer's files.
    """

    folder: Path
    files: tuple[str, ...]
    kept: tuple[str, ...]
    bytes: int
    dtype: str
    tokenizer: tuple[str, ...]


def default_dtype(checkpoint: CheckpointWeights) -> str:
    """Returns the precision that the run computed in, or that imported weights were stored in."""
    precision = checkpoint.found.state.engine.get("precision")
    return str(precision) if precision in DTYPES else "fp32"


def to_hugging_face(
    checkpoint: CheckpointWeights,
    output: Path,
    max_shard_size: int = 5_000_000_000,
    dtype: str | None = None,
    on_file: Callable[[str], None] = lambda text: None,
) -> ExportResult:
    """Exports a checkpoint.

    Args:
        checkpoint: the checkpoint to export.
        output: a new or empty folder.
        max_shard_size: largest size of a file in bytes; a larger tensor has a file of its own.
        dtype: "fp32", "bf16" or "fp16"; None: `default_dtype`.
        on_file: called with one line of text for each file.

    Raises:
        ConfigError: no architecture computes the model's shape, or the tokenizer has more ids than the model.
        CheckpointError: the output folder is not empty, or cannot be written.
        DataError: the tokenizer that the checkpoint names cannot be read.
    """
    check_output(output)
    dtype = dtype or default_dtype(checkpoint)
    architecture = architecture_of(checkpoint.shape, checkpoint.family)
    tensors = mapped_tensors(checkpoint.shape, architecture.tensors, architecture.biased)
    tokenizer = tokenizer_of(checkpoint.data_metadata)
    if tokenizer is not None and tokenizer.vocab_size > checkpoint.shape.vocab_size:
        raise ConfigError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, but the model has {checkpoint.shape.vocab_size}",
            "the tokenizer of the training data",
            "give --tokenizer-type and --tokenizer-model",
        )
    config = config_of(architecture, checkpoint.shape, _TORCH_NAMES[dtype], *_special_ids(checkpoint, tokenizer))
    config = with_kept_keys(config, checkpoint.found.state.kept_config)
    partial = output.with_name(output.name + ".partial")
    sizes = [int(torch.Size(tensor.shape).numel()) * _dtype_of(tensor, DTYPES[dtype]).itemsize for tensor in tensors]
    shards = groups_by_size(sizes, max_shard_size)
    names = (
        ["model.safetensors"] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    source = {"checkpoint": _identity(checkpoint), "dtype": dtype, "max_shard_size": max_shard_size, "shards": len(shards)}
    try:
        done = _resume(partial, source)
        kept = tuple(done)
        for name, shard in zip(names, shards, strict=True):
            if name in done:
                on_file(f"{name}: kept from the interrupted export; its checksum matches")
                continue
            done[name] = _write_shard(partial / name, [tensors[number] for number in shard], checkpoint, DTYPES[dtype])
            _write_progress(partial, source, done)
            on_file(f"{name}: {done[name].size:,} bytes")
        weight_map = {tensors[number].name: name for name, shard in zip(names, shards, strict=True) for number in shard}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
        write_durably(partial / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        write_durably(partial / "config.json", json.dumps(config, indent=2) + "\n")
        generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
        write_durably(partial / "generation_config.json", json.dumps(generation, indent=2) + "\n")
        tokenizer_names = tuple(copy_tokenizer(checkpoint.data_metadata, partial))
        (partial / _PROGRESS).unlink()
        fsync_folder(partial)
        os.replace(partial, output)
        fsync_folder(output.parent)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {partial}: {error.strerror}", "a folder with free space", "free space and run the same command again"
        ) from error
    return ExportResult(output, tuple(names), kept, sum(sizes), dtype, tokenizer_names)


def _special_ids(checkpoint: CheckpointWeights, tokenizer: Tokenizer | None) -> tuple[SpecialIds, SpecialIds]:
    """Returns (bos, eos): from the imported config.json if there is one, otherwise from the tokenizer."""
    imported = checkpoint.found.state.special_ids
    if imported is not None and not checkpoint.tokenizer:
        return imported.get("bos_token_id"), imported.get("eos_token_id")
    return (tokenizer.bos_id, tokenizer.eod_id) if tokenizer else (None, checkpoint.data_metadata.get("eod_id"))


def _identity(checkpoint: CheckpointWeights) -> str:
    """The checksum of the checkpoint's manifest, which holds the checksums of all its files."""
    return xxhash.xxh64(read_small(checkpoint.found.folder / MANIFEST, MOST_JSON_BYTES)).hexdigest()


def _dtype_of(tensor: MappedTensor, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of a tensor in an export with this dtype."""
    return torch.float32 if tensor.float32 else dtype


def _write_shard(path: Path, tensors: list[MappedTensor], checkpoint: CheckpointWeights, dtype: torch.dtype) -> ManifestEntry:
    # Tensors of wider dtypes come first, so that each begins at a multiple of its element's size.
    tensors = sorted(tensors, key=lambda tensor: -_dtype_of(tensor, dtype).itemsize)
    names = [(tensor.name, tensor.shape) for tensor in tensors]
    dtypes = {tensor.name: torch.float32 for tensor in tensors if tensor.float32}
    converted = (_convert_dtype(tensor, checkpoint, _dtype_of(tensor, dtype)) for tensor in tensors)
    entry = write_safetensors(path, names, dtype, converted, {"format": "pt"}, dtypes)
    if checksum_on_disk(path) != entry.xxh64:
        raise CheckpointError(
            f"{path}: the data read back differs from what was written", "a disk without faults", "choose an --output on another disk"
        )
    return entry


def _convert_dtype(mapped: MappedTensor, checkpoint: CheckpointWeights, dtype: torch.dtype) -> torch.Tensor:
    tensor = mapped.join(checkpoint.parameter)
    result = tensor.to(dtype)
    if dtype == torch.float16 and not bool(torch.isfinite(result).all()) and bool(torch.isfinite(tensor).all()):
        raise CheckpointError(
            f"tensor {mapped.name} has values up to {float(tensor.abs().max()):.3g}, which float16 cannot represent",
            "values up to 65504",
            "use --dtype bf16 or fp32",
        )
    return result


def _write_progress(partial: Path, source: Mapping[str, Any], done: Mapping[str, ManifestEntry]) -> None:
    text = json.dumps({"source": source, "done": {name: asdict(entry) for name, entry in done.items()}})
    write_durably(partial / _PROGRESS, text + "\n")


def _resume(partial: Path, source: Mapping[str, Any]) -> dict[str, ManifestEntry]:
    """Returns the valid files that an interrupted export of the same checkpoint left; removes everything else from its folder."""
    done: dict[str, ManifestEntry] = {}
    try:
        progress = read_json(partial / _PROGRESS)
        if progress["source"] == source:
            done = {str(name): ManifestEntry(**entry) for name, entry in progress["done"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        done = {}
    if partial.is_symlink() or (partial.exists() and not (partial / _PROGRESS).is_file() and any(partial.iterdir())):
        raise CheckpointError(
            f"{partial} exists and is not an unfinished export",
            "an --output whose OUTPUT.partial does not exist",
            "choose another --output",
        )
    partial.mkdir(parents=True, exist_ok=True)
    valid = {name: entry for name, entry in done.items() if _is_valid(partial / name, entry)}
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in valid and path.name != _PROGRESS:
            path.unlink()
    _write_progress(partial, source, valid)
    return valid


def _is_valid(path: Path, entry: ManifestEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.size and checksum(path) == entry.xxh64
