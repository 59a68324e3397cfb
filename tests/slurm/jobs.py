"""Submits the templates in examples/slurm/ as a user would, and follows the jobs through the files that they write."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_patch.training.callbacks.metrics import read_metrics
from tests.distributed.runs import DATA, MODEL, ROOT, Run, command
from tests.slurm.cluster import Cluster, wait_until


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    cluster: Cluster
    number: str
    folder: Path
    log: Path

    @property
    def run(self) -> Run:
        """The run that the job has trained so far."""
        return Run(self.folder)

    @property
    def text(self) -> str:
        """The output of all starts of the job."""
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, seconds: float = 200.0) -> dict[str, str]:
        """Waits until the job has ended for good, and returns its fields in Slurm."""
        self.wait_for(lambda: self.cluster.ended(self.number), "the job's end", seconds)
        return self.cluster.job(self.number)

    def completes(self, seconds: float = 200.0) -> dict[str, str]:
        """Waits for the job's end, checks that it completed, and returns its fields in Slurm."""
        fields = self.wait(seconds)
        assert fields["JobState"] == "COMPLETED", self.text[-6000:]
        return fields

    def reaches(self, step: int, seconds: float = 90.0) -> None:
        """Waits until the current start of the job has reached a step."""
        self.wait_for(lambda: self._step() >= step, f"step {step}", seconds)

    def wait_for(self, condition: object, what: str, seconds: float) -> None:
        """Waits for a condition; the error message contains the job's log."""
        wait_until(condition, what, seconds, lambda: f"{self.cluster.job(self.number)}\n{self.text[-6000:]}\n{self.cluster.logs()}")  # type: ignore[arg-type]

    def _step(self) -> int:
        """Returns the newest step; 0 while the current start of the job has taken none."""
        if self.cluster.state(self.number) != "RUNNING" or not (self.folder / "metrics.jsonl").exists():
            return 0
        records = list(read_metrics(self.folder / "metrics.jsonl"))
        starts = [record for record in records if record["type"] == "start"]
        if len(starts) <= int(self.cluster.job(self.number)["Restarts"]):
            return 0
        return max((record["step"] for record in records if record["type"] == "step"), default=0)

    def processes(self) -> list[tuple[int, dict[str, str]]]:
        """Returns (process id, environment) of all processes of the job, on all nodes."""
        return [(pid, environment) for pid, environment in self.cluster.processes() if environment.get("SLURM_JOB_ID") == self.number]

    def ranks(self, rank: int) -> list[int]:
        """Returns the process ids of a rank; at most one."""
        tasks = [
            pid
            for pid, environment in self.processes()
            if (environment.get("SLURM_STEP_ID"), environment.get("SLURM_PROCID")) == ("0", str(rank))
        ]
        return [pid for pid in tasks if b"pretrain_gpt_patch.py" in _command_line(pid) and b"srun" not in _command_line(pid)]

    def signal_rank(self, rank: int, number: signal.Signals) -> None:
        """Sends a signal to the process of one rank directly, without Slurm."""
        (pid,) = self.ranks(rank)
        os.kill(pid, number)


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def write_config(path: Path, *parts: str | Sequence[str]) -> Path:
    """Writes flags and their values as a YAML file and returns its path."""
    lines: list[str] = []
    for word in command(MODEL, DATA, *parts):
        if word.startswith("--"):
            lines.append(f"{word[2:]}: true")
        else:
            lines[-1] = lines[-1].replace(": true", f": {word}")
    path.write_text("\n".join(lines) + "\n")
    return path


def submit(
    cluster: Cluster, template: str, folder: Path, *options: str, config: Path, corpus: str, flags: Sequence[str] = (), **settings: str
) -> Job:
    """Submits a template from the repository's root; options of sbatch reduce its size.

    Args:
        cluster: the cluster.
        template: the template's name in examples/slurm/.
        folder: the run's folder.
        options: options of sbatch.
        config: YAML file of the run.
        corpus: dataset prefix.
        flags: further flags of the program.
        settings: environment variables of the template.
    """
    environment = {
        "CONFIG": str(config),
        "DATA": corpus,
        "SAVE": str(folder),
        "VENV": sys.prefix,
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        **settings,
    }
    log = folder.with_name(f"{folder.name}.log")
    words = ["sbatch", "--parsable", "--cpus-per-task=1", f"--output={log}", *options, f"examples/slurm/{template}.sbatch", *flags]
    number = cluster.command(*words, cwd=ROOT, environment=environment).strip()
    return Job(cluster, number, folder, log)
