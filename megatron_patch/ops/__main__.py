"""`python -m megatron_patch.ops` prints the compiled operators of this installation, with their devices and dtypes."""

from __future__ import annotations

import re

import torch

from megatron_patch.ops import native

OPERATORS = "patch_embedding, multi_token_loss, linear_multi_token_loss"


def report() -> list[str]:
    """Returns the lines of the report: what was built, for which devices, dtypes and GPU architectures."""
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in native.DTYPES)
    lines = [f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}"]
    for device, name, library in (("cpu", "the CPU", native.LIBRARY), ("cuda", f"CUDA ({architectures()})", native.CUDA_LIBRARY)):
        error = native.load_error(device)
        what = f"{OPERATORS} ({dtypes}), from {library}" if error is None else f"none: {error}; the plain formulas are used"
        lines.append(f"compiled for {name}: {what}")
    return lines


def architectures() -> str:
    """Returns the GPU architectures that the build wrote into the CUDA library, which need not load here."""
    if not native.CUDA_LIBRARY.is_file():
        return "not built"
    found = re.search(rb"megatron_patch architectures: ([\w ]+)", native.CUDA_LIBRARY.read_bytes())
    return " ".join(f"sm_{name}" for name in found[1].decode().split()) if found else "unknown architectures"


if __name__ == "__main__":
    print("\n".join(report()))
