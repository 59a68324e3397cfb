"""Our checkpoints as conversion sees them: whole parameters by name, whoever wrote them; and a new one made of weights alone.

In: a run's folder, or one of its step-N folders. Out: `CheckpointWeights`. The other way: parameters, one after another, become
OUTPUT/step-00000000, which a run begins from with `--load OUTPUT --finetune`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_patch.checkpoint import commit as commit
from megatron_patch.checkpoint.commit import FoundCheckpoint, ManifestEntry
from megatron_patch.checkpoint.safetensors_io import write_safetensors
from megatron_patch.checkpoint.trainer_state import TrainerState
from megatron_patch.convert.tensor_names import parameter_shapes
from megatron_patch.engine.inference import require_checkpoint, shape_of_state
from megatron_patch.engine.state_files import FORMAT, StateFiles, state_file_name
from megatron_patch.errors import CheckpointError
from megatron_patch.model.shape import ModelShape

UNFINISHED = (commit.PARTIAL, commit.TRASH, "tokenizer")
"""How the names begin of what an import that was interrupted leaves in its folder."""


@dataclass(frozen=True)
class CheckpointWeights:
    """One of our checkpoints.

    Args:
        found: the folder and its state.
        shape: the model's shape.
        parameter: name -> the whole parameter, float32, on the CPU.
        tokenizer: "tokenizer_type" and "tokenizer_model", where they are not those of the training data's side file.
    """

    found: FoundCheckpoint
    shape: ModelShape
    parameter: Callable[[str], torch.Tensor]
    tokenizer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def data_metadata(self) -> Mapping[str, Any]:
        """The side file of the data it was trained on, as far as it is known."""
        return {**(self.found.state.data_metadata or {}), **self.tokenizer}


def open_checkpoint(load: str) -> CheckpointWeights:
    """Finds the newest sound checkpoint, or the one named, and checks that it has every parameter of its shape.

    Raises:
        CheckpointError: there is none, it is damaged, or a parameter is missing, unknown or of another shape.
    """
    found = require_checkpoint(load)
    shape = shape_of_state(found.state, str(found.folder))
    files = StateFiles(found.folder)
    files.check(parameter_shapes(shape))
    return CheckpointWeights(found, shape, files.weight)


def groups_by_size(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Numbers of items in order, cut into groups of at most `limit` in sum; an item above the limit is alone."""
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
    """Refuses a folder that has something in it.

    Args:
        output: the folder.
        unfinished: beginnings of names that an interrupted attempt may have left there.

    Raises:
        CheckpointError: it has.
    """
    found = [path.name for path in output.iterdir()] if output.is_dir() else []
    if output.exists() and (not output.is_dir() or not all(name.startswith(tuple(unfinished)) for name in found)):
        raise CheckpointError(f"--output {output} exists", "a new or empty folder", "choose another, or remove it")


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
) -> Path:
    """Writes a checkpoint of weights alone, from which a new run can begin.

    Args:
        output: the run's folder.
        shape: the model's shape.
        parts: names of parameters by file, in the order of `parameters`.
        parameters: (name, tensor), one after another.
        precision: "fp32", "bf16" or "fp16", in which the weights came.
        options: what evaluation and generation ask for (seq_length).
        imported_from: path that the weights came from.
        data_metadata: type and path of their tokenizer, or None.
        special_ids: their `bos_token_id` and `eos_token_id`, or None.

    Returns:
        The checkpoint's folder; it is invisible until it is whole.

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
