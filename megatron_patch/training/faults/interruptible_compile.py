"""Lets training continue uncompiled if a request to stop ends the compilers of --compile.

Slurm sends a signal to every process of a job: ranks take it as a request to save and stop, but compiler processes end. Graphs that are not
compiled by then run uncompiled until the run has saved.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

_SIGNAL_SECONDS = 1.0  # by which the signal may reach this rank after it ended a compiler


def interruptible(stop_signalled: Callable[[], bool], backend: str = "inductor") -> Callable[..., Any]:
    """Returns a backend for torch.compile that runs a graph uncompiled if compilation fails after a signal to stop.

    Args:
        stop_signalled: whether this rank has received a signal to stop.
        backend: name of the backend that compiles.
    """
    compile_graph = torch._dynamo.lookup_backend(backend)

    def compile_or_not(graph: torch.fx.GraphModule, inputs: list[torch.Tensor], **options: Any) -> Any:
        try:
            return compile_graph(graph, inputs, **options)
        except Exception:
            deadline = time.monotonic() + _SIGNAL_SECONDS
            while not stop_signalled():
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.01)
        print("a signal to stop ended a compiler; its graph runs uncompiled until the run has saved", file=sys.stderr)
        return graph.forward

    return compile_or_not
