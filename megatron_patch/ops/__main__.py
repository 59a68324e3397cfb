"""`python -m megatron_patch.ops`: which compiled operators this installation has, and for what."""

from __future__ import annotations

import re

import torch

from megatron_patch.ops import native

OPERATORS = "patch_embedding, multi_token_loss, linear_multi_token_loss"


def report() -> list[str]:
    """What was built, for which devices, dtypes and GPU architectures, line by line."""
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in native.DTYPES)
    lines = [f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}"]
    for device, name, library in (("cpu", "the CPU", native.LIBRARY), ("cuda", f"CUDA ({architectures()})", native.CUDA_LIBRARY)):
        error = native.load_error(device)
        what = f"{OPERATORS} ({dtypes}), from {library}" if error is None else f"none: {error}; the plain formulas serve"
        lines.append(f"compiled for {name}: {what}")
    return lines


def architectures() -> str:
    """The GPU architectures of the CUDA library, also where it does not load; what its build wrote into it."""
    if not native.CUDA_LIBRARY.is_file():
        return "not built"
    found = re.search(rb"megatron_patch architectures: ([\w ]+)", native.CUDA_LIBRARY.read_bytes())
    return " ".join(f"sm_{name}" for name in found[1].decode().split()) if found else "unknown architectures"


if __name__ == "__main__":
    print("\n".join(report()))
