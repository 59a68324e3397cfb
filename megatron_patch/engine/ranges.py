"""Names the parts of a step, so that a profiler shows them.

In: a name. Out: a block that torch's profiler and, as NVTX range, Nsight Systems show under "megatron_patch: NAME". Without a profiler it
costs some microseconds.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

PREFIX = "megatron_patch: "
_PIPELINE_NAMES = {"ForwardPass": "forward", "BackwardPass": "backward", "OptimizerStep": "optimizer"}


def named_range(name: str) -> AbstractContextManager[Any]:
    """Returns the block of a part of a step."""
    return torch.profiler.record_function(PREFIX + name)


def named_instructions(instructions: dict[type, Callable[..., Any]]) -> dict[type, Callable[..., Any]]:
    """Returns the instructions of DeepSpeed's pipeline, each of which runs in a block with its name: "forward", "send activation", …"""

    def named(kind: type, run: Callable[..., Any]) -> Callable[..., Any]:
        name = _PIPELINE_NAMES.get(kind.__name__) or re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind.__name__).lower()

        @functools.wraps(run)
        def run_named(*args: Any, **kwargs: Any) -> Any:
            with named_range(name):
                return run(*args, **kwargs)

        return run_named

    return {kind: named(kind, run) for kind, run in instructions.items()}
