"""Checkpoints of megatron_patch as the conversions read and write them: unsharded parameters by name.

Reading. In: a run's folder, or one of its step-N folders. Out: `CheckpointWeights`. Writing. In: parameters, one after another. Out:
OUTPUT/step-00000000, a checkpoint with only weights, from which a new run starts with `--load OUTPUT --finetune`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_patch.checkpoint import commit
from megatron_patch.checkpoint.commit import ManifestEntry, ValidCheckpoint
from megatron_patch.checkpoint.safetensors_io import write_safetensors
from megatron_patch.checkpoint.trainer_state import TrainerState
from megatron_patch.convert.tensor_names import ReadParameter, parameter_shapes
from megatron_patch.engine.inference import require_checkpoint, shape_of_state
from megatron_patch.engine.state_files import FORMAT, StateFiles, state_file_name
from megatron_patch.errors import CheckpointError
from megatron_patch.model.shape import ModelShape

UNFINISHED = (commit.PARTIAL, commit.TRASH, "tokenizer")
"""Prefixes of the names that an interrupted import leaves in its output folder."""


@dataclass(frozen=True)
class CheckpointWeights:
    """The weights of a checkpoint.

    Args:
        found: the checkpoint's folder and its state.
        shape: the model's shape.
        parameter: reads an unsharded parameter, or one expert of it.
        tokenizer: "tokenizer_type" and "tokenizer_model" that replace those of the training data's metadata file; empty: none do.
    """

    found: ValidCheckpoint
    shape: ModelShape
    parameter: ReadParameter
    tokenizer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def data_metadata(self) -> Mapping[str, Any]:
        """The metadata file of the training data; empty where it is unknown."""
        return {**(self.found.state.data_metadata or {}), **self.tokenizer}

    @property
    def family(self) -> str | None:
        """The model family that the run was started with, or None in a checkpoint that does not record it."""
        family = self.found.state.config.get("options", {}).get("model_family")
        return str(family) if family else None


def open_checkpoint(load: str) -> CheckpointWeights:
    """Opens the newest valid checkpoint of a run, or the given one, and checks that it has every parameter of its shape.

    Args:
        load: a run's folder, or one of its step-N folders.

    Raises:
        CheckpointError: there is none, it is damaged, or a parameter is missing, unexpected or of another shape.
    """
    found = require_checkpoint(load)
    shape = shape_of_state(found.state, str(found.folder))
    files = StateFiles(found.folder)
    files.check(parameter_shapes(shape))

    def parameter(name: str, expert: int | None = None, /) -> torch.Tensor:
        if expert is None:
            return files.weight(name)
        size = files.shapes[name][1:]
        numel = int(torch.Size(size).numel())
        return files.read("weight", name, expert * numel, numel).view(size)

    return CheckpointWeights(found, shape, parameter)


def groups_by_size(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Returns the indices of items, in order, in groups whose sizes sum to at most `limit`; a larger item is a group of its own."""
    groups: list[list[int]] = []
    total = 0
    for number, size in enumerate(sizes):
        if not groups or total + size > limit:
            groups.append([])
            total = 0
        groups[-1].append(number)
        total += size
    return groups


def check_output(output: Path, unfinished: Collection[str] = ()) -> None:
    """Checks that an output folder is new or empty.

    Args:
        output: the folder.
        unfinished: prefixes of names that an interrupted attempt may have left there; they are accepted.

    Raises:
        CheckpointError: the folder holds something else, or is a file.
    """
    found = [path.name for path in output.iterdir()] if output.is_dir() else []
    if output.exists() and (not output.is_dir() or not all(name.startswith(tuple(unfinished)) for name in found)):
        raise CheckpointError(
            f"--output {output} exists and is not empty", "a new or empty folder", "choose another folder, or remove this one"
        )


def imported_options(shape: ModelShape, family: str) -> dict[str, Any]:
    """Returns the run options that an imported checkpoint records: what evaluation, generation and export read from them."""
    return {"seq_length": min(shape.max_positions, 2048), "model_family": family}


def write_weights(
    output: Path,
    shape: ModelShape,
    parts: Sequence[Sequence[str]],
    parameters: Iterable[tuple[str, torch.Tensor]],
    precision: str,
    options: Mapping[str, Any],
    *,
    imported_from: str | None = None,
    data_metadata: Mapping[str, Any] | None = None,
    special_ids: Mapping[str, Any] | None = None,
    kept_config: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint with only weights, from which a new run can start.

    Args:
        output: the run's folder.
        shape: the model's shape.
        parts: the names of the parameters of each file, in the order of `parameters`.
        parameters: (name, tensor), one after another.
        precision: "fp32", "bf16" or "fp16": the precision of the source's weights.
        options: the options that evaluation, generation and export read from a checkpoint ("seq_length", "model_family").
        imported_from: path of the source.
        data_metadata: type and path of the source's tokenizer, or None.
        special_ids: `bos_token_id` and `eos_token_id` of the source, or None.
        kept_config: keys of the source's config.json that an export writes again; None: none.

    Returns:
        The checkpoint's folder, which appears under its name when it is complete.

    Raises:
        CheckpointError: it cannot be written.
    """
    shapes = parameter_shapes(shape)
    assert sorted(name for part in parts for name in part) == sorted(shapes)
    folder = commit.prepare(output, 0)
    stream = iter(parameters)
    entries: dict[str, ManifestEntry] = {}
    for number, names in enumerate(parts):
        index = [{"name": name, "shape": list(shapes[name]), "start": 0, "numel": int(torch.Size(shapes[name]).numel())} for name in names]
        file = folder / state_file_name(number, len(parts))
        entries[file.name] = write_safetensors(
            file,
            [(f"weight/{entry['name']}", (int(str(entry["numel"])),)) for entry in index],
            torch.float32,
            _flat(stream, names, shapes),
            {"format": FORMAT, "fragments": json.dumps(index)},
        )
    state = TrainerState(
        step=0,
        stage_index=0,
        stage_step=0,
        stage_name="imported",
        consumed_tokens=0,
        consumed_samples=0,
        plan={},
        config={"options": dict(options), "origins": {}},
        data_fingerprint={},
        engine={"precision": precision},
        model=asdict(shape),
        weights_only=True,
        imported_from=imported_from,
        data_metadata=data_metadata,
        special_ids=special_ids,
        kept_config=dict(kept_config or {}),
    )
    entries |= commit.write_state(folder, state)
    commit.write_manifest(folder, entries)
    return commit.publish(folder)


def _flat(
    stream: Iterator[tuple[str, torch.Tensor]], names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[torch.Tensor]:
    for expected in names:
        name, tensor = next(stream)
        if name != expected or tuple(tensor.shape) != shapes[expected]:
            raise CheckpointError(f"parameter {name} {tuple(tensor.shape)}", f"{expected} {shapes[expected]}")
        yield tensor.reshape(-1)
