"""What a run tells of the device that it is on."""

from __future__ import annotations

import resource

import torch


def device_name(device: torch.device) -> str:
    """What the device is called: the GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def memory_gib(device: torch.device) -> float:
    """Highest memory of this rank so far: the allocator's on a GPU, the process' resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
