"""The files of weights and optimizer state in a checkpoint: each rank writes its fragments, and any rank of any layout reads any span.

In: fragments and a folder. Out: one file `state-RRRRR-of-RRRRR.safetensors` per rank with `weight/NAME` and the kinds of optimizer
state, such as `exp_avg/NAME`, for each fragment, float32 and flat; the file's header lists each fragment's parameter shape and first
element. Reading runs no stored code, needs no conversion between layouts, and loads only the requested bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_patch.checkpoint.commit import ManifestEntry
from megatron_patch.checkpoint.safetensors_io import write_safetensors
from megatron_patch.engine.fragments import Fragment
from megatron_patch.errors import CheckpointError
from megatron_patch.model.sharding import VOCABULARY_PARAMETERS, Shard
from megatron_patch.utils.files import checksum_on_disk
from megatron_patch.utils.records import record_from_json

FORMAT = "megatron_patch/state-1"


def state_file_name(rank: int, ranks: int) -> str:
    """Returns the name of a rank's file: (0, 8) -> "state-00000-of-00008.safetensors"."""
    return f"state-{rank:05d}-of-{ranks:05d}.safetensors"


def write_fragments(folder: Path, rank: int, ranks: int, fragments: Sequence[Fragment]) -> dict[str, ManifestEntry]:
    """Writes this rank's fragments, forces them to disk and verifies the file by reading it back.

    Args:
        folder: an existing folder.
        rank: this rank.
        ranks: number of ranks that write.
        fragments: spans of parameters with float32 tensors.

    Returns:
        The manifest entry of the file, by its name.

    Raises:
        CheckpointError: the file cannot be written (for example because the disk is full), or its content differs when it is read back.
    """
    path = folder / state_file_name(rank, ranks)
    tensors = [(kind, f) for f in fragments for kind in f.tensors]
    index = [
        {"name": f.name, "shape": list(f.shape), "start": f.start, "numel": f.numel}
        | ({} if f.shard is None else {"shard": [f.shard.dim, f.shard.index, f.shard.count]})
        for f in fragments
    ]
    entry = write_safetensors(
        path,
        [(f"{kind}/{f.name}", (f.numel,)) for kind, f in tensors],
        torch.float32,
        (f.tensors[kind].cpu() for kind, f in tensors),
        {"format": FORMAT, "fragments": json.dumps(index)},
    )
    try:
        matches = checksum_on_disk(path) == entry.xxh64
    except OSError as error:
        raise CheckpointError(
            f"cannot read back {path}: {error.strerror}", "a disk without faults", "change --save to a folder on another disk"
        ) from error
    if not matches:
        raise CheckpointError(
            f"{path}: the data read back differs from what was written",
            "a disk without faults",
            "change --save to a folder on another disk",
        )
    return {path.name: entry}


@dataclass(frozen=True)
class _StoredFragment:
    """A fragment as the header of a file describes it; see `Fragment`.

    Args:
        name: the parameter's name.
        shape: shape of the full parameter.
        start: first element of the span in the flattened shard.
        numel: number of elements of the span.
        shard: (dim, index, count) of the tensor-parallel shard; None if the parameter is not sharded.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    shard: tuple[int, int, int] | None = None

    @staticmethod
    def from_json(entry: Any) -> _StoredFragment:
        """Returns the fragment of a header's entry.

        Raises:
            ValueError: the entry does not describe a part of a parameter.
        """
        fragment = record_from_json(_StoredFragment, entry)
        dim, index, count = fragment.shard or (0, 0, 1)
        sizes = (*fragment.shape, fragment.start, fragment.numel, dim, index)
        if min(sizes) < 0 or count < 1 or index >= count or math.prod(fragment.shape) >= 1 << 62:
            raise ValueError(f"{entry} is not a part of a parameter"[:300])
        if fragment.shard is not None and (dim >= len(fragment.shape) or fragment.shape[dim] % count):
            raise ValueError(f"{entry} is sharded along a dimension that cannot be divided evenly"[:300])
        return fragment


@dataclass(frozen=True)
class _Span:
    """Elements of a flattened parameter, or of an inner shard of it, in one file."""

    path: Path
    start: int
    numel: int


def _local_shape(shape: tuple[int, ...], dim: int, count: int) -> tuple[int, ...]:
    return tuple(size // count if axis == dim else size for axis, size in enumerate(shape))


def _read_span(span: _Span, name: str, start: int, end: int) -> torch.Tensor:
    try:
        with safe_open(str(span.path), framework="pt") as file:
            stored = file.get_slice(name)
            if stored.get_shape() != [span.numel] or stored.get_dtype() != "F32":
                raise ValueError(f"it is {stored.get_dtype()} {stored.get_shape()} instead of F32 [{span.numel}]")
            tensor: torch.Tensor = stored[start:end]
            return tensor
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {name} in {span.path}: {error}", "a complete state file", "resume from another checkpoint"
        ) from error


def _incomplete(what: str) -> CheckpointError:
    return CheckpointError(what, "each element of each parameter exactly once", "resume from another checkpoint")


class StateFiles:
    """Reads a checkpoint's weights and optimizer state by parameter name and span, whatever layout wrote them.

    Args:
        folder: the checkpoint's folder.

    Raises:
        CheckpointError: there are no state files, one cannot be read, or the files do not contain each parameter exactly once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        # Parameter -> index of an inner shard -> spans. Shards along dimension 0 are contiguous in the flattened parameter and count as
        # one; only shards along another (inner) dimension need to be assembled.
        self._spans: dict[str, dict[int, list[_Span]]] = {}
        self._inner_shards: dict[str, tuple[int, int]] = {}
        """Parameter -> (dimension, number of shards)."""
        self._assembled: tuple[str, str, torch.Tensor] | None = None
        self._padded: dict[str, tuple[int, ...]] = {}
        paths = sorted(folder.glob("state-*-of-*.safetensors"))
        if not paths:
            raise CheckpointError(f"{folder} contains no state files", "a folder step-N that this program wrote", "check the path")
        for path in paths:
            self._read_index(path)
        for name, shards in self._spans.items():
            _, count = self._inner_shards.get(name, (0, 1))
            if sorted(shards) != list(range(min(count, len(shards) + 1))):
                raise _incomplete(f"{folder}: parameter {name} has only the shards {sorted(shards)[:8]} of {count}")
            for spans in shards.values():
                self._check_coverage(name, spans, math.prod(self.shapes[name]) // count)

    def _check_coverage(self, name: str, spans: list[_Span], numel: int) -> None:
        spans.sort(key=lambda span: span.start)
        end = 0
        for span in spans:
            if span.start != end:
                raise _incomplete(f"{self.folder}: parameter {name} has a gap or an overlap at element {end}")
            end += span.numel
        if end != numel:
            raise _incomplete(f"{self.folder}: parameter {name} has {end} of {numel} elements")

    def _read_index(self, path: Path) -> None:
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path} has format {metadata.get('format')!r}", FORMAT, "use the version of the program that wrote the checkpoint"
                )
            for fragment in (_StoredFragment.from_json(entry) for entry in json.loads(metadata["fragments"])):
                name, shape = fragment.name, fragment.shape
                if self.shapes.setdefault(name, shape) != shape:
                    raise CheckpointError(
                        f"{path}: parameter {name} has shape {shape}",
                        f"{self.shapes[name]}, as in the other files",
                        "resume from another checkpoint",
                    )
                inner_shard, start = 0, fragment.start
                if fragment.shard is not None:
                    dim, index, count = fragment.shard
                    if dim == 0:
                        start += index * (math.prod(shape) // count)
                    else:
                        inner_shard = index
                        if self._inner_shards.setdefault(name, (dim, count)) != (dim, count):
                            raise ValueError(f"parameter {name} is sharded in two different ways")
                self._spans.setdefault(name, {}).setdefault(inner_shard, []).append(_Span(path, start, fragment.numel))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"cannot read {path}: {error}", "a complete state file", "resume from another checkpoint") from error

    def check(self, expected: dict[str, tuple[int, ...]], vocab_size: int = 0) -> None:
        """Checks that the checkpoint has exactly the parameters of a model.

        Embedding and head may differ in their padding, which depends on the layout: later reads return zeros for rows that the checkpoint
        lacks.

        Args:
            expected: name -> full shape of each parameter of the model.
            vocab_size: number of rows of embedding and head without padding; 0: their shapes must be equal, too.

        Raises:
            CheckpointError: names the first parameter that is missing, unknown or has another shape.
        """
        for name, shape in expected.items():
            if name not in self.shapes:
                raise CheckpointError(
                    f"{self.folder} lacks the parameter {name} {shape}", "a checkpoint of the same model", "check the model's flags"
                )
            if (
                name in VOCABULARY_PARAMETERS
                and 0 < vocab_size <= min(shape[0], self.shapes[name][0])
                and shape[1:] == self.shapes[name][1:]
            ):
                self._padded[name] = shape
            elif self.shapes[name] != tuple(shape):
                raise CheckpointError(
                    f"{self.folder}: parameter {name} has shape {self.shapes[name]}",
                    f"{tuple(shape)}, as the model's flags require",
                    "check the model's flags",
                )
        for name in self.shapes:
            if name not in expected:
                raise CheckpointError(
                    f"{self.folder} has the parameter {name}, which the model lacks",
                    "a checkpoint of the same model",
                    "check the model's flags",
                )

    def read(self, kind: str, name: str, start: int = 0, numel: int | None = None) -> torch.Tensor:
        """Reads a span of one parameter's weight or optimizer state, flattened.

        Args:
            kind: "weight", or a kind of optimizer state such as "exp_avg".
            name: the parameter's name.
            start: first element.
            numel: number of elements; None: all up to the end.

        Returns:
            float32 [numel].
        """
        stored = int(torch.Size(self.shapes[name]).numel())
        total = int(torch.Size(self._padded.get(name, self.shapes[name])).numel())
        end = total if numel is None else start + numel
        stored_end = min(end, stored)
        if name in self._inner_shards:
            span = self._assemble(kind, name)[start:stored_end]
        else:
            span = self._read_inner_shard(kind, name, 0, start, stored_end) if start < stored_end else torch.empty(0)
        return span if end == stored_end else torch.nn.functional.pad(span, (0, end - max(start, stored_end)))

    def _assemble(self, kind: str, name: str) -> torch.Tensor:
        """Returns a parameter that is sharded along an inner dimension, full and flattened; the last one is cached."""
        if self._assembled is None or self._assembled[:2] != (kind, name):
            dim, count = self._inner_shards[name]
            local = _local_shape(self.shapes[name], dim, count)
            numel = int(torch.Size(local).numel())
            shards = [self._read_inner_shard(kind, name, index, 0, numel).view(local) for index in range(count)]
            self._assembled = (kind, name, torch.cat(shards, dim=dim).flatten())
        return self._assembled[2]

    def _read_inner_shard(self, kind: str, name: str, index: int, start: int, end: int) -> torch.Tensor:
        parts = []
        for span in self._spans[name][index]:
            first, last = max(start, span.start), min(end, span.start + span.numel)
            if first < last:
                parts.append(_read_span(span, f"{kind}/{name}", first - span.start, last - span.start))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read_shard(self, kind: str, name: str, shard: Shard | None, start: int, numel: int) -> torch.Tensor:
        """Reads a span like `read`, where `start` counts from the start of a tensor-parallel shard, flattened; None: no sharding."""
        if shard is None:
            return self.read(kind, name, start, numel)
        if shard.dim == 0:
            total = int(torch.Size(self._padded.get(name, self.shapes[name])).numel())
            return self.read(kind, name, shard.index * (total // shard.count) + start, numel)
        full = self.read(kind, name).view(self.shapes[name])
        return full.chunk(shard.count, dim=shard.dim)[shard.index].flatten()[start : start + numel]

    def weight(self, name: str) -> torch.Tensor:
        """Returns a full parameter, float32, in its shape."""
        return self.read("weight", name).view(self.shapes[name])
