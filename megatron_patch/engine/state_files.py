"""Fragments in files: what each rank writes of weights and moments, and how any rank of any layout reads any span back.

In: fragments, and a folder. Out: one `state-RRRRR-of-RRRRR.safetensors` a rank, holding `weight/NAME`, `exp_avg/NAME` and
`exp_avg_sq/NAME` for each fragment, float32 and flat; the file's header names each fragment's shape and first element. The format runs
no code when read, needs no conversion between layouts, and a reader maps only the bytes it asks for.
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
    """state-00000-of-00008.safetensors."""
    return f"state-{rank:05d}-of-{ranks:05d}.safetensors"


def write_fragments(folder: Path, rank: int, ranks: int, fragments: Sequence[Fragment]) -> dict[str, ManifestEntry]:
    """Writes this rank's fragments, forces them to disk and reads them back.

    Args:
        folder: an existing folder.
        rank: this rank.
        ranks: how many write.
        fragments: spans of parameters with float32 tensors.

    Returns:
        What the manifest says of the file.

    Raises:
        CheckpointError: the file cannot be written (no space left, for example), or reads back as something else.
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
        same = checksum_on_disk(path) == entry.xxh64
    except OSError as error:
        raise CheckpointError(f"cannot read back {path}: {error.strerror}", "a sound disk", "change --save") from error
    if not same:
        raise CheckpointError(f"{path} reads back as something else than was written", "a sound disk", "change --save")
    return {path.name: entry}


@dataclass(frozen=True)
class _Piece:
    """A fragment as a file's header says it; see `Fragment`."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    shard: tuple[int, int, int] | None = None

    @staticmethod
    def of(entry: Any) -> _Piece:
        piece = record_from_json(_Piece, entry)
        dim, index, count = piece.shard or (0, 0, 1)
        sizes = (*piece.shape, piece.start, piece.numel, dim, index)
        if min(sizes) < 0 or count < 1 or index >= count or math.prod(piece.shape) >= 1 << 62:
            raise ValueError(f"{piece} is no part of a parameter"[:300])
        if piece.shard is not None and (dim >= len(piece.shape) or piece.shape[dim] % count):
            raise ValueError(f"{piece} is cut where its shape cannot be"[:300])
        return piece


@dataclass(frozen=True)
class _Span:
    path: Path
    start: int
    numel: int


def _local_shape(shape: tuple[int, ...], dim: int, count: int) -> tuple[int, ...]:
    return tuple(size // count if axis == dim else size for axis, size in enumerate(shape))


def _read_span(span: _Span, name: str, start: int, end: int) -> torch.Tensor:
    try:
        with safe_open(str(span.path), framework="pt") as file:
            found = file.get_slice(name)
            if found.get_shape() != [span.numel] or found.get_dtype() != "F32":
                raise ValueError(f"{found.get_dtype()} {found.get_shape()} where its index says F32 [{span.numel}]")
            tensor: torch.Tensor = found[start:end]
            return tensor
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {name} of {span.path}: {error}", "a whole state file", "resume from another checkpoint"
        ) from error


class StateFiles:
    """A checkpoint's weights and moments, by parameter name and span, whoever wrote them.

    Args:
        folder: where the state files are.

    Raises:
        CheckpointError: no state files, a file that cannot be read, a parameter that is not covered exactly once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        # By parameter and part of it. Parts along dimension 0 follow each other in the flattened parameter, so that they are one part.
        self._spans: dict[str, dict[int, list[_Span]]] = {}
        self._cuts: dict[str, tuple[int, int]] = {}
        self._whole: tuple[str, str, torch.Tensor] | None = None
        self._padded: dict[str, tuple[int, ...]] = {}
        paths = sorted(folder.glob("state-*-of-*.safetensors"))
        if not paths:
            raise CheckpointError(f"{folder} holds no state files", "a checkpoint folder step-N of this program", "check the path")
        for path in paths:
            self._read_index(path)
        for name, parts in self._spans.items():
            _, count = self._cuts.get(name, (0, 1))
            if sorted(parts) != list(range(min(count, len(parts) + 1))):
                raise CheckpointError(f"{folder}: parameter {name} has parts {sorted(parts)[:8]} of {count}", "whole parameters")
            for spans in parts.values():
                self._check_coverage(name, spans, math.prod(self.shapes[name]) // count)

    def _check_coverage(self, name: str, spans: list[_Span], numel: int) -> None:
        spans.sort(key=lambda span: span.start)
        end = 0
        for span in spans:
            if span.start != end:
                raise CheckpointError(f"{self.folder}: parameter {name} has a gap or overlap at element {end}", "whole parameters")
            end += span.numel
        if end != numel:
            raise CheckpointError(f"{self.folder}: parameter {name} has {end} of {numel} elements", "whole parameters")

    def _read_index(self, path: Path) -> None:
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path} has format {metadata.get('format')!r}", FORMAT, "use the program's version that wrote it")
            for piece in (_Piece.of(entry) for entry in json.loads(metadata["fragments"])):
                if self.shapes.setdefault(piece.name, piece.shape) != piece.shape:
                    raise CheckpointError(
                        f"{path}: parameter {piece.name} has shape {piece.shape}", f"{self.shapes[piece.name]}, as in the other files"
                    )
                part, start = 0, piece.start
                if piece.shard is not None:
                    dim, index, count = piece.shard
                    if dim == 0:
                        start += index * (math.prod(piece.shape) // count)
                    else:
                        part = index
                        if self._cuts.setdefault(piece.name, (dim, count)) != (dim, count):
                            raise ValueError(f"parameter {piece.name} is cut in two ways")
                self._spans.setdefault(piece.name, {}).setdefault(part, []).append(_Span(path, start, piece.numel))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"cannot read {path}: {error}", "a whole state file", "resume from another checkpoint") from error

    def check(self, expected: dict[str, tuple[int, ...]], vocab_size: int = 0) -> None:
        """Compares with a model's parameters.

        The vocabulary's padding belongs to the layout, not to the model: what is read of rows that are not there is zero.

        Args:
            expected: each parameter's whole shape.
            vocab_size: rows that embedding and head must have in common.

        Raises:
            CheckpointError: the first parameter that is missing, unknown or of another shape.
        """
        for name, shape in expected.items():
            if name not in self.shapes:
                raise CheckpointError(
                    f"{self.folder} has no parameter {name} {shape}", "a checkpoint of the same model", "check the model's flags"
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
                    f"{tuple(shape)}, as the model's flags say",
                    "check them",
                )
        for name in self.shapes:
            if name not in expected:
                raise CheckpointError(
                    f"{self.folder} has a parameter {name} that the model lacks",
                    "a checkpoint of the same model",
                    "check the model's flags",
                )

    def read(self, kind: str, name: str, start: int = 0, numel: int | None = None) -> torch.Tensor:
        """A span of one flattened parameter's weight or moment.

        Args:
            kind: "weight", "exp_avg" or "exp_avg_sq".
            name: the parameter.
            start: first element.
            numel: elements; None: to the end.

        Returns:
            float32 [numel].
        """
        stored = int(torch.Size(self.shapes[name]).numel())
        total = int(torch.Size(self._padded.get(name, self.shapes[name])).numel())
        end = total if numel is None else start + numel
        inside = min(end, stored)
        if name in self._cuts:
            found = self._assemble(kind, name)[start:inside]
        else:
            found = self._read_part(kind, name, 0, start, inside) if start < inside else torch.empty(0)
        return found if end == inside else torch.nn.functional.pad(found, (0, end - max(start, inside)))

    def _assemble(self, kind: str, name: str) -> torch.Tensor:
        """A parameter that was cut along an inner dimension, flattened; kept until another is asked for."""
        if self._whole is None or self._whole[:2] != (kind, name):
            dim, count = self._cuts[name]
            local = _local_shape(self.shapes[name], dim, count)
            numel = int(torch.Size(local).numel())
            parts = [self._read_part(kind, name, part, 0, numel).view(local) for part in range(count)]
            self._whole = (kind, name, torch.cat(parts, dim=dim).flatten())
        return self._whole[2]

    def _read_part(self, kind: str, name: str, part: int, start: int, end: int) -> torch.Tensor:
        parts = []
        for span in self._spans[name][part]:
            first, last = max(start, span.start), min(end, span.start + span.numel)
            if first < last:
                parts.append(_read_span(span, f"{kind}/{name}", first - span.start, last - span.start))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read_shard(self, kind: str, name: str, shard: Shard | None, start: int, numel: int) -> torch.Tensor:
        """As `read`, with the span counted in the flattened part that a tensor-parallel rank holds."""
        if shard is None:
            return self.read(kind, name, start, numel)
        if shard.dim == 0:
            total = int(torch.Size(self._padded.get(name, self.shapes[name])).numel())
            return self.read(kind, name, shard.index * (total // shard.count) + start, numel)
        whole = self.read(kind, name).view(self.shapes[name])
        return whole.chunk(shard.count, dim=shard.dim)[shard.index].flatten()[start : start + numel]

    def weight(self, name: str) -> torch.Tensor:
        """A whole parameter, float32, in its shape."""
        return self.read("weight", name).view(self.shapes[name])
