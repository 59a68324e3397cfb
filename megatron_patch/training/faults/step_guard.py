"""Rejects steps whose loss or gradient norm is not finite or spikes, before the optimizer changes a weight.

In: the loss and the gradient norm of each step, the same on every rank. Out: a reason to skip the update, or None; in plain Python, so that
every rank decides the same. A new stage starts with an empty window, because the loss jumps at a switch from patches to tokens.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from megatron_patch.config.options import SafetyOptions
from megatron_patch.engine.interface import StepGate
from megatron_patch.errors import CheckpointError, SickTrainingError
from megatron_patch.utils.units import plural

_SMALLEST_DEVIATION = 0.01
_NORMAL = 1.4826  # standard deviation of a normal distribution over its median absolute deviation


class StepGuard(StepGate):
    """The step gate of a run: compares each step with the median of the last steps of its stage.

    Args:
        options: window, thresholds, and what to do after a rejected step.
    """

    def __init__(self, options: SafetyOptions) -> None:
        self._options = options
        self._losses: deque[float] = deque(maxlen=options.spike_window)
        self._norms: deque[float] = deque(maxlen=options.spike_window)
        self._rejected = 0

    def begin_stage(self) -> None:
        """Empties the window, because another stage has other losses."""
        self._losses.clear()
        self._norms.clear()

    def check_loss(self, loss: float) -> str | None:
        """Returns the reason to reject the step by its loss, or None.

        Args:
            loss: mean loss of the global batch in nats.
        """
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self._options.on_spike == "ignore" or len(self._losses) < self._options.spike_window // 2:
            return None
        median = statistics.median(self._losses)
        deviation = max(_NORMAL * statistics.median(abs(value - median) for value in self._losses), _SMALLEST_DEVIATION)
        if loss > median + self._options.spike_threshold * deviation:
            deviations = (loss - median) / deviation
            above = f"{deviations:.0f} deviations above the median {median:.4f} (one deviation is {deviation:.4f})"
            return f"the loss spikes: {loss:.4f} is {above}"
        return None

    def check_grad_norm(self, norm: float) -> str | None:
        """Returns the reason to reject the step by its gradient, or None.

        Args:
            norm: norm of the mean gradient before clipping.
        """
        if not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        factor = self._options.spike_grad_norm
        if factor is None or self._options.on_spike == "ignore" or len(self._norms) < self._options.spike_window // 2:
            return None
        median = statistics.median(self._norms)
        return f"the gradient explodes: its norm is {norm:.4g}, the median is {median:.4g}" if norm > factor * median else None

    def record_taken(self, loss: float, norm: float) -> None:
        """Adds a step that was taken to the window."""
        self._rejected = 0
        self._losses.append(loss)
        self._norms.append(norm)

    def record_rejected(self, reason: str) -> None:
        """Counts a rejected step.

        Args:
            reason: the reason for the rejection.

        Raises:
            SickTrainingError: training must stop, because of --on-spike stop or too many rejected steps in a row.
        """
        self._rejected += 1
        if self._options.on_spike == "stop":
            raise SickTrainingError(
                f"{reason}; the step is rejected, and --on-spike is stop",
                "--on-spike skip or rewind, to continue after such a step",
                "check the data of this step (its spans are in SAVE/events.jsonl), then resume with --on-spike skip or rewind",
            )
        if self._rejected >= self._options.max_sick_steps:
            raise SickTrainingError(
                f"{reason}; {plural(self._rejected, 'rejected step')} in a row",
                f"fewer than {self._options.max_sick_steps} in a row (--max-sick-steps)",
                "check the data of these steps (their spans are in SAVE/events.jsonl), or lower --lr; the newest checkpoint is unaffected",
            )

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint must keep, so that a resumed run decides as an uninterrupted one."""
        return {"losses": list(self._losses), "norms": list(self._norms), "sick": self._rejected}

    def load_state(self, state: Any) -> None:
        """Restores what `state` returned.

        Raises:
            CheckpointError: the checkpoint holds something else.
        """
        self.begin_stage()
        try:
            self._losses.extend(float(value) for value in state.get("losses", ()))
            self._norms.extend(float(value) for value in state.get("norms", ()))
            self._rejected = int(state.get("sick", 0))
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the state of the step guard in the checkpoint cannot be read: {error}",
                "lists of numbers",
                "resume from another checkpoint (--load)",
            ) from error
