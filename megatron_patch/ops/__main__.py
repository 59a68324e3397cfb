"""`python -m megatron_patch.ops`: which compiled operators this installation has, and for what."""

from __future__ import annotations

import torch

from megatron_patch.ops import native


def report() -> list[str]:
    """What was built, for which devices and dtypes, line by line."""
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in native.DTYPES)
    error = native.load_error()
    cpu = f"patch_embedding ({dtypes}), from {native.LIBRARY}" if error is None else f"none: {error}; the plain formulas serve"
    return [
        f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        f"compiled for the CPU: {cpu}",
        "compiled for CUDA: none in this version; the plain formulas serve",
    ]


if __name__ == "__main__":
    print("\n".join(report()))
