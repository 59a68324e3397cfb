"""Requests to save and stop: signals, a time span, a file, Slurm's time limit.

In: what this rank alone sees. Out: a reason that all ranks agree on between two steps, whichever of them was asked.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from types import FrameType
from typing import TYPE_CHECKING

from megatron_patch.config.options import SafetyOptions
from megatron_patch.errors import ConfigError

if TYPE_CHECKING:
    import torch

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_REASONS = (*(number.name for number in _SIGNALS), "--exit-duration", "the end of the Slurm job is near", "the kill switch")
_FILE_SECONDS = 1.0


def _stop_time(margin: float, environment: Mapping[str, str]) -> float | None:
    """When to stop for the end of the Slurm job; in a job that is shorter than twice the margin half of its time is for training."""
    begin, end = environment.get("SLURM_JOB_START_TIME", ""), environment.get("SLURM_JOB_END_TIME", "")
    if not end.isdigit():
        return None
    return int(end) - (min(margin, (int(end) - int(begin)) / 2) if begin.isdigit() else margin)


class StopRequests:
    """Listens from its making on, which is before torch is imported.

    Args:
        options: time spans and the file.
        environment: where Slurm says when the job ends.

    Raises:
        ConfigError: the kill switch is there already; a job that is put back into the queue would start for ever.
    """

    def __init__(self, options: SafetyOptions, environment: Mapping[str, str] = os.environ) -> None:
        self._deadline = time.monotonic() + options.exit_duration if options.exit_duration is not None else None
        self._job_end = _stop_time(options.exit_margin, environment)
        self._kill_switch = options.kill_switch
        if self._kill_switch is not None and os.path.exists(self._kill_switch):
            raise ConfigError(
                f"--kill-switch {self._kill_switch}: the file is there already", "a file that does not exist yet", f"rm {self._kill_switch}"
            )
        self._looked = 0.0
        self._signal: int | None = None
        self._handlers = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal is not None:
            raise KeyboardInterrupt
        self._signal = number

    def close(self) -> None:
        """Gives the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def signalled(self) -> bool:
        """Whether this rank has been sent a signal."""
        return self._signal is not None

    def own(self) -> str | None:
        """What this rank has been asked."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "--exit-duration"
        if self._job_end is not None and time.time() >= self._job_end:
            return "the end of the Slurm job is near"
        if self._kill_switch is not None and time.monotonic() >= self._looked + _FILE_SECONDS:
            self._looked = time.monotonic()
            if os.path.exists(self._kill_switch):
                self._kill_switch, self._deadline = None, None
                return "the kill switch"
        return None

    def agreed(self, device: torch.device) -> str | None:
        """What any rank has been asked; every rank must call it."""
        import torch

        own = self.own()
        code = torch.tensor(_REASONS.index(own) + 1 if own else 0, dtype=torch.int32, device=device)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(code, op=torch.distributed.ReduceOp.MAX)
        value = int(code)
        return _REASONS[value - 1] if value else None
