"""Compilation that a request to stop may interrupt.

Slurm sends a signal to every process of a job, so that compilers end by the very signal that a rank takes for a request to save and stop.
What they leave uncompiled then runs uncompiled, for the rest of that step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

_SIGNAL_SECONDS = 1.0  # for the signal that ended a compiler to come here


def interruptible(stopping: Callable[[], bool], backend: str = "inductor") -> Callable[..., Any]:
    """A backend for torch.compile: another one, whose failures count only where no stop has been asked for.

    Args:
        stopping: whether this rank has been sent a signal to stop.
        backend: what compiles.
    """
    compile_graph = torch._dynamo.lookup_backend(backend)

    def compile_or_not(graph: torch.fx.GraphModule, inputs: list[torch.Tensor], **options: Any) -> Any:
        try:
            return compile_graph(graph, inputs, **options)
        except Exception:
            deadline = time.monotonic() + _SIGNAL_SECONDS
            while not stopping():
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.01)
        print("a compiler has ended while a stop is asked for: what it left uncompiled runs uncompiled", file=sys.stderr)
        return graph.forward

    return compile_or_not
