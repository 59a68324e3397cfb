"""A task of a Slurm step as a rank: what `srun` tells each process, in the words of other launchers.

In: the variables that srun sets. Out: rank, sizes, and where rank 0 is to be met. Only a step's own variables are asked
(SLURM_STEP_...): a batch script and an interactive shell carry SLURM_PROCID and SLURM_NTASKS too, and are one process all the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_patch.errors import ConfigError

_FIRST_PORT, _PORTS = 20_000, 10_000
"""Below the ports that systems hand out by themselves (32768 and up)."""


@dataclass(frozen=True)
class SlurmTask:
    """One task of a step.

    Args:
        rank: among all tasks of the step.
        size: tasks of the step.
        local_rank: among the tasks of this node.
        local_size: tasks of this node.
        master_address: the step's first node, where rank 0 runs.
        master_port: the same in all tasks of a step, another one in other steps and, most likely, in other jobs.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    master_address: str
    master_port: int


def slurm_task(environment: Mapping[str, str]) -> SlurmTask | None:
    """The task that srun started this process as; None where it did not.

    Raises:
        ConfigError: variables that are missing or that Slurm would not set.
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
            f"the variables of this Slurm step cannot be read: {type(error).__name__} {error}",
            "SLURM_PROCID, SLURM_LOCALID, SLURM_NODEID, SLURM_JOB_ID, SLURM_STEP_ID, SLURM_STEP_NUM_TASKS, SLURM_STEP_TASKS_PER_NODE "
            "and SLURM_STEP_NODELIST as srun sets them",
            "start the ranks with srun as examples/slurm/ does, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT",
        ) from error


def first_host(node_list: str) -> str:
    """The first name in Slurm's short form of a list of nodes: "gpu[007-009,12],login" begins with gpu007.

    Raises:
        ValueError: this is no such list.
    """
    match = re.match(r"(?:[^][,\s]|\[[^][\s]+\])+(?=,|$)", node_list)
    if match is None:
        raise ValueError(f"a list of nodes {node_list!r}")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", match.group())


def _tasks_of_nodes(counts: str) -> list[int]:
    """Tasks of each node of Slurm's short form: "2(x3),1" is 2, 2, 2, 1."""
    tasks: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"tasks per node {counts!r}")
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks
