"""Loads a checkpoint as a model for evaluation and generation, in one process or over several ranks, whatever layout wrote it.

In: SAVE (its newest valid checkpoint) or SAVE/step-N, and the parallel sizes. Out: the model with its weights, the checkpoint's trainer
state, and the metadata of its training data, which names the tokenizer.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from megatron_patch.checkpoint.commit import ValidCheckpoint, find_newest_valid
from megatron_patch.checkpoint.trainer_state import TrainerState
from megatron_patch.engine.distributed_model import DistributedModel
from megatron_patch.engine.environment import ranks_from_environment
from megatron_patch.engine.state_files import StateFiles
from megatron_patch.errors import CheckpointError, ConfigError
from megatron_patch.model.gpt import GPTModel
from megatron_patch.model.inference_model import InferenceModel
from megatron_patch.model.own_model import OwnModel, OwnModelForInference, build_own_model
from megatron_patch.model.pipeline_partition import pipeline_partition
from megatron_patch.model.shape import ModelShape, check_shape
from megatron_patch.model.sharding import shard_of
from megatron_patch.parallel.grid import Grid
from megatron_patch.parallel.groups import SINGLE_REPLICA, Groups, Replicas, make_groups
from megatron_patch.parallel.tensor import UNSHARDED
from megatron_patch.utils.records import record_from_json
from megatron_patch.utils.units import plural

_MOST_LAYERS = 100_000
Model = TypeVar("Model", covariant=True)


@dataclass(frozen=True)
class LoadedModel(Generic[Model]):
    """A model from a checkpoint.

    Args:
        model: the model, in evaluation mode, on the device.
        checkpoint: the checkpoint that it was loaded from.
        data_metadata: metadata of its training data; None if unknown.
        replicas: the ranks that hold the same weights and can divide the data of an evaluation.
    """

    model: Model
    checkpoint: ValidCheckpoint
    data_metadata: Mapping[str, Any] | None
    replicas: Replicas = SINGLE_REPLICA

    @property
    def options(self) -> Mapping[str, Any]:
        """The options of the run that wrote the checkpoint, by name."""
        options: Mapping[str, Any] = self.checkpoint.state.config["options"]
        return options


def shape_of_state(state: TrainerState, where: str, own: OwnModel | None = None) -> ModelShape:
    """Returns the shape of a checkpoint's model.

    Args:
        state: the trainer state of the checkpoint.
        where: the checkpoint's path, for messages.
        own: the user's model that will hold the weights; None: the program's own.

    Raises:
        CheckpointError: the shape was written by another version of the program, or is invalid, or the weights belong to another model,
            with which they would give other numbers.
    """
    given = own.name if own is not None else None
    if state.own_model != given:
        raise CheckpointError(
            f"{where}: the model was trained with model={state.own_model or 'None'}, and model={given or 'None'} is given",
            f"model={state.own_model or 'None'}, as the run had it",
            "load it with megatron_patch.api.load_model(checkpoint, model=…) and that function; the tools know only the program's own model"
            if state.own_model
            else "leave model= out",
        )
    try:
        shape = record_from_json(ModelShape, state.model)
        check_shape(shape)
    except (ValueError, ConfigError) as error:
        raise CheckpointError(
            f"{where}: cannot read the model's shape: {error}",
            "a checkpoint of this version of the program",
            "use the version that wrote it",
        ) from error
    if shape.num_layers > _MOST_LAYERS:
        raise CheckpointError(
            f"{where}: the model has {plural(shape.num_layers, 'layer')}", f"up to {_MOST_LAYERS:,} layers", "do not use this checkpoint"
        )
    return shape


def require_checkpoint(load: str) -> ValidCheckpoint:
    """Returns the newest valid checkpoint of a run, or the one that `load` names.

    Args:
        load: a run's folder, or one of its step-N folders.

    Raises:
        CheckpointError: there is no checkpoint, or none is valid.
    """
    checkpoint = find_newest_valid(Path(load))
    if checkpoint is None:
        raise CheckpointError(f"--load {load} contains no checkpoint", "a run's folder, or one of its step-N folders", "check the path")
    return checkpoint


def load_own_model(own: OwnModel, load: str, device: torch.device, dtype: torch.dtype = torch.float32) -> LoadedModel[InferenceModel]:
    """Loads the weights of a checkpoint into a user's model.

    Args:
        own: the model that the run was trained with.
        load: a run's folder, or one of its step-N folders.
        device: the model's device.
        dtype: dtype of the weights.

    Raises:
        CheckpointError: there is no valid checkpoint, or its run had another model.
        ConfigError: the model has other parameters than it should have.
    """
    checkpoint = require_checkpoint(load)
    shape = shape_of_state(checkpoint.state, str(checkpoint.folder), own)
    files = StateFiles(checkpoint.folder)
    with torch.device(device):
        model = build_own_model(own, shape, UNSHARDED)
    files.check({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(files.weight(name))
    model = model.to(dtype).eval()
    usable: InferenceModel = model if isinstance(model, GPTModel) else OwnModelForInference(model, shape)
    return LoadedModel(usable, checkpoint, checkpoint.state.data_metadata)


def load_model(load: str, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> LoadedModel[GPTModel]:
    """Loads the full model of a checkpoint into this process.

    Args:
        load: a run's folder, or one of its step-N folders.
        device: the model's device; None: `default_device()`.
        dtype: dtype of the weights.

    Raises:
        CheckpointError: there is no valid checkpoint, or its weights do not fit its model shape.
    """
    checkpoint = require_checkpoint(load)
    shape = shape_of_state(checkpoint.state, str(checkpoint.folder))
    files = StateFiles(checkpoint.folder)
    with torch.device("meta"):
        model = GPTModel(shape)
    states = model.state_dict()
    files.check({name: tuple(tensor.shape) for name, tensor in states.items()})
    parameters = {name for name, _ in model.named_parameters()}
    weights = {name: files.weight(name).to(dtype if name in parameters else torch.float32) for name in states}
    model.load_state_dict(weights, strict=True, assign=True)
    return LoadedModel(model.to(device or default_device()).eval(), checkpoint, checkpoint.state.data_metadata)


def load_distributed_model(
    load: str, groups: Groups, device: torch.device, dtype: torch.dtype = torch.float32
) -> LoadedModel[DistributedModel]:
    """Loads this rank's part of a checkpoint's model; every rank must call it.

    Args:
        load: a run's folder, or one of its step-N folders.
        groups: this rank's coordinates and process groups.
        device: this rank's device.
        dtype: dtype of the weights.

    Raises:
        CheckpointError: as `load_model`.
        ConfigError: the model cannot be divided among these ranks.
    """
    checkpoint, grid = require_checkpoint(load), groups.grid
    stored = shape_of_state(checkpoint.state, str(checkpoint.folder))
    files = StateFiles(checkpoint.folder)
    # The padding of the vocabulary depends on the layout, not on the checkpoint.
    rows = -(-stored.padded_vocab_size // grid.tensor_parallel_size) * grid.tensor_parallel_size
    shape = dataclasses.replace(stored, padded_vocab_size=rows)
    boundaries = pipeline_partition(shape, grid.pipeline_parallel_size, "parameters", shape.max_positions)
    layers = range(boundaries[grid.pipeline_parallel_rank], boundaries[grid.pipeline_parallel_rank + 1])
    with torch.device("meta"):
        full = GPTModel(shape)
        part = GPTModel(shape, parallel=groups.tensor_parallel(sequence=False), layers=layers)
    files.check({name: tuple(tensor.shape) for name, tensor in full.state_dict().items()}, shape.vocab_size)
    weights = {name: files.weight(name).to(device) for name, _ in part.named_buffers() if name in part.state_dict()}
    for name, parameter in part.named_parameters():
        shard = shard_of(name, shape, grid.tensor_parallel_rank, grid.tensor_parallel_size)
        weights[name] = files.read_shard("weight", name, shard, 0, parameter.numel()).view(parameter.shape).to(device, dtype)
    part.load_state_dict(weights, strict=True, assign=True)
    replicas = Replicas(grid.data_parallel_rank, grid.data_parallel_size, groups.data)
    return LoadedModel(DistributedModel(part.to(device).eval(), groups), checkpoint, checkpoint.state.data_metadata, replicas)


@contextlib.contextmanager
def open_model(
    load: str, dtype: torch.dtype = torch.float32, tensor_parallel_size: int = 1, pipeline_parallel_size: int = 1
) -> Iterator[LoadedModel[InferenceModel]]:
    """Yields a checkpoint's model: in this process, or over the ranks of the job if a launcher started several.

    Args:
        load: a run's folder, or one of its step-N folders.
        dtype: dtype of the weights.
        tensor_parallel_size: number of ranks that share each layer.
        pipeline_parallel_size: number of pipeline ranks, which share the list of layers.

    Raises:
        CheckpointError: as `load_model`.
        ConfigError: the ranks or the model cannot be divided by these sizes.
    """
    rank, size, _ = ranks_from_environment()
    grid = Grid(rank, size, tensor_parallel_size, pipeline_parallel_size)
    if size == 1:
        yield load_model(load, default_device(), dtype)
        return
    # Imported here because DeepSpeed takes seconds to import.
    from megatron_patch.engine.distributed import destroy_distributed, init_distributed

    device = init_distributed()
    yield load_distributed_model(load, make_groups(grid), device, dtype)
    # Not after an error: other ranks may be inside of a collective, and destroying the groups would wait for them.
    destroy_distributed()


def default_device() -> torch.device:
    """Returns the first GPU, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
