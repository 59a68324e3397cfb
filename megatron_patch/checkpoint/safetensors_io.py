"""Safetensors files, tensor by tensor: headers read and checked before any data, files written as a stream.

The format (https://github.com/huggingface/safetensors): eight bytes with the length N of the header, N bytes of JSON that name each
tensor's dtype, shape and place, then the data. Writing needs the memory of one tensor, not of a file.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from megatron_patch.checkpoint.commit import ManifestEntry
from megatron_patch.errors import CheckpointError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000
_PIECE = 1 << 24


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor.

    Args:
        shape: its shape.
        dtype: the format's name of its dtype ("BF16").
        path: the file that holds it.
    """

    shape: tuple[int, ...]
    dtype: str
    path: Path

    @property
    def numel(self) -> int:
        """Elements."""
        return int(torch.Size(self.shape).numel())


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file, whose data is known to be whole.

    Raises:
        CheckpointError: no such file, no safetensors file, or one that ends before its data does; with the first tensor it cuts.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _LONGEST_HEADER + 1
            if length > min(size, _LONGEST_HEADER):
                raise CheckpointError(f"{path} ends inside its header ({size:,} bytes)", "a whole safetensors file", "copy it again")
            header = json.loads(file.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        infos = {name: TensorInfo(_sizes(entry["shape"]), str(entry["dtype"]), path) for name, entry in tensors.items()}
        spans = {name: _sizes(entry["data_offsets"]) for name, entry in tensors.items()}
        ends = sorted((end, name) for name, (_, end) in spans.items())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", "a readable safetensors file", "check the path") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}", "a safetensors file", "copy it again") from error
    for name, (begin, end) in spans.items():
        dtype = DTYPES.get(infos[name].dtype)
        if dtype is not None and end - begin != infos[name].numel * dtype.itemsize:
            raise CheckpointError(
                f"{path}: tensor {name} {infos[name].shape} of {infos[name].dtype} has {end - begin:,} bytes",
                f"{infos[name].numel * dtype.itemsize:,}",
                "copy it again",
            )
    for end, name in ends:
        if 8 + length + end > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {name} ends at byte {8 + length + end:,}, the file at {size:,}",
                "a whole safetensors file",
                "copy it again",
            )
    return infos


def _sizes(values: Any) -> tuple[int, ...]:
    """Whole numbers from 0 whose product no 64-bit number is too small for."""
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values) or math.prod(values) >= 1 << 62:
        raise ValueError(f"{values!r} are no sizes"[:300])
    return tuple(values)


def dtype_name(dtype: torch.dtype) -> str:
    """The format's name of a dtype."""
    return _NAMES[dtype]


def write_safetensors(
    path: Path,
    names: Sequence[tuple[str, tuple[int, ...]]],
    dtype: torch.dtype,
    tensors: Iterable[torch.Tensor],
    metadata: Mapping[str, str],
) -> ManifestEntry:
    """Writes a file as its tensors come, and forces it to disk.

    Args:
        path: of the file.
        names: (name, shape) in the order of `tensors`.
        dtype: of the file; tensors are converted.
        tensors: the data.
        metadata: strings for the header.

    Returns:
        Size and checksum of what was written.

    Raises:
        CheckpointError: the file cannot be written, or a tensor is not of its announced shape.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in names:
        begin, end = end, end + int(torch.Size(shape).numel()) * dtype.itemsize
        header[name] = {"dtype": dtype_name(dtype), "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    # The data begins at a multiple of 8 bytes, as the format's own writer has it.
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh64()
    try:
        with path.open("wb") as file:
            for start in (struct.pack("<Q", len(text)), text):
                file.write(start)
                digest.update(start)
            for (name, shape), tensor in zip(names, tensors, strict=True):
                if tuple(tensor.shape) != tuple(shape):
                    raise CheckpointError(f"tensor {name} has shape {tuple(tensor.shape)}", f"{tuple(shape)}")
                data = memoryview(tensor.to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)
                for offset in range(0, len(data), _PIECE):
                    file.write(data[offset : offset + _PIECE])
                    digest.update(data[offset : offset + _PIECE])
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror}", "a folder with free space", "free space, or choose another folder"
        ) from error
    return ManifestEntry(8 + len(text) + end, digest.hexdigest())
