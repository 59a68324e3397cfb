"""Joining a job: what DeepSpeed and process groups are told, and which optimizer serves where."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from datetime import timedelta

import pytest
import torch

from megatron_patch.config.options import ScheduleOptions
from megatron_patch.optimizers.state import make_optimizer
from megatron_patch.requirements import hidden_module
from tests.distributed.ranks import run_ranks


def _join_as_on_a_gpu(visible, local):
    """Joins where each task of a Slurm step sees `visible` GPUs; returns the device and what DeepSpeed takes for its number."""
    import deepspeed

    from megatron_patch.engine import distributed

    os.environ.update(LOCAL_RANK=str(local), LOCAL_WORLD_SIZE="4", SLURM_GPUS_ON_NODE="4", DS_ACCELERATOR="cuda")
    torch.cuda.is_available, torch.cuda.device_count, torch.cuda.set_device = lambda: True, lambda: visible, lambda device: None
    deepspeed.init_distributed = lambda **settings: None
    device = distributed.init_distributed()
    return device.index, os.environ["LOCAL_RANK"]


@pytest.mark.parametrize(("visible", "expected"), [(4, (3, "3")), (1, (0, "0"))])
def test_deepspeed_takes_the_gpu_that_the_rank_has(tmp_path, visible, expected):
    """With --gpus-per-task each rank sees its own GPU alone, as number 0, whatever its place on the node."""
    assert run_ranks(_join_as_on_a_gpu, 1, tmp_path, visible, 3) == [expected]


def _times():
    from megatron_patch.engine.distributed import init_distributed
    from megatron_patch.parallel.grid import Grid
    from megatron_patch.parallel.groups import make_groups

    init_distributed(timeout_minutes=7)
    groups = make_groups(Grid(torch.distributed.get_rank(), 2, tensor_parallel_size=2))
    import deepspeed

    deepspeed.comm.new_group([0, 1])
    known = torch.distributed.distributed_c10d._world.pg_map
    assert groups.tensor in known and len(known) >= 4
    return {group._get_backend(torch.device("cpu")).options._timeout for group in known}


def test_every_group_waits_as_long_as_the_job(tmp_path):
    assert run_ranks(_times, 2, tmp_path) == [{timedelta(minutes=7)}] * 2


@pytest.mark.parametrize(("cuda", "offloaded", "expected"), [(True, False, "apex"), (True, True, "torch"), (False, False, "torch")])
def test_apex_serves_where_the_optimizer_is_on_a_gpu(monkeypatch, cuda, offloaded, expected):
    class FusedAdam(torch.optim.AdamW):
        def __init__(self, groups, adam_w_mode, **settings):
            super().__init__(groups, **settings)

    apex = types.ModuleType("apex.optimizers")
    apex.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    made = make_optimizer([{"params": [torch.nn.Parameter(torch.ones(2))]}], ScheduleOptions(), offloaded)
    assert ("apex" if isinstance(made, FusedAdam) else "torch") == expected


def test_joining_a_job_imports_no_mlflow_which_stays_importable():
    check = "from deepspeed.autotuning import autotuner; print(autotuner.has_mlflow); import mlflow; print(mlflow.__name__)"
    code = f"from megatron_patch.engine.distributed import init_distributed; init_distributed(); {check}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["False", "mlflow"]


def test_a_loaded_module_is_not_hidden():
    with hidden_module("types"):
        import types as loaded
    assert loaded is types is sys.modules["types"]
