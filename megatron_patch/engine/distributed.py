"""Starts and ends torch.distributed for this rank, and wraps the few collectives and the key-value store that other modules use.

In: the variables that `deepspeed`, `torchrun` or `srun` set (environment.py); without them a job of one process. Out: this rank's device.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from megatron_patch.engine.accelerator import choose_accelerator
from megatron_patch.engine.environment import device_index, local_world_size, ranks_from_environment, rendezvous_address, threads_per_rank
from megatron_patch.engine.rendezvous import explained, notice_of_waiting, require_address
from megatron_patch.requirements import hidden_module

_READ = "/read"  # the key of the number of ranks that have read a decision
_LEAVE_SECONDS = 10.0  # longer than the end of process groups takes on which no rank waits
_store: Any = None
_jobs = 0
"""The store of this process's jobs of several ranks, and how many there were."""
_earlier_groups: list[Any] | None = None
"""The process groups of this process before it joined the job that it is in; None: it is in none."""


def init_distributed(timeout_minutes: int = 30) -> torch.device:
    """Initializes torch.distributed and returns this rank's device (its GPU, or the CPU).

    On CPUs the local ranks share the cores equally, unless OMP_NUM_THREADS is set.

    Args:
        timeout_minutes: how long a collective waits for other ranks, in all process groups.

    Raises:
        MegatronPatchError: the environment does not determine this rank, this node has no GPU for it, or the ranks do not find each other.
    """
    (rank, size, local_rank), local_size, threads = ranks_from_environment(), local_world_size(), threads_per_rank()
    address, port = rendezvous_address()
    # From here on the variables of a launcher are set, also under srun: torch and DeepSpeed read them.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank), MASTER_ADDR=address, MASTER_PORT=str(port))
    if local_size is not None:
        os.environ["LOCAL_WORLD_SIZE"] = str(local_size)
    cuda = choose_accelerator()
    if not cuda and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    with hidden_module("mlflow"):  # only DeepSpeed's autotuner uses it, and its import takes nearly as long as the rest of DeepSpeed
        import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # An empty table of operators keeps DeepSpeed from probing compilers and from building shared-memory collectives at every start.
    deepspeed.ops.__compatible_ops__ = {}
    device = torch.device("cuda", device_index(local_rank, torch.cuda.device_count())) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        # DeepSpeed uses LOCAL_RANK as the index of this rank's GPU, which is 0 if the rank sees only its own (Slurm's --gpus-per-task).
        os.environ["LOCAL_RANK"] = str(device.index)
    global _earlier_groups
    if _earlier_groups is None:
        _earlier_groups = _process_groups()
    timeout = timedelta(minutes=timeout_minutes)
    # Process groups of some ranks do not inherit the timeout of the default group: with NCCL, torch gives each of them 10 minutes.
    torch.distributed.distributed_c10d.default_pg_timeout = timeout
    torch.distributed.distributed_c10d.default_pg_nccl_timeout = timeout
    if not torch.distributed.is_initialized():
        require_address(address, port)
        try:
            # One rank of each node is enough.
            with notice_of_waiting(address, port, rank, size) if local_rank == 0 else contextlib.nullcontext():
                backend = "nccl" if cuda else "gloo"
                if size > 1:
                    _join(backend, rank, size, timeout)
                deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
        except Exception as error:
            known = explained(error, address, port, size)
            if known is None:
                raise
            raise known from error
    return device


def _join(backend: str, rank: int, size: int, timeout: timedelta) -> None:
    """Makes the default group on the store that all jobs of this process share, each with names of its own.

    A second store on the same port would have to wait for the end of the first one on all ranks, and the store of torchrun keeps the names
    of an earlier job.
    """
    global _store, _jobs
    if _store is None:
        _store, _, _ = next(torch.distributed.rendezvous("env://", rank, size, timeout=timeout))
    _store.set_timeout(timeout)
    _jobs += 1
    store = torch.distributed.PrefixStore(f"megatron_patch/{_jobs}", _store)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def destroy_distributed() -> None:
    """Destroys the process groups that exist since `init_distributed`, and what DeepSpeed remembers of them; every rank must call it.

    Then this process can join another job. A default group that a user's own script made stays. Without this call, ZeRO 3 may end with an
    error while the interpreter shuts down.
    """
    global _earlier_groups
    earlier, _earlier_groups = _earlier_groups or [], None
    if not torch.distributed.is_initialized():
        return
    if earlier:
        for group in reversed([group for group in _process_groups() if group not in earlier]):
            torch.distributed.destroy_process_group(group)
    else:
        torch.distributed.destroy_process_group()
    _forget_job()


def _process_groups() -> list[Any]:
    """Returns the process groups of this process, the default group first; none before the process has joined a job."""
    return list(torch.distributed.distributed_c10d._world.pg_map) if torch.distributed.is_initialized() else []


def _forget_job() -> None:
    """Clears what DeepSpeed keeps in module variables: destroyed process groups, and models, whose memory would never be freed."""
    modules: dict[str, Any] = {name[len("deepspeed.") :]: module for name, module in sys.modules.items() if name.startswith("deepspeed.")}
    if "utils.groups" in modules:
        modules["utils.groups"]._release_process_group_references()
    if "runtime.pipe.p2p" in modules:
        p2p = modules["runtime.pipe.p2p"]
        p2p._groups, p2p._grid, p2p._async = None, None, []
    if "runtime.zero.parameter_offload" in modules:
        # Not empty after an error in a forward pass.
        modules["runtime.zero.parameter_offload"].FWD_MODULE_STACK.clear()
    if "runtime.zero.partitioned_param_coordinator" in modules:
        coordinator = modules["runtime.zero.partitioned_param_coordinator"].PartitionedParameterCoordinator
        # A method caches its results for each model, below a decorator that hides the cache.
        hidden = [cell.cell_contents for method in vars(coordinator).values() for cell in getattr(method, "__closure__", None) or ()]
        for function in hidden:
            if hasattr(function, "cache_clear"):
                function.cache_clear()


def leave_after_error() -> bool:
    """Destroys the process groups of a job that has failed; returns False if they do not end, because a peer is inside of a collective.

    Then this process cannot join another job.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        destroy_distributed()
        return True
    thread = threading.Thread(target=destroy_distributed, daemon=True, name="close connections")
    thread.start()
    thread.join(_LEAVE_SECONDS)
    return not thread.is_alive()


def broadcast_object(value: object, source: int = 0) -> object:
    """Returns the value of rank `source` on every rank; the other ranks may pass None."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return value
    holder = [value]
    torch.distributed.broadcast_object_list(holder, src=source)
    return holder[0]


def gather_objects(value: object) -> list[object]:
    """Returns the values of all ranks, in the order of ranks, on every rank."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [value]
    values: list[object] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Waits until every rank has called this function."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()


def set_once(key: str, value: str, seconds: float = 5.0) -> str | None:
    """Sets a key of the job's store unless another rank has set it before, and returns the value that holds.

    Works while other ranks hang or are dead: it is not a collective.

    Args:
        key: name of the decision.
        value: this rank's proposal; it holds if no other rank was first.
        seconds: how long to wait for the store, which rank 0's process serves.

    Returns:
        The value of the first rank that set the key, maybe this one; None if the store does not answer.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return value
    store = torch.distributed.distributed_c10d._get_default_store()
    answers: list[str] = []

    def propose() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(store.compare_set(_key(key), "", value).decode())
            store.add(_key(key) + _READ, 1)

    # The store's own timeout is that of collectives, and cannot be changed for a single call.
    thread = threading.Thread(target=propose, daemon=True, name="set once")
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def serve_until_read(key: str, seconds: float) -> None:
    """Keeps this process, which serves the job's store, until every rank has called `set_once`, or for some seconds.

    On CPUs it also closes this rank's connections, so that ranks that wait for it in a collective notice at once.

    Args:
        key: name of the decision; this rank has called `set_once` for it.
        seconds: how long to wait at most.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    ranks, end = torch.distributed.get_world_size(), time.monotonic() + seconds
    store = torch.distributed.distributed_c10d._get_default_store()
    if torch.distributed.get_backend() == "gloo":
        threading.Thread(target=torch.distributed.destroy_process_group, daemon=True, name="close connections").start()
    with contextlib.suppress(RuntimeError):
        while time.monotonic() < end and store.add(_key(key) + _READ, 0) < ranks:
            time.sleep(0.05)


def set_once_reader(key: str) -> Callable[[], str | None]:
    """Returns a function that reads the value that `set_once` has set, on a connection of its own, so that no other thread waits for it.

    The function returns None while the key is not set. It raises `ConnectionError` if the process that serves the store has ended.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return lambda: None
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    # Connects now, while the store is certainly served: a later attempt might wait long.
    store = store.clone()

    def read() -> str | None:
        try:
            value: str | None = store.get(_key(key)).decode() if store.check([_key(key)]) else None
        except torch.distributed.DistNetworkError as error:
            raise ConnectionError(str(error)) from error
        except RuntimeError:  # no answer in time: the next call tries again
            return None
        return value

    return read


def _key(key: str) -> str:
    return f"megatron_patch/{key}"
