"""A checkpoint as a model to be read, whatever layout wrote it, in this process or over ranks: for evaluation and generation.

In: SAVE (its newest sound checkpoint) or SAVE/step-N, and how ranks are to share it. Out: the model with its weights, its shape, and what
is known of its tokenizer.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from megatron_patch.checkpoint.commit import FoundCheckpoint, find_newest_valid
from megatron_patch.checkpoint.trainer_state import TrainerState
from megatron_patch.engine.environment import ranks_from_environment
from megatron_patch.engine.shared_model import SharedModel
from megatron_patch.engine.state_files import StateFiles
from megatron_patch.errors import CheckpointError, ConfigError
from megatron_patch.model.gpt import GPTModel
from megatron_patch.model.inference_model import InferenceModel
from megatron_patch.model.pipeline_partition import pipeline_partition
from megatron_patch.model.shape import ModelShape, check_shape
from megatron_patch.model.sharding import shard_of
from megatron_patch.parallel.grid import Grid
from megatron_patch.parallel.groups import SINGLE_REPLICA, Groups, Replicas, make_groups
from megatron_patch.utils.records import record_from_json

_MOST_LAYERS = 100_000
Model = TypeVar("Model", covariant=True)


@dataclass(frozen=True)
class LoadedModel(Generic[Model]):
    """A model from a checkpoint.

    Args:
        model: in evaluation mode, on the device.
        found: the checkpoint it comes from.
        data_metadata: metadata of its training data, or None.
        copies: the ranks that read other samples with the same weights.
    """

    model: Model
    found: FoundCheckpoint
    data_metadata: Mapping[str, Any] | None
    replicas: Replicas = SINGLE_REPLICA

    @property
    def options(self) -> Mapping[str, Any]:
        """The options of the run that wrote it."""
        options: Mapping[str, Any] = self.found.state.config["options"]
        return options


def shape_of_state(state: TrainerState, where: str) -> ModelShape:
    """The model's shape of a checkpoint.

    Raises:
        CheckpointError: it was written by another version, or no model can be of this shape.
    """
    try:
        shape = record_from_json(ModelShape, state.model)
        check_shape(shape)
    except (ValueError, ConfigError) as error:
        raise CheckpointError(
            f"{where}: the model's shape cannot be read: {error}", "a checkpoint of this version", "use the version that wrote it"
        ) from error
    if shape.num_layers > _MOST_LAYERS:
        raise CheckpointError(f"{where}: a model of {shape.num_layers} layers", f"up to {_MOST_LAYERS}", "do not use this checkpoint")
    return shape


def find_checkpoint(load: str) -> FoundCheckpoint:
    """The newest sound checkpoint of a run, or the one named.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    found = find_newest_valid(Path(load))
    if found is None:
        raise CheckpointError(f"--load {load} holds no checkpoint", "a run's folder, or one of its step-N folders", "check the path")
    return found


def load_model(load: str, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> LoadedModel[GPTModel]:
    """Loads a checkpoint into this process.

    Raises:
        CheckpointError: there is none, or it does not fit its own description.
    """
    found = find_checkpoint(load)
    shape = shape_of_state(found.state, str(found.folder))
    files = StateFiles(found.folder)
    with torch.device("meta"):
        model = GPTModel(shape)
    files.check({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    model.load_state_dict({name: files.weight(name).to(dtype) for name, _ in model.named_parameters()}, strict=True, assign=True)
    return LoadedModel(model.to(device or default_device()).eval(), found, found.state.data_metadata)


def load_shared_model(load: str, groups: Groups, device: torch.device, dtype: torch.dtype = torch.float32) -> LoadedModel[SharedModel]:
    """Loads this rank's part of a checkpoint; every rank must call it.

    Args:
        load: as in `load_model`.
        groups: this rank's place and process groups.
        device: this rank's device.
        dtype: of the weights.

    Raises:
        CheckpointError: as `load_model`.
        ConfigError: the model does not divide by these ranks.
    """
    found, grid = find_checkpoint(load), groups.grid
    stored = shape_of_state(found.state, str(found.folder))
    files = StateFiles(found.folder)
    # The vocabulary's padding belongs to the layout.
    rows = -(-stored.padded_vocab_size // grid.tensor_parallel_size) * grid.tensor_parallel_size
    shape = dataclasses.replace(stored, padded_vocab_size=rows)
    boundaries = pipeline_partition(shape, grid.pipeline_parallel_size, "parameters", shape.max_positions)
    layers = range(boundaries[grid.pipeline_parallel_rank], boundaries[grid.pipeline_parallel_rank + 1])
    with torch.device("meta"):
        whole = GPTModel(shape)
        part = GPTModel(shape, parallel=groups.tensor_parallel(sequence=False), layers=layers)
    files.check({name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}, shape.vocab_size)
    weights = {}
    for name, parameter in part.named_parameters():
        shard = shard_of(name, shape, grid.tensor_parallel_rank, grid.tensor_parallel_size)
        weights[name] = files.read_shard("weight", name, shard, 0, parameter.numel()).view(parameter.shape).to(device, dtype)
    part.load_state_dict(weights, strict=True, assign=True)
    replicas = Replicas(grid.data_parallel_rank, grid.data_parallel_size, groups.data)
    return LoadedModel(SharedModel(part.eval(), groups), found, found.state.data_metadata, replicas)


@contextlib.contextmanager
def open_model(
    load: str, dtype: torch.dtype = torch.float32, tensor_parallel_size: int = 1, pipeline_parallel_size: int = 1
) -> Iterator[LoadedModel[InferenceModel]]:
    """A checkpoint's model, in this process, or shared by the ranks of the job that a launcher has started.

    Args:
        load: as in `load_model`.
        dtype: of the weights.
        tensor_parallel_size: ranks that share each layer.
        pipeline_parallel_size: ranks that share the list of layers.

    Raises:
        CheckpointError: as `load_model`.
        ConfigError: the ranks, or the model, do not divide by these sizes.
    """
    rank, size, _ = ranks_from_environment()
    grid = Grid(rank, size, tensor_parallel_size, pipeline_parallel_size)
    if size == 1:
        yield load_model(load, default_device(), dtype)
        return
    # DeepSpeed takes seconds to import.
    from megatron_patch.engine.distributed import destroy_distributed, init_distributed

    device = init_distributed()
    yield load_shared_model(load, make_groups(grid), device, dtype)
    # Not after an error: peers may be inside a collective, and leaving would wait for them.
    destroy_distributed()


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
