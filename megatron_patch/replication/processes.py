"""The processes of a study. In: command lines. Out: whether each finished. A signal to the study stops all of them.

Several run at a time, each in a place ("slot") of its own, which has a GPU or a share of the CPU cores.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console

from megatron_patch.errors import DataError
from megatron_patch.exit_codes import ExitCode
from megatron_patch.programs import HOME
from megatron_patch.replication.devices import gpus


class Processes:
    """Runs commands, and stops them together.

    Args:
        console: where the commands are printed.
        parallel: how many run at a time.

    `stop_signal` is the number of the last signal to the study, 0 before one.
    """

    def __init__(self, console: Console, parallel: int) -> None:
        self.console, self.parallel = console, parallel
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stop_signal = 0

    def run(self, command: Sequence[str], log: Path | None = None, slot: int | None = None) -> bool:
        """Runs one command and waits for it.

        Args:
            command: its words after `python`.
            log: file that its output is appended to; None prints the output.
            slot: number of the place that the command takes, below `parallel`; None gives it the whole machine.

        Returns:
            True when the command finished; False when it saved and stopped early, by --seconds or by a signal to the study.

        Raises:
            DataError: the command failed.
        """
        self.console.print(f"$ python {shlex.join(command)}", soft_wrap=True)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HOME), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(":"),
            **({} if slot is None else self._device_variables(slot)),
        }
        if not gpus():
            environment.setdefault("DS_ACCELERATOR", "cpu")
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.nullcontext() if log is None else log.open("ab") as file:
            process = subprocess.Popen([sys.executable, *command], env=environment, stdout=file, stderr=file)
            self.running.add(process)
            if self.stop_signal:
                # The signal came before this process was in `running`.
                process.terminate()
            code = process.wait()
            self.running.discard(process)
        if code and code != ExitCode.PREEMPTED and not self.stop_signal:
            program = " ".join(itertools.takewhile(lambda word: not word.startswith("--"), command))
            raise DataError(
                f"{program} failed with exit code {code}",
                "exit code 0",
                f"read {log or 'the output above'}, fix the problem and run the same command again to resume",
            )
        return code == 0

    @contextlib.contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Makes SIGTERM and SIGINT stop the processes, and restores the handlers at the end."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Makes all runs save and stop; a second Ctrl-C is passed to them as SIGINT and stops them at once."""
        again = number == signal.SIGINT and self.stop_signal
        self.stop_signal = number
        for process in list(self.running):
            process.send_signal(signal.SIGINT if again else signal.SIGTERM)

    def _device_variables(self, slot: int) -> dict[str, str]:
        """Returns the environment variables that give one of `parallel` commands its GPU or its number of CPU threads."""
        if self.parallel == 1:
            return {}
        if names := gpus():
            return {"CUDA_VISIBLE_DEVICES": str(slot % len(names))}
        return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // self.parallel))}
