"""How fast a run is: rates over the last steps. In: times and amounts of each step. Out: tokens/s, positions/s, TFLOP/s, MFU."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from megatron_patch.model.flops import peak_flops


@dataclass(frozen=True)
class Rates:
    """Rates over a window of steps.

    Args:
        tokens_per_second: of all ranks.
        positions_per_second: of all ranks.
        tflops: model TFLOP/s of one device.
        mfu: model FLOPs over the device's peak, or None where the peak is not known.
        data_share: share of the time spent waiting for data.
    """

    tokens_per_second: float
    positions_per_second: float
    tflops: float
    mfu: float | None
    data_share: float


class Throughput:
    """A meter over a window of steps.

    Args:
        devices: how many share the work.
        device_name: decides the peak.
        peak_tflops: the peak of one device, where the table does not know it or should not decide.
        window: steps to look back.
    """

    def __init__(self, devices: int, device_name: str, peak_tflops: float | None = None, window: int = 20) -> None:
        known = peak_flops(device_name)
        self._devices = devices
        self._peak = peak_tflops * 1e12 if peak_tflops is not None else known
        self._steps: deque[tuple[float, float, int, int, float]] = deque(maxlen=window)

    def reset(self) -> None:
        """Forgets the window: after a switch, other steps are measured."""
        self._steps.clear()

    def update(self, seconds: float, data_seconds: float, tokens: int, positions: int, flops: float) -> Rates:
        """Adds a step and returns the rates of the window."""
        self._steps.append((seconds, data_seconds, tokens, positions, flops))
        time, waited, all_tokens, all_positions, all_flops = (sum(column) for column in zip(*self._steps, strict=True))
        time = max(time, 1e-9)
        per_device = all_flops / time / self._devices
        return Rates(
            tokens_per_second=all_tokens / time,
            positions_per_second=all_positions / time,
            tflops=per_device / 1e12,
            mfu=None if self._peak is None else per_device / self._peak,
            data_share=waited / time,
        )
