"""The compiled libraries: loading what was built at install, once, when this module is imported.

In: `_C.so` (the operators' schemas and the CPU's kernels) and `_C_cuda.so` (CUDA's kernels) beside this package, where they were built.
Out: `torch.ops.megatron_patch.*`, and which devices and dtypes they serve. Where nothing was built, or it does not load into this torch,
the plain formulas serve, with one warning. What asks later is a comparison, which `torch.compile` traces through.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

FOLDER = Path(__file__).parent.parent
LIBRARY = FOLDER / "_C.so"
CUDA_LIBRARY = FOLDER / "_C_cuda.so"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_warned: set[str] = set()


def _load(library: Path, needs: str | None = None) -> str | None:
    if needs is not None:
        return needs
    if not library.is_file():
        return "they were not built at install"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} does not load: {error}"
    return None


_cpu_error = _load(LIBRARY)
_errors = {
    "cpu": _cpu_error,
    "cuda": _load(CUDA_LIBRARY, _cpu_error or (None if torch.version.cuda else "this torch is a build without CUDA")),
}


def load_error(device: str = "cpu") -> str | None:
    """Why the compiled operators are not to be had on a kind of device, or None where they are."""
    return _errors.get(device, f"there are none for {device}")


def available(device: str = "cpu") -> bool:
    """Whether the compiled operators can be used; the first time they cannot, a warning says why."""
    error = load_error(device)
    if error is not None and device in _errors and device not in _warned:
        _warned.add(device)
        compiler = "nvcc and a C++ compiler" if device == "cuda" and _cpu_error is None else "a C++ compiler"
        warnings.warn(
            f"megatron_patch runs on its plain formulas (the same results, slower), as its compiled operators are missing: {error}. "
            f"To have them, reinstall where there is {compiler}: pip install --no-build-isolation -e .",
            stacklevel=4,
        )
    return error is None


def supports(tensor: torch.Tensor) -> bool:
    """Whether compiled kernels serve this tensor's device and dtype."""
    return tensor.dtype in DTYPES and available(tensor.device.type)
