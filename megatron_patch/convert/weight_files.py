"""Reads the tensors of a folder or file of weights one at a time: safetensors, or PyTorch files that hold only tensors.

In: a path. Out: `Weights`: names, shapes and dtypes, known before any data is read, and a function that reads one tensor. No code in a file
ever runs, because PyTorch files are opened with `weights_only`.
"""

from __future__ import annotations

import contextlib
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_patch.checkpoint.safetensors_io import DTYPES, TensorInfo, dtype_name, read_header
from megatron_patch.errors import CheckpointError
from megatron_patch.utils.files import optional_file, read_json, reason

FLOAT32_TENSORS = ("e_score_correction_bias", "router.balance.bias", "router.balance.load")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Weights:
    """The tensors of a folder or file.

    Args:
        where: the folder or file, for messages.
        infos: name -> shape, dtype and file.
        read: name -> tensor, in its own dtype.
    """

    where: str
    infos: Mapping[str, TensorInfo]
    read: Callable[[str], torch.Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """The common dtype of all weights; float32, which represents all others, if they differ.

        Biases by which routers choose experts do not count: they are float32 in models of any dtype.
        """
        dtypes = {DTYPES[info.dtype] for name, info in self.infos.items() if not name.endswith(FLOAT32_TENSORS)}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32


def open_weights(path: Path) -> Weights:
    """Opens a folder of weights, or one file.

    Raises:
        CheckpointError: there are no weights; a file is truncated or unreadable, or named by the index but missing; a tensor is in two
            files, or its dtype is not a supported floating-point dtype.
    """
    files, index = _files(path)
    safetensors = files[0].suffix == ".safetensors"
    infos: dict[str, TensorInfo] = {}
    loaded: dict[str, torch.Tensor] = {}
    for file in files:
        found = read_header(file) if safetensors else _torch_header(file, loaded)
        for name, info in found.items():
            if name in infos:
                raise CheckpointError(
                    f"{path}: tensor {name} is in both {infos[name].path.name} and {file.name}", "each tensor once", "remove one file"
                )
            if info.dtype not in DTYPES:
                raise CheckpointError(
                    f"{file}: tensor {name} has dtype {info.dtype}", ", ".join(DTYPES), "use the weights before quantization"
                )
            infos[name] = info
    for name in index:
        if name not in infos:
            raise CheckpointError(f"{path}: the index names tensor {name}, but no file has it", "complete weights", "copy the folder again")
    if not infos:
        raise CheckpointError(f"{path} contains no tensors", "a model's weights", "check the path")
    return Weights(str(path), infos, (lambda name: _read_safetensors(infos[name], name)) if safetensors else loaded.__getitem__)


def _files(path: Path) -> tuple[list[Path], list[str]]:
    """Returns the files of a folder's weights, and the names of tensors in its index."""
    if path.is_file():
        return [path], []
    for name in _INDEXES:
        index = path / name
        if is_there(index):
            try:
                weight_map = read_json(index)["weight_map"]
                files = sorted({path / str(file) for file in weight_map.values()})
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise CheckpointError(f"{index} cannot be read: {reason(error)}", "an index with a weight_map", "copy it again") from error
            for file in files:
                if file.parent != path or not file.is_file():
                    raise CheckpointError(
                        f"{index} names {file.name}, which is not in the folder", "all files of the index", "copy the missing file"
                    )
            return files, list(weight_map)
    # Some public folders also contain the weights in another layout (consolidated.safetensors).
    for pattern in ("model.safetensors", "model-*.safetensors", "*.safetensors", "pytorch_model*.bin"):
        if found := [file for file in sorted(path.glob(pattern)) if is_there(file)]:
            return found, []
    raise CheckpointError(
        f"{path} contains no weights" if path.exists() else f"{path} does not exist",
        "a folder with model.safetensors or pytorch_model.bin, or with several files and their index",
        "check the path",
    )


def is_there(path: Path) -> bool:
    """Returns whether a file that may be missing is there.

    Raises:
        CheckpointError: a folder, a pipe, a device or a link to nothing has its name.
    """
    try:
        return optional_file(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {reason(error)}", "a file", "copy it again, or remove it") from error


def _read_safetensors(info: TensorInfo, name: str) -> torch.Tensor:
    try:
        with safe_open(str(info.path), framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{info.path}: tensor {name}: {error}", "a complete safetensors file", "copy it again") from error


@contextlib.contextmanager
def _only(allowed: Sequence[Any]) -> Iterator[None]:
    """Allows exactly these classes in a PyTorch file, whatever other libraries in this process have allowed."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        torch.serialization.add_safe_globals(list(allowed))
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def load_torch_file(path: Path, allowed: Sequence[Any] = ()) -> Any:
    """Returns the contents of a PyTorch file, memory-mapped if its format permits.

    Args:
        path: the file.
        allowed: classes that the file may contain in addition to tensors and plain values; (stand-in, full name) replaces a class.

    Raises:
        CheckpointError: the file cannot be read, or contains an object that needs code to be loaded.
    """
    try:
        with _only(allowed):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # The library's own text advises to allow the file to run code.
        match = re.search(r"GLOBAL (\S+)", str(error))
        if match is None:
            raise _damaged(path) from error
        raise CheckpointError(
            f"{path} contains more than tensors and plain values: {match[1][:300]}",
            "a file of tensors, which cannot run code when it is loaded",
            "if you trust the file, load it elsewhere and save its weights as safetensors",
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {reason(error)}", "a complete PyTorch file", "copy it again") from error
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged, or contains more than tensors and plain values",
        "a complete PyTorch file of tensors, which cannot run code when it is loaded",
        "copy it again; if it is complete and you trust it, load it elsewhere and save its weights as safetensors",
    )


def _torch_header(path: Path, loaded: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    state = load_torch_file(path)
    if isinstance(state, dict) and isinstance(state.get("module"), dict):
        state = state["module"]
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise CheckpointError(
            f"{path} is not a mapping of names to tensors", "a state dict, as zero_to_fp32.py writes it", "save the model's state_dict()"
        )
    infos = {}
    for name, tensor in state.items():
        kind = dtype_name(tensor.dtype) if tensor.dtype in DTYPES.values() else str(tensor.dtype)
        infos[str(name)] = TensorInfo(tuple(tensor.shape), kind, path)
        loaded[str(name)] = tensor.detach()
    return infos
