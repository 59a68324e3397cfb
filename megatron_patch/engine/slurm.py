"""Reads a Slurm task as a rank: `srun` sets other variables than launchers do, and this file translates them.

In: the variables that srun sets. Out: the rank, the sizes, and the address and port of rank 0. Only variables of a job step are read
(SLURM_STEP_...): a batch script and an interactive shell also carry SLURM_PROCID and SLURM_NTASKS, although each is a single process.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_patch.errors import ConfigError

_FIRST_PORT, _PORTS = 20_000, 10_000
"""Below the ports that Linux assigns to outgoing connections (32768 and up)."""


@dataclass(frozen=True)
class SlurmTask:
    """One task of a Slurm job step.

    Args:
        rank: number of the task among all tasks of the step.
        size: number of tasks of the step.
        local_rank: number of the task among the tasks of its node.
        local_size: number of tasks of its node.
        master_address: the step's first node, where rank 0 runs.
        master_port: the same for all tasks of a step; different in other steps and, most likely, in other jobs.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    master_address: str
    master_port: int


def slurm_task(environment: Mapping[str, str]) -> SlurmTask | None:
    """Returns the task that srun started this process as, or None if srun did not start it.

    Raises:
        ConfigError: a variable is missing or has a value that Slurm does not set.
    """
    if "SLURM_STEP_NUM_TASKS" not in environment:
        return None
    try:
        node = int(environment["SLURM_NODEID"])
        return SlurmTask(
            rank=int(environment["SLURM_PROCID"]),
            size=int(environment["SLURM_STEP_NUM_TASKS"]),
            local_rank=int(environment["SLURM_LOCALID"]),
            local_size=_tasks_of_nodes(environment["SLURM_STEP_TASKS_PER_NODE"])[node],
            master_address=first_host(environment["SLURM_STEP_NODELIST"]),
            master_port=_FIRST_PORT + (int(environment["SLURM_JOB_ID"]) * 16 + int(environment["SLURM_STEP_ID"])) % _PORTS,
        )
    except (KeyError, ValueError, IndexError) as error:
        raise ConfigError(
            f"cannot read the variables of this Slurm step: {type(error).__name__} {error}",
            "SLURM_PROCID, SLURM_LOCALID, SLURM_NODEID, SLURM_JOB_ID, SLURM_STEP_ID, SLURM_STEP_NUM_TASKS, SLURM_STEP_TASKS_PER_NODE "
            "and SLURM_STEP_NODELIST as srun sets them",
            "start the ranks with srun as examples/slurm/ does, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT",
        ) from error


def first_host(node_list: str) -> str:
    """Returns the first host of a node list in Slurm's short form: "gpu[007-009,12],login" -> "gpu007".

    Raises:
        ValueError: the text is not a node list.
    """
    match = re.match(r"(?:[^][,\s]|\[[^][\s]+\])+(?=,|$)", node_list)
    if match is None:
        raise ValueError(f"{node_list!r} is not a node list")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", match.group())


def _tasks_of_nodes(counts: str) -> list[int]:
    """Returns the number of tasks of each node from Slurm's short form: "2(x3),1" -> [2, 2, 2, 1]."""
    tasks: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"{counts!r} is not a list of tasks per node")
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks
