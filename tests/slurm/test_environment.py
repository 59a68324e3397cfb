"""The environment of ranks, compared with the variables and answers of a real Slurm."""

from __future__ import annotations

import json
import sys

import pytest

from megatron_patch.engine.slurm import first_host
from tests.distributed.runs import ROOT

ASK = """\
import json, os, sys
from megatron_patch.engine.environment import local_world_size, ranks_from_environment, rendezvous_address
print(json.dumps([*ranks_from_environment(), local_world_size(), *rendezvous_address(), os.environ["SLURMD_NODENAME"]]))
"""


@pytest.mark.parametrize(
    "nodes",
    [
        "n0",
        "n[0-1]",
        "n[0,3-5]",
        "n[007-012]",
        "gpu-a[3],gpu-b[1-2]",
        "login,n[1-2]",
        "rack[2-3]node[01-02]",
        "n[9,1]",
        "x.y-z[10-11]",
    ],
)
def test_the_first_host_is_scontrol_s(cluster, nodes):
    assert first_host(nodes) == cluster.command("scontrol", "show", "hostnames", nodes).splitlines()[0]


def test_tasks_of_a_step_are_ranks(cluster):
    """Three tasks on one node and one on the other, so that the numbers differ."""
    words = ["srun", "--nodes=2", "--ntasks=4", "--ntasks-per-node=3", "--distribution=plane=3", sys.executable, "-c", ASK]
    answers = [json.loads(line) for line in cluster.command(*words, cwd=ROOT).splitlines()]
    ports = {answer[5] for answer in answers}
    assert len(ports) == 1
    assert sorted((*answer[:5], answer[6]) for answer in answers) == [
        (0, 4, 0, 3, "n0", "n0"),
        (1, 4, 1, 3, "n0", "n0"),
        (2, 4, 2, 3, "n0", "n0"),
        (3, 4, 0, 1, "n0", "n1"),
    ]


def test_a_batch_script_is_a_job_of_one_process(cluster, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\n{sys.executable} - <<'END'\n{ASK}END\n")
    out = tmp_path / "out"
    cluster.command("sbatch", "--wait", "--nodes=2", "--ntasks-per-node=2", f"--output={out}", script, cwd=ROOT)
    assert json.loads(out.read_text())[:5] == [0, 1, 0, None, "127.0.0.1"]
