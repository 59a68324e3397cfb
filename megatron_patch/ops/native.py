"""Loads the compiled libraries, once, when this module is imported.

In: `_C.so` (the operators' schemas and CPU kernels) and `_C_cuda.so` (CUDA kernels) in the package's folder, if they were built at install.
Out: `torch.ops.megatron_patch.*`, and the devices and dtypes that they support. Where a library is missing or does not load into this
torch, the plain formulas are used, after one warning. `supports` only compares, so that `torch.compile` can trace it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

FOLDER = Path(__file__).parent.parent
LIBRARY = FOLDER / "_C.so"
CUDA_LIBRARY = FOLDER / "_C_cuda.so"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPERATORS = (
    "patch_embedding",
    "patch_embedding_backward",
    "patch_embedding_backward_add_",
    "multi_token_loss_statistics",
    "multi_token_loss_gradient",
    "multi_token_loss_gradient_",
    "multi_token_loss_and_gradient_",
)
"""The operators that `_C.so` must define (csrc/schemas.cpp)."""
CUDA_OPERATORS = ("patch_embedding_rows", "patch_embedding_sorted_backward", "patch_embedding_sorted_backward_add_")
"""The further operators that `_C_cuda.so` must define (csrc/cuda/bindings.cpp)."""
_warned: set[str] = set()


def _load(library: Path, operators: Sequence[str], needs: str | None = None) -> str | None:
    if needs is not None:
        return needs
    if not library.is_file():
        return "they were not built at install"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} does not load: {error}"
    missing = [name for name in operators if not hasattr(torch.ops.megatron_patch, name)]
    return f"{library.name} was built from other sources: it lacks {', '.join(missing)}" if missing else None


_cpu_error = _load(LIBRARY, OPERATORS)
_errors = {
    "cpu": _cpu_error,
    "cuda": _load(CUDA_LIBRARY, CUDA_OPERATORS, _cpu_error or (None if torch.version.cuda else "this build of torch has no CUDA")),
}


def load_error(device: str = "cpu") -> str | None:
    """Returns the reason why the compiled operators are not available on a type of device, or None if they are."""
    return _errors.get(device, f"there are no kernels for {device}")


def available(device: str = "cpu") -> bool:
    """Whether the compiled operators can be used on a type of device; warns the first time that they cannot."""
    error = load_error(device)
    if error is not None and device in _errors and device not in _warned:
        _warned.add(device)
        compiler = "nvcc and a C++ compiler" if device == "cuda" and _cpu_error is None else "a C++ compiler"
        warnings.warn(
            f"megatron_patch uses its plain formulas (the same results, slower), because its compiled operators are missing: {error}. "
            f"To build them, install {compiler} and reinstall the package: pip install --no-build-isolation -e .",
            stacklevel=4,
        )
    return error is None


def supports(tensor: torch.Tensor) -> bool:
    """Whether compiled kernels support a tensor's device and dtype."""
    return tensor.dtype in DTYPES and available(tensor.device.type)
