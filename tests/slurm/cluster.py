"""A real Slurm cluster of two nodes on this machine: munge, a controller, and one daemon per node.

Usage, as root, with Debian's packages slurmctld, slurmd, slurm-client and munge:

    python -m tests.slurm.cluster up        starts the cluster, prints the variable to export, and stops the cluster on Ctrl-C

and, in another terminal, after the printed `export SLURM_CONF=...`: sinfo, sbatch, srun, squeue, scancel, scontrol as on any cluster.

Nodes n0 and n1 report 128 CPUs and 8 GPUs each, like the nodes that the templates are made for. Jobs of the partition `urgent` preempt
those of the default partition. All files are in one folder in /tmp, a private hosts file resolves the names of the nodes, and only
processes that this cluster started are ended.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

NODES = {"n0": "127.0.0.1", "n1": "127.0.0.2"}
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "sinfo", "squeue", "setpriv", "unshare")
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE"}

# cred_expire is also how long a requeued job waits before it may start again: 120 seconds by default, at least 5.
_CONFIGURATION = """\
ClusterName=patch
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MinJobAge=36000
KillWait=20
SlurmdTimeout=10
MessageTimeout=5
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""


def missing() -> str | None:
    """Returns the reason why no cluster can be started on this machine, or None."""
    if os.geteuid() != 0:
        return "only root can start a Slurm cluster"
    absent = [name for name in _PROGRAMS if not shutil.which(name)]
    if absent:
        return f"Slurm is not installed (apt install slurmctld slurmd slurm-client munge): {', '.join(absent)} missing"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        return "this container does not allow mount namespaces, which the names of the nodes need"
    return None


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]


def wait_until(condition: Callable[[], object], what: str, seconds: float = 60.0, explain: Callable[[], str] = str) -> None:
    """Polls until a condition holds.

    Args:
        condition: the condition.
        what: its name, for the error message.
        seconds: how long to wait.
        explain: returns details for the error message.

    Raises:
        TimeoutError: the condition did not hold within the time.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:.0f} seconds: {what}\n{explain()}")
        time.sleep(0.1)


class Cluster:
    """A cluster that runs from `start` to `stop`.

    Its folder has a short path and is readable by all, because it contains sockets: their paths may have at most 107 characters, and munge
    refuses private folders.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.folder.chmod(0o755)
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Writes the configuration, starts all daemons and waits for idle nodes."""
        for name in ("munge", "state", *NODES):
            (self.folder / name).mkdir(mode=0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        host, (controller_port, *ports) = socket.gethostname().partition(".")[0], _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} CPUs=128 RealMemory=1000000 Gres=gpu:8 State=UNKNOWN"
            for (name, address), port in zip(NODES.items(), ports, strict=True)
        )
        # The port of rank 0 depends on the job number, so concurrent clusters on one machine must number their jobs differently.
        first_job = random.SystemRandom().randrange(1, 1_000_000)
        self._write(
            "slurm.conf",
            _CONFIGURATION.format(first_job=first_job, host=host, controller_port=controller_port, folder=self.folder, nodes=nodes),
        )
        for number in range(8):
            (self.folder / f"gpu{number}").symlink_to("/dev/null")
        self._write("gres.conf", f"Name=gpu File={self.folder}/gpu[0-7]\n")
        self._write("hosts", Path("/etc/hosts").read_text() + "".join(f"{address} {name}\n" for name, address in NODES.items()))
        munge = self.folder / "munge"
        places = {
            "key-file": key,
            "socket": munge / "socket",
            "pid-file": munge / "pid",
            "log-file": munge / "log",
            "seed-file": munge / "seed",
        }
        self._spawn("munged", ["munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in places.items())])
        wait_until((munge / "socket").exists, "munge's socket", explain=self.logs)
        self._spawn("slurmctld", ["slurmctld", "-D", "-i"])
        for name in NODES:
            self.start_node(name)
        wait_until(lambda: self.idle_nodes() == list(NODES), "idle nodes", explain=self.logs)

    def stop(self) -> None:
        """Cancels all jobs, ends the daemons and their remaining processes, and removes the folder."""
        with contextlib.suppress(RuntimeError, subprocess.SubprocessError):
            self.cancel_all()
        for name in reversed(list(self.daemons)):
            daemon = self.daemons.pop(name)
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid, _ in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def cancel_all(self) -> None:
        """Ends all jobs at once."""
        jobs = self.command("squeue", "-h", "-o", "%i").split()
        if jobs:
            # A job may end before it receives the signal.
            with contextlib.suppress(RuntimeError):
                self.command("scancel", "--full", "--signal=KILL", *jobs)
            self.command("scancel", *jobs)

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for commands that use this cluster, without the variables of any other Slurm job."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
        return {**inherited, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def _spawn(self, name: str, words: Sequence[str], **more: str) -> None:
        # In its own mount namespace, the daemon and its jobs use a hosts file with the names of the nodes. The daemon ends together with the
        # process that started it, even if that process is killed.
        inside = f'mount --bind {self.folder}/hosts /etc/hosts && exec "$@"'
        with (self.folder / f"{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", "unshare", "--mount", "sh", "-c", inside, "sh", *words],
                env={**self.environment, **more},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start_node(self, name: str) -> None:
        """Starts a node's daemon."""
        # Slurm sets this variable for tasks; the processes that supervise them inherit it from the daemon.
        self._spawn(name, ["slurmd", "-D", "-N", name], SLURMD_NODENAME=name)

    def kill_node(self, name: str) -> None:
        """Kills a node: its daemon and all processes of its job steps at once, so that none can report the end of another."""
        daemon = self.daemons.pop(name)
        on_node = sorted(pid for pid, environment in self.processes() if environment.get("SLURMD_NODENAME") == name)
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in (daemon.pid, *on_node):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        daemon.wait()

    def kill_daemon(self, name: str) -> None:
        """Kills only the daemon of a node."""
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def processes(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Yields (process id, environment) of all processes that use this cluster, except the daemons and this process."""
        excluded = {os.getpid(), *(daemon.pid for daemon in self.daemons.values())}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit() or int(folder.name) in excluded:
                continue
            try:
                words = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            environment = dict(word.partition("=")[::2] for word in words)
            if environment.get("SLURM_CONF") == str(self.folder / "slurm.conf"):
                yield int(folder.name), environment

    def command(self, *words: str | Path, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
        """Runs one of Slurm's commands and returns what it printed.

        Raises:
            RuntimeError: the command failed; the message has its output.
        """
        result = subprocess.run(
            [str(word) for word in words],
            env={**self.environment, **(environment or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        if result.returncode:
            raise RuntimeError(f"{' '.join(str(word) for word in words)} ended with {result.returncode}: {result.stdout}{result.stderr}")
        return result.stdout

    def idle_nodes(self) -> list[str]:
        """Returns the names of the nodes that are up and run no job."""
        try:
            lines = self.command("sinfo", "-h", "-N", "-p", "debug", "-o", "%N %T").splitlines()
        except RuntimeError:
            return []
        return [name for name, state in (line.split() for line in lines) if state == "idle"]

    def job(self, job: str) -> dict[str, str]:
        """Returns the fields of a job, as scontrol shows them."""
        text = self.command("scontrol", "show", "job", "-o", job)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def state(self, job: str) -> str:
        """Returns the state of a job: PENDING, RUNNING, COMPLETING, COMPLETED, …"""
        return self.job(job)["JobState"]

    def ended(self, job: str) -> bool:
        """Returns whether a job has ended and will not be requeued."""
        return self.state(job) in _ENDED

    def logs(self) -> str:
        """Returns the last lines of the logs of all daemons."""
        texts = [(path.name, path.read_text(errors="replace").splitlines()[-15:]) for path in sorted(self.folder.glob("*.log"))]
        return "\n".join(f"[{name}]\n" + "\n".join(lines) for name, lines in texts)


def main(argv: Sequence[str]) -> int:
    """Runs a cluster until Ctrl-C (`up`), or prints the usage."""
    if list(argv) != ["up"]:
        print(__doc__)
        return 0 if not argv else 2
    reason = missing()
    if reason:
        print(f"cannot start a cluster: {reason}", file=sys.stderr)
        return 1
    cluster = Cluster()
    # SIGTERM stops the cluster like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        cluster.start()
        print(cluster.command("sinfo"), end="")
        print(f"export SLURM_CONF={cluster.folder}/slurm.conf\nCtrl-C stops the cluster", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        cluster.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
