"""Joining and leaving the job: from the launcher's environment variables to a process group, and back.

In: what `deepspeed`, `torchrun` or `srun` set (environment.py); nothing of it means a job of one process.
Out: the rank's device and coordinates.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from megatron_patch.engine.environment import device_index, local_world_size, ranks_from_environment, rendezvous_address, threads_per_rank


def init_distributed(timeout_minutes: int = 30) -> torch.device:
    """Joins the job and returns this rank's device (its GPU, or the CPU).

    On CPUs the cores are shared out among the local ranks, unless OMP_NUM_THREADS says otherwise.

    Raises:
        MegatronPatchError: the environment does not say which rank this is, or this node has no GPU for it.
    """
    (rank, size, local), beside, threads = ranks_from_environment(), local_world_size(), threads_per_rank()
    address, port = rendezvous_address()
    # Said in one way from here on, for torch and DeepSpeed.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local), MASTER_ADDR=address, MASTER_PORT=str(port))
    if beside is not None:
        os.environ["LOCAL_WORLD_SIZE"] = str(beside)
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads)
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed would try its compilers here and build shared-memory collectives at every start; an empty table of operators prevents both.
    deepspeed.ops.__compatible_ops__ = {}
    device = torch.device("cuda", device_index(local, torch.cuda.device_count())) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        # DeepSpeed takes it for the number of this rank's GPU, also where the rank sees no other (Slurm's --gpus-per-task).
        os.environ["LOCAL_RANK"] = str(device.index)
    timeout = timedelta(minutes=timeout_minutes)
    # Groups of some ranks, ours and DeepSpeed's, do not take over the job's time-out: on GPUs torch gives each of them 10 minutes.
    torch.distributed.distributed_c10d.default_pg_timeout = timeout
    torch.distributed.distributed_c10d.default_pg_nccl_timeout = timeout
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", timeout=timeout, verbose=False)
    return device


def destroy_distributed() -> None:
    """Leaves the job; without it ZeRO 3 may end with an error while the interpreter shuts down."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def broadcast_object(value: object, source: int = 0) -> object:
    """Gives every rank the source's value (None elsewhere)."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return value
    holder = [value]
    torch.distributed.broadcast_object_list(holder, src=source)
    return holder[0]


def gather_objects(value: object) -> list[object]:
    """Every rank's value, in order of ranks, on every rank."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [value]
    values: list[object] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Waits until every rank is here."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()


def set_once(name: str, word: str, seconds: float = 5.0) -> str | None:
    """What the first rank that came here said; ranks need not come together, and some may hang or be dead.

    Args:
        name: of what is decided.
        word: what this rank says; it counts where no other rank was first.
        seconds: to wait for the keeper of such words, rank 0's process.

    Returns:
        The first rank's word, this one's if that is this rank; None where the keeper does not answer.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return word
    store = torch.distributed.distributed_c10d._get_default_store()
    said: list[str] = []

    def say() -> None:
        with contextlib.suppress(RuntimeError):
            said.append(store.compare_set(_key(name), "", word).decode())

    # The store's own time-out is that of collectives, and cannot be changed for one call.
    asking = threading.Thread(target=say, daemon=True, name="first word")
    asking.start()
    asking.join(seconds)
    return said[0] if said else None


def set_once_reader(name: str) -> Callable[[], str | None]:
    """Asks what `set_once` has heard, whenever it is called, on a connection of its own, which no other thread waits for.

    Returns:
        What the first rank said; None where nobody has said anything. Where the keeper has gone it raises `ConnectionError`.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return lambda: None
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    # Now, while the keeper is there for certain: later one might wait long for it.
    store = store.clone()

    def ask() -> str | None:
        try:
            word: str | None = store.get(_key(name)).decode() if store.check([_key(name)]) else None
        except torch.distributed.DistNetworkError as error:
            raise ConnectionError(str(error)) from error
        except RuntimeError:  # no answer in time: asked again later
            return None
        return word

    return ask


def _key(name: str) -> str:
    return f"megatron_patch/{name}"
