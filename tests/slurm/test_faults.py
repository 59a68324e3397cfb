"""Faults of jobs on a cluster, provoked: each job ends, resumes by itself, and trains as an undisturbed job does."""

from __future__ import annotations

import signal
import time

import pytest

from megatron_patch.checkpoint.commit import find_newest_valid
from tests.distributed.runs import Run, command
from tests.slurm.jobs import Job, submit, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PLAN = command("--seq-length 16 --micro-batch-size 2 --global-batch-size 12 --patch-size 3 --train-tokens 80k --lr 3e-3 --save-interval 50")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")
SWITCH = 278  # steps of the patch stage; checked below


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config") / "run.yaml", PLAN)


@pytest.fixture(scope="module")
def unbroken(running_cluster, tmp_path_factory, config, corpus) -> Run:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    job = submit(running_cluster, "many_nodes", folder, *TWO_NODES, config=config, corpus=corpus, TENSOR="1")
    assert job.completes()["Restarts"] == "0"
    assert job.run.records("switch")[0]["step"] == SWITCH
    return job.run


def resumed_at(job: Job) -> list[int]:
    """Returns the step from which each start of a job continued."""
    return [record["step"] for record in job.run.records("start")]


def is_the_same(run: Run, unbroken: Run) -> None:
    """Checks that losses, gradient norms and evaluations are bit-identical."""
    assert run.losses == unbroken.losses
    assert run.values("grad_norm") == unbroken.values("grad_norm")
    assert [e["token_loss"] for e in run.records("evaluation")] == [e["token_loss"] for e in unbroken.records("evaluation")]


@pytest.mark.parametrize("launcher", ["srun", "deepspeed"])
def test_requeued_by_an_administrator(cluster, tmp_path, config, corpus, unbroken, launcher):
    job = submit(cluster, "many_nodes", tmp_path / "run", *TWO_NODES, config=config, corpus=corpus, TENSOR="1", LAUNCHER=launcher)
    job.reaches(120)
    cluster.command("scontrol", "requeue", job.number)
    assert job.completes()["Restarts"] == "1"
    assert resumed_at(job)[0] == 0 and resumed_at(job)[1] >= 100
    is_the_same(job.run, unbroken)


@pytest.mark.parametrize("launcher", ["srun", "deepspeed"])
def test_a_killed_rank_ends_all_ranks_and_the_job_resumes(cluster, tmp_path, config, corpus, unbroken, launcher):
    job = submit(cluster, "many_nodes", tmp_path / "run", *TWO_NODES, config=config, corpus=corpus, TENSOR="1", LAUNCHER=launcher)
    job.reaches(SWITCH + 10)
    job.signal_rank(1, signal.SIGKILL)
    job.wait_for(lambda: cluster.state(job.number) != "RUNNING", "the job's end within a minute on all nodes", 60)
    assert job.completes()["Restarts"] == "1"
    assert "code 137, a rank crashed or hung: requeued" in job.text
    assert resumed_at(job)[1] >= SWITCH
    is_the_same(job.run, unbroken)


def test_a_rank_that_hangs_after_another_died_is_ended_too(cluster, tmp_path, config, corpus, unbroken):
    """Like a collective on GPUs that waits for a dead rank: rank 0 is suspended, so that it cannot notice."""
    job = submit(cluster, "many_nodes", tmp_path / "run", *TWO_NODES, config=config, corpus=corpus, TENSOR="1")
    job.reaches(120)
    job.signal_rank(0, signal.SIGSTOP)
    job.signal_rank(1, signal.SIGKILL)
    job.wait_for(lambda: cluster.state(job.number) != "RUNNING", "the job's end within a minute on all nodes", 60)
    assert job.completes()["Restarts"] == "1"
    is_the_same(job.run, unbroken)


def test_a_job_that_crashes_without_progress_stops(cluster, tmp_path, config, corpus):
    job = submit(cluster, "many_nodes", tmp_path / "run", *TWO_NODES, config=config, corpus=corpus, TENSOR="1", MAX_CRASHES="2")
    for start in range(2):
        job.wait_for(lambda start=start: job.text.count("2 ranks on n[0-1]") == start + 1, "a start", 150)
        job.wait_for(lambda: job.ranks(0), "rank 0", 30)
        job.signal_rank(0, signal.SIGKILL)
    fields = job.wait()
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "137:0", "1"), job.text
    assert "crashed 2 times without a new checkpoint" in job.text


@pytest.mark.parametrize("victim", ["node", "daemon", "daemon and rank"])
def test_the_job_of_a_dead_node_waits_for_a_node_and_resumes(cluster, tmp_path, config, corpus, unbroken, victim):
    """Kills the whole node; or only its daemon; or its daemon and a rank, so that the job ends before Slurm misses the daemon."""
    job = submit(cluster, "many_nodes", tmp_path / "run", *TWO_NODES, config=config, corpus=corpus, TENSOR="1")
    job.reaches(120)
    if victim == "node":
        cluster.kill_node("n1")
    else:
        cluster.kill_daemon("n1")
    if victim == "daemon":
        job.signal_rank(0, signal.SIGSTOP)  # otherwise a fast machine finishes before Slurm misses the daemon
    if victim == "daemon and rank":
        job.signal_rank(1, signal.SIGKILL)
    job.wait_for(lambda: cluster.state(job.number) == "PENDING", "the job back in the queue", 120)
    cluster.start_node("n1")
    assert job.completes()["Restarts"] == "1"
    is_the_same(job.run, unbroken)


@pytest.mark.parametrize("cause", ["a node died", "on purpose"])
def test_it_resumes_on_fewer_nodes(cluster, tmp_path, config, corpus, unbroken, cause):
    job = submit(cluster, "many_nodes", tmp_path / "run", *TWO_NODES, config=config, corpus=corpus, TENSOR="1")
    job.reaches(120)
    if cause == "a node died":
        cluster.kill_node("n1")
    else:
        cluster.command("scontrol", "requeuehold", job.number)
    job.wait_for(lambda: cluster.state(job.number) == "PENDING", "the job back in the queue", 120)
    cluster.command("scontrol", "update", f"JobId={job.number}", "NumNodes=1", "NumTasks=1", "NumCPUs=1")
    try:
        if cause == "on purpose":
            cluster.command("scontrol", "release", job.number)
        assert job.completes()["NumNodes"] == "1"
    finally:
        if cause == "a node died":
            cluster.start_node("n1")
    assert [record["ranks"] for record in job.run.records("start")] == [2, 1]
    assert job.run.losses == pytest.approx(unbroken.losses, rel=1e-4)


def test_a_canceled_job_ends_all_ranks_and_the_same_command_resumes(cluster, tmp_path, config, corpus, unbroken):
    folder = tmp_path / "run"
    job = submit(cluster, "many_nodes", folder, *TWO_NODES, config=config, corpus=corpus, TENSOR="1")
    job.reaches(120)
    cluster.command("scancel", job.number)
    assert job.wait(60)["JobState"] == "CANCELLED"
    job.wait_for(lambda: not job.processes(), "the end of all its processes", 30)
    found = find_newest_valid(folder)
    assert found is not None and found.state.step >= 100 and not found.skipped
    again = submit(cluster, "many_nodes", folder, *TWO_NODES, config=config, corpus=corpus, TENSOR="1")
    again.completes()
    assert resumed_at(again)[1] == found.state.step
    is_the_same(again.run, unbroken)


def test_preempted_by_a_job_of_higher_priority(cluster, tmp_path, config, corpus, unbroken):
    job = submit(cluster, "many_nodes", tmp_path / "run", *TWO_NODES, config=config, corpus=corpus, TENSOR="1")
    job.reaches(120)
    urgent = cluster.command("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    assert int(job.completes()["Restarts"]) >= 1
    assert cluster.state(urgent.strip()) == "COMPLETED"
    is_the_same(job.run, unbroken)


@pytest.mark.parametrize("launcher", ["srun", "deepspeed"])
def test_a_signal_to_all_ranks_as_before_a_time_limit(cluster, tmp_path, config, corpus, unbroken, launcher):
    job = submit(cluster, "many_nodes", tmp_path / "run", *TWO_NODES, config=config, corpus=corpus, TENSOR="1", LAUNCHER=launcher)
    job.reaches(120)
    cluster.command("scancel", "--signal=USR1", job.number)
    job.wait_for(lambda: "preempted, the run is saved: requeued" in job.text, "the job back in the queue", 60)
    stopped_at = job.run.values("step")[-1]
    assert job.completes()["Restarts"] == "1"
    assert resumed_at(job) == [0, stopped_at], "no step is taken twice"
    is_the_same(job.run, unbroken)


@pytest.fixture(scope="module")
def long_config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config") / "long.yaml", PLAN, "--train-tokens 400k")


def test_a_job_continues_after_its_time_limit(cluster, tmp_path, long_config, corpus):
    """A run longer than its limit of a minute is signaled, saves and is requeued until it is done."""
    whole = submit(cluster, "many_nodes", tmp_path / "whole", *TWO_NODES, config=long_config, corpus=corpus, TENSOR="1")
    began = time.monotonic()
    whole.completes(400)
    job = submit(
        cluster, "many_nodes", tmp_path / "run", *TWO_NODES, "--time=1", "--signal=USR1@10", config=long_config, corpus=corpus, TENSOR="1"
    )
    fields = job.completes(600)
    assert int(fields["Restarts"]) >= 1, f"the run is too short: {time.monotonic() - began:.0f} s for both"
    is_the_same(job.run, whole.run)
