"""Failures: the best checkpoint interval, and a simulated run with interruptions.

In: mean time between interruptions; seconds of a checkpoint, of a restart and of the work. Out: intervals, wall time, goodput.

Published rate: 419 unexpected interruptions in 54 days on 16,384 H100 (Llama 3, arXiv 2407.21783, section 3.3.4, table 5), which is one
in 3.1 hours, or one in 50,700 device hours.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_patch.errors import ConfigError
from megatron_patch.utils.units import plural

LLAMA3_DEVICE_HOURS = 16_384 * 54 * 24 / 419
"""Device hours between unexpected interruptions (arXiv 2407.21783, section 3.3.4)."""


def young_interval(save_seconds: float, mtbf_seconds: float) -> float:
    """Returns the seconds of work between checkpoints √(2·δ·M) (Young, Communications of the ACM 17(9), 1974)."""
    return math.sqrt(2 * save_seconds * mtbf_seconds)


def daly_interval(save_seconds: float, mtbf_seconds: float) -> float:
    """Returns the seconds of work between checkpoints by the higher-order formula of Daly.

    Future Generation Computer Systems 22(3), 2006, equation 37: √(2δM)·(1 + √(δ/2M)/3 + (δ/2M)/9) - δ for δ < 2M, else M.
    """
    if save_seconds >= 2 * mtbf_seconds:
        return mtbf_seconds
    ratio = save_seconds / (2 * mtbf_seconds)
    return young_interval(save_seconds, mtbf_seconds) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_seconds


def expected_goodput(interval: float, save_seconds: float, restart_seconds: float, mtbf_seconds: float) -> float:
    """Returns useful time over wall time under exponential failures: τ / (M·e^(R/M)·(e^((τ + δ)/M) - 1)) (Daly 2006, equation 20).

    Args:
        interval: τ, seconds of work between checkpoints.
        save_seconds: δ, seconds of a checkpoint.
        restart_seconds: R, seconds from a failure to the first step after it; another failure may occur in this time.
        mtbf_seconds: M, mean time between failures.
    """
    m = mtbf_seconds
    if (interval + save_seconds + restart_seconds) / m > 700:
        return 0.0  # the exponential overflows a float
    return interval / (m * math.exp(restart_seconds / m) * math.expm1((interval + save_seconds) / m))


_FLAGS = {"device_hours": "--device-hours-per-failure", "save_seconds": "--save-seconds", "restart_seconds": "--restart-seconds"}


@dataclass(frozen=True)
class Interruptions:
    """Rates of interruptions, and the time that each of them takes.

    Args:
        device_hours: mean hours between unexpected failures of one device; a job of N devices fails N times as often.
        preemptions_per_day: mean number of preemptions of the job, which saves before it stops.
        save_seconds: time of a checkpoint, during which training pauses.
        restart_seconds: time from a failure to the first step after it.
        preemption_seconds: time from the save of a preemption to the first step after it.

    Raises:
        ConfigError: a value is negative, zero where it must be positive, or not finite.
    """

    device_hours: float = LLAMA3_DEVICE_HOURS
    preemptions_per_day: float = 0.0
    save_seconds: float = 60.0
    restart_seconds: float = 600.0
    preemption_seconds: float = 1800.0

    def __post_init__(self) -> None:
        for name in ("device_hours", "save_seconds", "restart_seconds", "preemption_seconds"):
            if not getattr(self, name) > 0 or not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{_FLAGS.get(name, name)} {getattr(self, name):g}", "finite numbers above zero", "correct the value")
        if not 0 <= self.preemptions_per_day < math.inf:
            raise ConfigError(f"--preemptions-per-day {self.preemptions_per_day:g}", "finite numbers from 0", "correct the value")

    def mtbf_seconds(self, devices: int) -> float:
        """Returns the mean time between unexpected failures of a job with this number of devices."""
        return self.device_hours * 3600 / devices

    @property
    def preemption_gap_seconds(self) -> float:
        """Mean time between preemptions; infinite without preemptions."""
        return 86400 / self.preemptions_per_day if self.preemptions_per_day else math.inf


@dataclass(frozen=True)
class StageWork:
    """A stage for the simulation: its number of steps and the seconds of one step."""

    name: str
    steps: int
    step_seconds: float


@dataclass(frozen=True)
class Event:
    """A failure, preemption or switch of a simulated run.

    Args:
        at: wall time, in seconds.
        work: seconds of useful work done before it.
        kind: "failure", "preemption" or "switch".
        text: name of the stage, or of both stages of a switch.
    """

    at: float
    work: float
    kind: str
    text: str


@dataclass(frozen=True)
class Simulation:
    """Result of a simulated run.

    Args:
        wall_seconds: time from start to end.
        useful_seconds: time of steps that were kept.
        lost_seconds: time of steps that had to be repeated.
        save_seconds: time of checkpoints.
        down_seconds: time of restarts.
        failures: number of unexpected failures.
        preemptions: number of preemptions.
        stage_seconds: wall time of each stage, by name.
        events: failures, preemptions and switches in order.
    """

    wall_seconds: float
    useful_seconds: float
    lost_seconds: float
    save_seconds: float
    down_seconds: float
    failures: int
    preemptions: int
    stage_seconds: dict[str, float]
    events: tuple[Event, ...]

    @property
    def goodput(self) -> float:
        """Useful time over wall time."""
        return self.useful_seconds / self.wall_seconds


def simulate(stages: Sequence[StageWork], devices: int, interruptions: Interruptions, interval: float, seed: int = 0) -> Simulation:
    """Simulates a run with failures and preemptions.

    The run saves every `interval` seconds of work, rounded to whole steps, and at the end of each stage. A failure during a step, a save or
    a restart sets the run back to its last checkpoint. A preemption saves first and costs only time.

    Args:
        stages: stages in order.
        devices: number of devices of the job.
        interruptions: rates and durations.
        interval: seconds of work between checkpoints.
        seed: seed of the random draws.

    Raises:
        ConfigError: there is no work, the interval is not positive, or less than 1 % of the time would be useful.
    """
    if not stages or interval <= 0 or any(stage.steps < 1 or not stage.step_seconds > 0 for stage in stages):
        raise ConfigError(
            f"stages {[s.name for s in stages]} and an interval of {interval} s",
            "steps, seconds and an interval above zero",
            "correct the plan",
        )
    mtbf, gap = interruptions.mtbf_seconds(devices), interruptions.preemption_gap_seconds
    useful_share = expected_goodput(interval, interruptions.save_seconds, interruptions.restart_seconds, mtbf)
    if gap < math.inf:
        useful_share *= gap / (gap + interruptions.save_seconds + interruptions.preemption_seconds)
    if useful_share < 0.01:
        raise ConfigError(
            f"{plural(devices, 'device')}, {interruptions.device_hours:g} device hours per failure, {interruptions.preemptions_per_day:g} "
            f"preemptions per day and {interruptions.restart_seconds:g} s per restart leave {useful_share:.2%} of the time for training",
            "at least 1 %",
            "assume fewer interruptions or devices, or faster saves and restarts",
        )
    generator = random.Random(seed)
    pending: list[tuple[float, str]] = [(generator.expovariate(1 / mtbf), "failure")]
    if gap < math.inf:
        pending.append((generator.expovariate(1 / gap), "preemption"))
    heapq.heapify(pending)
    clock = useful = lost = saving = down = 0.0
    counts = {"failure": 0, "preemption": 0}
    events: list[Event] = []
    stage_seconds: dict[str, float] = {}

    def schedule_next(kind: str) -> None:
        heapq.heapreplace(pending, (pending[0][0] + generator.expovariate(1 / (mtbf if kind == "failure" else gap)), kind))

    def restart(seconds: float) -> None:
        """Adds down time. A failure during it starts it again; a preemption during it has no effect."""
        nonlocal clock, down
        end = clock + seconds
        while pending[0][0] < end:
            at, kind = pending[0]
            schedule_next(kind)
            if kind == "failure":
                counts[kind] += 1
                end = max(at, clock) + interruptions.restart_seconds
        down += end - clock
        clock = end

    for index, stage in enumerate(stages):
        began, done = clock, 0
        each = max(1, round(interval / stage.step_seconds))
        while done < stage.steps:
            segment = min(each, stage.steps - done)
            work = segment * stage.step_seconds
            end = clock + work + interruptions.save_seconds
            at, kind = pending[0]
            if at >= end:
                clock, done = end, done + segment
                useful, saving = useful + work, saving + interruptions.save_seconds
                continue
            schedule_next(kind)
            counts[kind] += 1
            work_before = useful
            if kind == "failure":
                lost += min(at - clock, work)
                saving += max(0.0, at - clock - work)
                clock = at
                restart(interruptions.restart_seconds)
            else:
                # The current step finishes and is saved; the next iteration handles events that occur meanwhile.
                steps = min(segment, math.ceil((at - clock) / stage.step_seconds))
                useful, saving = useful + steps * stage.step_seconds, saving + interruptions.save_seconds
                done += steps
                clock += steps * stage.step_seconds + interruptions.save_seconds
                restart(interruptions.preemption_seconds)
            events.append(Event(at, work_before, kind, stage.name))
        stage_seconds[stage.name] = clock - began
        if index + 1 < len(stages):
            events.append(Event(clock, useful, "switch", f"{stage.name} to {stages[index + 1].name}"))
    return Simulation(clock, useful, lost, saving, down, counts["failure"], counts["preemption"], stage_seconds, tuple(events))
