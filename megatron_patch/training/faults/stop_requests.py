"""Requests to save and stop: signals, a duration, a file, Slurm's time limit.

In: the requests that this rank receives. Out: one reason to stop that all ranks agree on between two steps, whichever rank received it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

from megatron_patch.config.options import SafetyOptions
from megatron_patch.errors import ConfigError

if TYPE_CHECKING:
    import torch

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_REASONS = (*(number.name for number in _SIGNALS), "--exit-duration", "the end of the Slurm job is near", "the kill switch")
_FILE_CHECK_SECONDS = 1.0


def _stop_time(margin: float, environment: Mapping[str, str]) -> float | None:
    """Returns the Unix time to stop at because the Slurm job ends, or None outside of a job with a time limit.

    A job shorter than twice the margin trains for half of its time; stopped at once, it would be requeued forever.
    """
    begin, end = environment.get("SLURM_JOB_START_TIME", ""), environment.get("SLURM_JOB_END_TIME", "")
    if not end.isdigit():
        return None
    return int(end) - (min(margin, (int(end) - int(begin)) / 2) if begin.isdigit() else margin)


class StopRequests:
    """Receives requests to stop from its construction on, which is before torch is imported; signals only in the main thread.

    Args:
        options: the duration, the margin and the file.
        environment: environment variables, in which Slurm gives the end of the job.

    Raises:
        ConfigError: the file of --kill-switch exists already; a requeued job would stop at every start.
    """

    def __init__(self, options: SafetyOptions, environment: Mapping[str, str] = os.environ) -> None:
        self._deadline = time.monotonic() + options.exit_duration if options.exit_duration is not None else None
        self._job_end = _stop_time(options.exit_margin, environment)
        self._kill_switch = options.kill_switch
        if self._kill_switch is not None and os.path.exists(self._kill_switch):
            raise ConfigError(
                f"--kill-switch {self._kill_switch}: the file exists already",
                "a path where no file exists until the run should stop",
                f"rm {self._kill_switch}",
            )
        self._file_checked = 0.0
        self._signal: int | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            # A handler that was not set by Python could not be set again by `close`.
            self._handlers = {n: signal.signal(n, self._on_signal) for n in _SIGNALS if signal.getsignal(n) is not None}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal is not None:
            raise KeyboardInterrupt
        self._signal = number

    def close(self) -> None:
        """Restores the signal handlers that were set before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def signalled(self) -> bool:
        """Whether this rank has received a signal."""
        return self._signal is not None

    def local_request(self) -> str | None:
        """Returns the reason to stop that this rank has received, or None."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "--exit-duration"
        if self._job_end is not None and time.time() >= self._job_end:
            return "the end of the Slurm job is near"
        if self._kill_switch is not None and time.monotonic() >= self._file_checked + _FILE_CHECK_SECONDS:
            self._file_checked = time.monotonic()
            if os.path.exists(self._kill_switch):
                self._kill_switch, self._deadline = None, None
                return "the kill switch"
        return None

    def agreed_request(self, device: torch.device) -> str | None:
        """Returns a reason to stop that any rank has received, the same on every rank, or None; every rank must call it.

        Args:
            device: the device of this rank.
        """
        import torch

        local = self.local_request()
        code = torch.tensor(_REASONS.index(local) + 1 if local else 0, dtype=torch.int32, device=device)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(code, op=torch.distributed.ReduceOp.MAX)
        value = int(code)
        return _REASONS[value - 1] if value else None
