"""The templates on a real cluster of two nodes, with both launchers, give the losses of one process."""

from __future__ import annotations

import pytest

from tests.distributed.runs import ROOT, Run, command, start_process
from tests.slurm.jobs import submit, write_config

PLAN = command("--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --patch-size 3 --train-tokens 4200 --lr 3e-3 --save-interval 8")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config") / "run.yaml", PLAN)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, corpus) -> Run:
    folder = tmp_path_factory.mktemp("single") / "run"
    assert start_process(PLAN, "--data-path", corpus, "--save", str(folder), log=folder.with_name("log")).wait() == 0
    return Run(folder)


@pytest.mark.parametrize("template", ["one_node", "many_nodes"])
def test_slurm_accepts_the_headers(cluster, template):
    """Slurm tests whether it could run the job as written: eight ranks, eight GPUs and 96 cores per node."""
    nodes = [] if template == "one_node" else ["--nodes=2"]
    cluster.command("sbatch", "--test-only", *nodes, f"examples/slurm/{template}.sbatch", cwd=ROOT)
    with pytest.raises(RuntimeError, match="more processors than permitted|not available|Invalid generic resource"):
        cluster.command("sbatch", "--test-only", *nodes, "--gpus-per-node=9", f"examples/slurm/{template}.sbatch", cwd=ROOT)


def test_a_wrong_flag_stops_the_job_with_the_program_s_code(cluster, tmp_path, config, corpus):
    job = submit(cluster, "many_nodes", tmp_path / "run", "--nodes=2", "--ntasks-per-node=1", config=config, corpus=corpus, TENSOR="3")
    fields = job.wait(60)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "2:0", "0"), job.text
    assert job.text.count("What to do") == 1 and "rank 1 on " in job.text and "submit it again" in job.text


def test_a_job_without_its_settings_names_them(cluster, tmp_path, config):
    job = submit(cluster, "many_nodes", tmp_path / "run", "--nodes=1", "--ntasks-per-node=1", config=config, corpus="")
    assert job.wait(60)["JobState"] == "FAILED"
    assert "DATA: is the value of --data-path" in job.text


def test_two_nodes_train_what_one_process_trains(cluster, tmp_path, config, corpus, one_process):
    options = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1"]
    job = submit(cluster, "many_nodes", tmp_path / "run", *options, config=config, corpus=corpus, TENSOR="1")
    job.completes()
    assert job.run.records("start")[0]["ranks"] == 2
    assert job.run.losses == pytest.approx(one_process.losses, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["srun", "deepspeed"])
@pytest.mark.parametrize(
    ("template", "nodes", "ranks", "layout"),
    [
        ("one_node", 1, 2, {}),
        ("many_nodes", 2, 2, {"TENSOR": "2"}),
        ("many_nodes", 2, 2, {"TENSOR": "2", "PIPELINE": "2"}),
        ("many_nodes", 2, 1, {"TENSOR": "1", "PIPELINE": "2"}),
        ("many_nodes", 1, 2, {"TENSOR": "2"}),
    ],
)
def test_every_layout_and_launcher(cluster, tmp_path, config, corpus, one_process, launcher, template, nodes, ranks, layout):
    options = [f"--nodes={nodes}", f"--ntasks-per-node={ranks}", f"--gpus-per-node={ranks}"]
    job = submit(cluster, template, tmp_path / "run", *options, config=config, corpus=corpus, LAUNCHER=launcher, **layout)
    job.completes(300)
    assert f"{nodes * ranks} ranks on n" in job.text and f"by {launcher}" in job.text
    assert job.run.records("start")[0]["ranks"] == nodes * ranks
    assert job.run.losses == pytest.approx(one_process.losses, rel=1e-5)
