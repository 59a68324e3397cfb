"""Keeps what a run changes in its process, and restores it: for a process that lives on after the run, such as a notebook.

In: nothing. Out: a context, after which environment variables, umask, the hook for uncaught errors, torch's threads, random numbers and
timeouts, and DeepSpeed's logging are as they were before. Process groups are the matter of distributed.py, signal handlers of
`StopRequests`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator

from megatron_patch.engine.environment import use_expandable_segments
from megatron_patch.utils.files import deny_writing_by_everybody


@contextlib.contextmanager
def restored_process() -> Iterator[None]:
    """Prepares the process for a run, and restores its state at the end of the block, also after an error."""
    environment, umask = dict(os.environ), os.umask(0o077)
    os.umask(umask)
    hook = sys.excepthook  # torch replaces it in each process group
    deny_writing_by_everybody()
    use_expandable_segments()
    try:
        with _restored_torch():
            yield
    finally:
        sys.excepthook = hook
        os.umask(umask)
        _restore_environment(environment)
        # An engine has circular references, which would keep its memory until Python happens to collect them.
        gc.collect()
        _release_device_memory()


def _restore_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


@contextlib.contextmanager
def _restored_torch() -> Iterator[None]:
    """Restores what the package and DeepSpeed change in torch, and DeepSpeed's own settings where it was imported before."""
    import torch
    from torch.distributed import distributed_c10d

    threads, random, timeouts = torch.get_num_threads(), torch.get_rng_state(), ("default_pg_timeout", "default_pg_nccl_timeout")
    of_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    before = {name: getattr(distributed_c10d, name) for name in timeouts}
    deepspeed = sys.modules.get("deepspeed")
    level, operators = (deepspeed.utils.logger.level, deepspeed.ops.__compatible_ops__) if deepspeed is not None else (None, None)
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_rng_state(random)
        if of_devices:
            torch.cuda.set_rng_state_all(of_devices)
        for name, value in before.items():
            setattr(distributed_c10d, name, value)
        if deepspeed is not None:
            deepspeed.utils.logger.setLevel(level)
            deepspeed.ops.__compatible_ops__ = operators


def _release_device_memory() -> None:
    """Gives the memory that torch keeps for later tensors back to the device."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
