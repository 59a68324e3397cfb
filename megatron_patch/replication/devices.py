"""The GPUs or CPU cores of this machine, as a study uses and reports them."""

from __future__ import annotations

import functools
import os
import subprocess


def machine() -> str:
    """Returns the number and the kind of the devices, for the report."""
    if names := gpus():
        return f"{len(names)} x {names[0]}"
    return f"{len(os.sched_getaffinity(0))} CPU cores"


@functools.cache
def gpus() -> tuple[str, ...]:
    """Returns the names of the GPUs that the driver lists."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ()
    return () if listed.returncode else tuple(listed.stdout.strip().splitlines())
