"""The dtypes of weights by the names that flags and checkpoints use."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def precision_of(dtype: torch.dtype) -> str:
    """Returns the name of a dtype, or "fp32" for a dtype that has none."""
    return _NAMES.get(dtype, "fp32")
