"""Chooses GPUs or the CPU before DeepSpeed is imported, which otherwise probes for devices and warns. In: the environment."""

from __future__ import annotations

import os

from megatron_patch.engine.environment import use_expandable_segments


def choose_accelerator() -> bool:
    """Returns whether ranks compute on GPUs, and sets DS_ACCELERATOR for DeepSpeed if they do not; imports torch.

    The memory allocator is chosen first, because torch reads its setting when it is imported.
    """
    use_expandable_segments()
    import torch

    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    return cuda
