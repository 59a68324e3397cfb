"""Which of how many ranks this process is, and where rank 0 is to be met: as launchers and srun set it. No torch here.

In: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT of a launcher, or what srun sets; neither means a job of one process.
Launchers come first, as they may be started by srun themselves.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections.abc import MutableMapping

from megatron_patch.engine.slurm import SlurmTask, slurm_task
from megatron_patch.errors import ConfigError, MegatronPatchError


def ranks_from_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) that the launcher or srun gave this process; without either (0, 1, 0).

    Raises:
        ConfigError: variables that are no numbers or contradict each other.
    """
    task = _task()
    if task is not None:
        if os.environ.get("WORLD_SIZE", str(task.size)) != str(task.size):
            raise ConfigError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} without RANK, in a Slurm step of {task.size} tasks",
                "the step's number of tasks, or no WORLD_SIZE",
                "unset WORLD_SIZE: srun's own variables say which rank is which",
            )
        return task.rank, task.size, task.local_rank
    names = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    try:
        rank, size, local = (int(os.environ.get(name, default)) for name, default in names)
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE or LOCAL_RANK is no number: {error}", "what a launcher sets") from error
    if not 0 <= rank < size:
        raise ConfigError(f"RANK={rank} with WORLD_SIZE={size}", "ranks below the world size", "start the job with a launcher")
    return rank, size, local


def rendezvous_address() -> tuple[str, int]:
    """(address, port) of rank 0: MASTER_ADDR and MASTER_PORT, else what follows from a Slurm step, else a free port of this machine.

    Raises:
        ConfigError: nothing says where the ranks of a job are to meet.
    """
    task = _task()
    _, size, _ = ranks_from_environment()
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if size == 1:
        return address or "127.0.0.1", int(port or free_port())
    if task is not None:
        return address or task.master_address, int(port or task.master_port)
    if not address or not port:
        raise ConfigError(
            f"WORLD_SIZE={size} without {'MASTER_PORT' if address else 'MASTER_ADDR'}",
            "the address and a free port of rank 0's node, the same in all ranks",
            "start the job with deepspeed, torchrun or srun, or set MASTER_ADDR and MASTER_PORT",
        )
    return address, int(port)


def free_port() -> int:
    """A port of this machine that nobody listens on, below those that Linux gives to outgoing connections, one of which could take it."""
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def local_world_size() -> int | None:
    """Ranks on this node; None where the launcher does not say."""
    task = _task()
    if task is not None:
        return task.local_size
    stated = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))
    return int(stated) if stated else None


def threads_per_rank() -> int:
    """Cores for this rank's own threads: what Slurm gave its task, else this process' cores shared out among the node's ranks."""
    cores = len(os.sched_getaffinity(0))
    own = os.environ.get("SLURM_CPUS_PER_TASK")
    if _task() is not None and own:
        return max(1, min(cores, int(own)))
    _, size, _ = ranks_from_environment()
    return max(1, cores // (local_world_size() or size))


def device_index(local_rank: int, visible: int) -> int:
    """Which of the GPUs that this process sees is its own; the only one where Slurm shows each task its own alone (--gpus-per-task).

    Raises:
        MegatronPatchError: there are fewer GPUs than ranks on this node: told by each of its ranks, as other nodes may be well.
    """
    beside = local_world_size() or local_rank + 1
    if beside <= visible:
        return local_rank
    if visible == 1 and int(os.environ.get("SLURM_GPUS_ON_NODE", "0")) >= beside:
        return 0
    raise MegatronPatchError(
        f"{visible} GPUs are to be seen on {socket.gethostname()}, which has {beside} ranks",
        "a GPU for each rank",
        "start as many ranks on a node as it has GPUs (deepspeed --num_gpus, srun --ntasks-per-node), or leave out a node that lost one: "
        "nvidia-smi -L tells, sbatch --exclude leaves it out",
    )


def use_expandable_segments(environment: MutableMapping[str, str] = os.environ) -> None:
    """Tells torch's allocator for GPUs, before torch is imported, to map memory by the page, unless it has been told something already.

    Where a switch of stages changes all activations' sizes, freed memory of the old sizes then serves for the new ones.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & environment.keys():
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _task() -> SlurmTask | None:
    return None if "RANK" in os.environ else slurm_task(os.environ)
