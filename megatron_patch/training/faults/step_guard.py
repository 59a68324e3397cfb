"""Which steps are not taken: losses and gradients that are not finite, spikes, explosions.

In: each step's loss and gradient norm, the same on every rank. Out: a reason to leave the update out, or None; pure Python, so that every
rank comes to the same decision. The window begins anew with each stage: a switch from patches to tokens makes the loss jump, as it should.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from megatron_patch.config.options import SafetyOptions
from megatron_patch.errors import CheckpointError, SickTrainingError

_SMALLEST_DEVIATION = 0.01
_NORMAL = 1.4826  # median absolute deviations in a standard deviation of a normal distribution


class StepGuard:
    """Judges a stage's steps by the steps before.

    Args:
        options: thresholds.
    """

    def __init__(self, options: SafetyOptions) -> None:
        self._options = options
        self._losses: deque[float] = deque(maxlen=options.spike_window)
        self._norms: deque[float] = deque(maxlen=options.spike_window)
        self._sick = 0

    def begin_stage(self) -> None:
        """Forgets the stage before."""
        self._losses.clear()
        self._norms.clear()

    def check_loss(self, loss: float) -> str | None:
        """Before the optimizer: why this step is not to be taken."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self._options.on_spike == "ignore" or len(self._losses) < self._options.spike_window // 2:
            return None
        median = statistics.median(self._losses)
        deviation = max(_NORMAL * statistics.median(abs(value - median) for value in self._losses), _SMALLEST_DEVIATION)
        if loss > median + self._options.spike_threshold * deviation:
            return f"the loss spikes: {loss:.4f}, {(loss - median) / deviation:.0f} deviations of {deviation:.4f} above {median:.4f}"
        return None

    def check_grad_norm(self, norm: float) -> str | None:
        """The same by the gradient's norm."""
        if not math.isfinite(norm):
            return f"the gradient's norm is {norm}"
        factor = self._options.spike_grad_norm
        if factor is None or self._options.on_spike == "ignore" or len(self._norms) < self._options.spike_window // 2:
            return None
        median = statistics.median(self._norms)
        return f"the gradient explodes: norm {norm:.4g}, usually {median:.4g}" if norm > factor * median else None

    def record_taken(self, loss: float, norm: float) -> None:
        """A step was taken."""
        self._sick = 0
        self._losses.append(loss)
        self._norms.append(norm)

    def record_rejected(self, reason: str) -> None:
        """A step was left out.

        Raises:
            SickTrainingError: that is not to be gone on with.
        """
        self._sick += 1
        if self._options.on_spike == "stop" or self._sick >= self._options.max_sick_steps:
            raise SickTrainingError(
                f"{reason}; {self._sick} sick step{'s' if self._sick > 1 else ''} in a row",
                f"--on-spike skip or rewind, and fewer than --max-sick-steps {self._options.max_sick_steps} in a row",
                "look at SAVE/events.jsonl for the data of these steps; lower --lr; the newest checkpoint is from before",
            )

    def state(self) -> dict[str, Any]:
        """For a checkpoint: a resumed run decides as an unbroken one."""
        return {"losses": list(self._losses), "norms": list(self._norms), "sick": self._sick}

    def load_state(self, state: Any) -> None:
        """From a checkpoint.

        Raises:
            CheckpointError: it is not what `state` gives.
        """
        self.begin_stage()
        try:
            self._losses.extend(float(value) for value in state.get("losses", ()))
            self._norms.extend(float(value) for value in state.get("norms", ()))
            self._sick = int(state.get("sick", 0))
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint's last losses and norms are no numbers: {error}", do="resume from another") from error
