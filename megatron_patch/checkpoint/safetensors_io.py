"""Safetensors files: reads and checks headers before any data, and writes files tensor by tensor.

The format (https://github.com/huggingface/safetensors): eight bytes with the length N of the header, N bytes of JSON with each tensor's
dtype, shape and data offsets, then the data. Writing needs the memory of one tensor, not of the file.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import xxhash

from megatron_patch.checkpoint.commit import ManifestEntry
from megatron_patch.errors import CheckpointError
from megatron_patch.utils.files import open_new

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000
_PIECE = 1 << 24


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in a file's header.

    Args:
        shape: the tensor's shape.
        dtype: the format's name of its dtype ("BF16").
        path: the file that contains the tensor.
    """

    shape: tuple[int, ...]
    dtype: str
    path: Path

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Returns the tensors of a file by name, after checking that the file contains all of their data.

    Raises:
        CheckpointError: the file does not exist, is not a safetensors file, or is truncated; the error names the first truncated tensor.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _LONGEST_HEADER + 1
            if length > min(size, _LONGEST_HEADER):
                raise CheckpointError(
                    f"{path} ends inside of its header ({size:,} bytes)", "a complete safetensors file", "copy the file again"
                )
            header = json.loads(file.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        infos = {name: TensorInfo(_sizes(entry["shape"]), str(entry["dtype"]), path) for name, entry in tensors.items()}
        spans = {name: _sizes(entry["data_offsets"]) for name, entry in tensors.items()}
        ends = sorted((end, name) for name, (_, end) in spans.items())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", "a readable safetensors file", "check the path") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}", "a safetensors file", "copy the file again") from error
    for name, (begin, end) in spans.items():
        dtype = DTYPES.get(infos[name].dtype)
        if dtype is not None and end - begin != infos[name].numel * dtype.itemsize:
            raise CheckpointError(
                f"{path}: tensor {name} of shape {infos[name].shape} and dtype {infos[name].dtype} has {end - begin:,} bytes",
                f"{infos[name].numel * dtype.itemsize:,} bytes",
                "copy the file again",
            )
    for end, name in ends:
        if 8 + length + end > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {name} ends at byte {8 + length + end:,}, but the file has {size:,} bytes",
                "a complete safetensors file",
                "copy the file again",
            )
    return infos


def _sizes(values: Any) -> tuple[int, ...]:
    """Returns a list of sizes as a tuple, after checking that they are whole numbers from 0 whose product fits into 64 bits."""
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values) or math.prod(values) >= 1 << 62:
        raise ValueError(f"{values!r} is not a list of sizes"[:300])
    return tuple(values)


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the format's name of a dtype: torch.bfloat16 -> "BF16"."""
    return _NAMES[dtype]


def write_safetensors(
    path: Path,
    names: Sequence[tuple[str, tuple[int, ...]]],
    dtype: torch.dtype,
    tensors: Iterable[torch.Tensor],
    metadata: Mapping[str, str],
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> ManifestEntry:
    """Writes a file tensor by tensor and forces it to disk.

    Args:
        path: the file to write.
        names: (name, shape) of each tensor, in the order of `tensors`.
        dtype: dtype in the file; tensors are converted to it.
        tensors: the data, on the CPU.
        metadata: strings for the header's `__metadata__`.
        dtypes: name -> dtype in the file, where it is another one.

    Returns:
        Size and checksum of the written file.

    Raises:
        CheckpointError: the file cannot be written, or a tensor does not have the shape in `names`.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in names:
        stored = dtypes.get(name, dtype)
        begin, end = end, end + int(torch.Size(shape).numel()) * stored.itemsize
        header[name] = {"dtype": dtype_name(stored), "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    # The data begins at a multiple of 8 bytes, as in files of the safetensors library.
    text += b" " * (-len(text) % 8)
    checksum = xxhash.xxh64()
    try:
        with open_new(path) as file:
            for start in (struct.pack("<Q", len(text)), text):
                file.write(start)
                checksum.update(start)
            for (name, shape), tensor in zip(names, tensors, strict=True):
                if tuple(tensor.shape) != tuple(shape):
                    raise CheckpointError(f"tensor {name} has shape {tuple(tensor.shape)}", f"{tuple(shape)}")
                data = memoryview(tensor.to(dtypes.get(name, dtype)).contiguous().reshape(-1).view(torch.uint8).numpy().data)
                for offset in range(0, len(data), _PIECE):
                    file.write(data[offset : offset + _PIECE])
                    checksum.update(data[offset : offset + _PIECE])
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror}", "a folder with free space", "free space, or choose another folder"
        ) from error
    return ManifestEntry(8 + len(text) + end, checksum.hexdigest())
