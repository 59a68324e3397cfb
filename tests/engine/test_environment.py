"""The rank of a process: from a launcher's variables, from those of a Slurm step, or without either."""

from __future__ import annotations

import os

import pytest

from megatron_patch.engine.environment import (
    device_index,
    local_world_size,
    ranks_from_environment,
    rendezvous_address,
    threads_per_rank,
    use_expandable_segments,
)
from megatron_patch.engine.slurm import SlurmTask, first_host, slurm_task
from megatron_patch.errors import ConfigError, MegatronPatchError

# As srun set them for task 5 of a step on n[07-08,12] with 2, 2 and 2 tasks.
STEP = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NODELIST": "n[07-08,12]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}
# What a batch script and an interactive shell see: the variables of the job and of its first task.
BATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_CPUS_PER_TASK": "1",
}


@pytest.fixture
def environment(monkeypatch):
    """Sets the given variables after all variables of launchers and of Slurm are removed."""
    for name in list(os.environ):
        if name.startswith(("SLURM", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)

    def set_to(*parts, **more):
        for values in (*parts, more):
            for name, value in values.items():
                monkeypatch.setenv(name, value)

    return set_to


def test_no_launcher_is_a_job_of_one(environment):
    environment()
    assert ranks_from_environment() == (0, 1, 0)
    assert rendezvous_address()[0] == "127.0.0.1"


def test_a_task_of_a_step_is_a_rank(environment):
    environment(STEP)
    assert ranks_from_environment() == (5, 6, 1)
    address, port = rendezvous_address()
    assert address == "n07" and 20_000 <= port < 30_000
    assert local_world_size() == 2


def test_concurrent_steps_use_different_ports(environment):
    ports = set()
    for job in range(50):
        for step in range(3):
            task = slurm_task({**STEP, "SLURM_JOB_ID": str(4_000_000 + job), "SLURM_STEP_ID": str(step)})
            assert isinstance(task, SlurmTask)
            ports.add(task.master_port)
    assert len(ports) == 150


def test_a_batch_script_is_one_process(environment):
    environment(BATCH)
    assert ranks_from_environment() == (0, 1, 0)


def test_a_launcher_inside_a_step_comes_first(environment):
    environment(STEP, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="10.0.0.1", MASTER_PORT="29500")
    assert ranks_from_environment() == (1, 2, 1)
    assert rendezvous_address() == ("10.0.0.1", 29500)


def test_the_batch_script_may_set_the_address_of_rank_0(environment):
    environment(STEP, MASTER_ADDR="10.0.0.1", MASTER_PORT="4321")
    assert ranks_from_environment() == (5, 6, 1)
    assert rendezvous_address() == ("10.0.0.1", 4321)


def test_a_task_uses_the_cores_that_slurm_gave_it(environment, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(24)))
    environment(STEP, SLURM_CPUS_PER_TASK="8")
    assert threads_per_rank() == 8
    monkeypatch.delenv("SLURM_CPUS_PER_TASK")
    assert threads_per_rank() == 12
    environment(RANK="0", WORLD_SIZE="8", LOCAL_WORLD_SIZE="4")
    assert threads_per_rank() == 6


def test_each_rank_has_its_gpu(environment):
    environment(STEP, SLURM_GPUS_ON_NODE="2")
    assert [device_index(local, 2) for local in range(2)] == [0, 1]
    assert [device_index(local, 8) for local in range(2)] == [0, 1]
    assert [device_index(local, 1) for local in range(2)] == [0, 0], "each task sees only its own GPU"


@pytest.mark.parametrize("local", [0, 1])
def test_every_rank_of_a_node_with_too_few_gpus_raises(environment, local):
    environment(STEP, SLURM_GPUS_ON_NODE="1")
    with pytest.raises(MegatronPatchError, match=r"1 GPU visible on .*, which runs 2 ranks") as error:
        device_index(local, 1)
    assert not isinstance(error.value, ConfigError), "rank 0 alone reports a ConfigError, and it may be on a healthy node"
    environment(RANK=str(local), WORLD_SIZE="8", LOCAL_WORLD_SIZE="8")
    with pytest.raises(MegatronPatchError, match="7 GPUs visible"):
        device_index(local, 7)


def test_a_launcher_that_does_not_set_the_number_of_local_ranks(environment):
    environment(RANK="9", WORLD_SIZE="16", LOCAL_RANK="1")
    assert local_world_size() is None
    assert device_index(1, 8) == 1
    with pytest.raises(MegatronPatchError, match="1 GPU visible"):
        device_index(1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SLURM_PROCID": "x"}, "cannot read the variables of this Slurm step: ValueError"),
        ({"SLURM_STEP_NODELIST": ""}, "not a node list"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2"}, "IndexError"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2x3"}, "'2x3' is not a list of tasks per node"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set without RANK, in a Slurm step of 6 tasks"),
    ],
)
def test_contradictions_are_refused(environment, change, message):
    environment(STEP, change)
    with pytest.raises(ConfigError, match=message) as error:
        ranks_from_environment()
    assert "Allowed: " in str(error.value) and "What to do: " in str(error.value)


def test_a_variable_that_is_missing_is_named(environment, monkeypatch):
    environment(STEP)
    monkeypatch.delenv("SLURM_LOCALID")
    with pytest.raises(ConfigError, match="SLURM_LOCALID"):
        ranks_from_environment()


def test_ranks_without_the_address_of_rank_0_are_refused(environment):
    environment(RANK="1", WORLD_SIZE="2")
    with pytest.raises(ConfigError, match="WORLD_SIZE=2 without MASTER_ADDR"):
        rendezvous_address()


@pytest.mark.parametrize("text", ["", ",n1", "[", "n1[", "]"])
def test_other_texts_than_node_lists_are_refused(text):
    with pytest.raises(ValueError, match="is not a node list"):
        first_host(text)


@pytest.mark.parametrize(
    "given", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}]
)
def test_the_user_s_allocator_settings_take_precedence(given):
    environment = dict(given)
    use_expandable_segments(environment)
    assert environment == (given or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
