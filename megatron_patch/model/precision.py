"""What flags and checkpoints call the types of weights."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def precision_of(dtype: torch.dtype) -> str:
    """The precision to train weights of a type with: its own, or fp32 where there is none for it."""
    return _NAMES.get(dtype, "fp32")
