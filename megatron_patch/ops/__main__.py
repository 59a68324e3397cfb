"""`python -m megatron_patch.ops`: which compiled operators this installation has, and for what."""

from __future__ import annotations

import torch

from megatron_patch.ops import native


def main() -> None:
    """Prints the report."""
    error = native.load_error()
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    if error is None:
        print(f"CPU operators: patch_embedding ({', '.join(str(dtype).removeprefix('torch.') for dtype in native.DTYPES)})")
    else:
        print(f"CPU operators: none, {error}; the plain formulas serve")
    print("CUDA operators: none in this version; the plain formulas serve")


if __name__ == "__main__":
    main()
