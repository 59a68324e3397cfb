"""A checkpoint as a model on one device, whatever layout wrote it: for evaluation, generation and conversion.

In: SAVE (its newest sound checkpoint) or SAVE/step-N. Out: the model with its weights, its shape, and what is known of its tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_patch.checkpoint_files import Found, find_newest_sound
from megatron_patch.engine.state_files import StateFiles
from megatron_patch.errors import CheckpointError
from megatron_patch.model.gpt import GPTModel
from megatron_patch.model.shape import ModelShape


@dataclass(frozen=True)
class LoadedModel:
    """A model from a checkpoint.

    Args:
        model: in evaluation mode, on the device.
        found: the checkpoint it comes from.
        data_info: the side file of its training data, or None.
    """

    model: GPTModel
    found: Found
    data_info: Mapping[str, Any] | None

    @property
    def options(self) -> Mapping[str, Any]:
        """The options of the run that wrote it."""
        options: Mapping[str, Any] = self.found.state.config["options"]
        return options


def load_model(load: str, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Loads the newest sound checkpoint of a run, or one checkpoint.

    Raises:
        CheckpointError: there is none, or it does not fit its own description.
    """
    found = find_newest_sound(Path(load))
    if found is None:
        raise CheckpointError(f"--load {load} holds no checkpoint", "a run's folder, or one of its step-N folders", "check the path")
    try:
        shape = ModelShape(**found.state.model)
    except TypeError as error:
        raise CheckpointError(f"{found.folder}: the model's shape cannot be read: {error}", "a checkpoint of this version") from error
    files = StateFiles(found.folder)
    with torch.device("meta"):
        model = GPTModel(shape)
    files.check({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    model.load_state_dict({name: files.weight(name).to(dtype) for name, _ in model.named_parameters()}, strict=True, assign=True)
    return LoadedModel(model.to(device or default_device()).eval(), found, found.state.extra.get("data_info"))


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
