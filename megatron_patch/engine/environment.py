"""This process's rank, the world size and the address of rank 0, from the variables of a launcher or of srun. No torch here.

In: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of a launcher (torchrun, deepspeed), or the variables of srun. Neither means
a job of one process. The launcher's variables take precedence, because srun may have started the launcher.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections.abc import MutableMapping

from megatron_patch.engine.slurm import SlurmTask, slurm_task
from megatron_patch.errors import ConfigError, MegatronPatchError
from megatron_patch.utils.units import plural


def ranks_from_environment() -> tuple[int, int, int]:
    """Returns (rank, world size, local rank) of this process as the launcher or srun set them; without either (0, 1, 0).

    Raises:
        ConfigError: a variable is not a number, or two variables contradict each other.
    """
    task = _task()
    if task is not None:
        if os.environ.get("WORLD_SIZE", str(task.size)) != str(task.size):
            raise ConfigError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set without RANK, in a Slurm step of {plural(task.size, 'task')}",
                "no WORLD_SIZE, or the number of tasks of the step",
                "unset WORLD_SIZE: srun's own variables give each rank its number",
            )
        return task.rank, task.size, task.local_rank
    names = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    try:
        rank, size, local = (int(os.environ.get(name, default)) for name, default in names)
    except ValueError as error:
        raise ConfigError(
            f"RANK, WORLD_SIZE or LOCAL_RANK is not a number: {error}",
            "whole numbers, as a launcher sets them",
            "unset these variables, or start the job with deepspeed, torchrun or srun",
        ) from error
    if not 0 <= rank < size:
        raise ConfigError(
            f"RANK={rank} with WORLD_SIZE={size}",
            "ranks from 0 to below the world size",
            "start the job with deepspeed, torchrun or srun, which set both",
        )
    return rank, size, local


def rendezvous_address() -> tuple[str, int]:
    """Returns (address, port) of rank 0: MASTER_ADDR and MASTER_PORT, else those of the Slurm step, else a free port of this machine.

    Raises:
        ConfigError: a job of several ranks has no address or port of rank 0, or the port is not one.
    """
    task = _task()
    _, size, _ = ranks_from_environment()
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if size == 1:
        return address or "127.0.0.1", _port(port) if port else free_port()
    if task is not None:
        return address or task.master_address, _port(port) if port else int(task.master_port)
    if not address or not port:
        raise ConfigError(
            f"WORLD_SIZE={size} without {'MASTER_PORT' if address else 'MASTER_ADDR'}",
            "the address of rank 0's node and a free port there, the same on all ranks",
            "start the job with deepspeed, torchrun or srun, or set MASTER_ADDR and MASTER_PORT",
        )
    return address, _port(port)


def _port(text: str) -> int:
    port = _number(text, 65_535)
    if port is None:
        raise ConfigError(
            f"MASTER_PORT={text[:40]} is not a port",
            "a whole number from 1 to 65535",
            "correct MASTER_PORT, or the launcher's --master_port (deepspeed, torchrun)",
        )
    return port


def _number(text: str, largest: int) -> int | None:
    """Returns the whole number from 1 to `largest` that a variable of the environment contains, or None if it contains something else."""
    known = text.isascii() and text.isdigit() and len(text) <= len(str(largest))
    return int(text) if known and 1 <= int(text) <= largest else None


def free_port() -> int:
    """Returns an unused port of this machine.

    The port is below 32,768: from there on Linux assigns ports to outgoing connections, one of which could take it.
    """
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def local_world_size() -> int | None:
    """Returns the number of ranks on this node, or None if the launcher does not set it.

    Raises:
        ConfigError: the variable is not such a number.
    """
    task = _task()
    if task is not None:
        return task.local_size
    stated = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))
    if not stated:
        return None
    ranks = _number(stated, 10**7 - 1)
    if ranks is None:
        raise ConfigError(
            f"LOCAL_WORLD_SIZE={stated[:40]} is not a number of ranks",
            "whole numbers from 1",
            "start the job with deepspeed, torchrun or srun",
        )
    return ranks


def threads_per_rank() -> int:
    """Returns the number of cores for this rank: those of its Slurm task, else an equal share of this process's cores per local rank."""
    cores = len(os.sched_getaffinity(0))
    cpus_per_task = os.environ.get("SLURM_CPUS_PER_TASK")
    if _task() is not None and cpus_per_task:
        return max(1, min(cores, int(cpus_per_task)))
    _, size, _ = ranks_from_environment()
    return max(1, cores // (local_world_size() or size))


def device_index(local_rank: int, visible: int) -> int:
    """Returns the index of this rank's GPU among the GPUs that are visible to this process.

    The index is the local rank; it is 0 where Slurm shows each task only the task's own GPU (--gpus-per-task).

    Raises:
        MegatronPatchError: this node has fewer GPUs than ranks. Every rank of the node raises it: other nodes may be healthy.
    """
    local_size = local_world_size() or local_rank + 1
    if local_size <= visible:
        return local_rank
    if visible == 1 and int(os.environ.get("SLURM_GPUS_ON_NODE", "0")) >= local_size:
        return 0
    raise MegatronPatchError(
        f"{plural(visible, 'GPU')} visible on {socket.gethostname()}, which runs {plural(local_size, 'rank')}",
        "one GPU for each rank",
        "start as many ranks on a node as it has GPUs (deepspeed --num_gpus, srun --ntasks-per-node); if the node lost a GPU "
        "(check with nvidia-smi -L), exclude the node (sbatch --exclude)",
    )


def is_first_rank() -> bool:
    """Returns whether this process is rank 0, which prints for all ranks."""
    return ranks_from_environment()[0] == 0


def use_expandable_segments(environment: MutableMapping[str, str] = os.environ) -> None:
    """Makes torch's CUDA allocator use expandable segments, unless the user has configured it; must run before torch is imported.

    A switch changes the sizes of all activations. With expandable segments, freed memory of the old sizes is reused for the new ones.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & environment.keys():
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _task() -> SlurmTask | None:
    return None if "RANK" in os.environ else slurm_task(os.environ)
