"""Failures and what they cost: how often to save, and a simulated run through both stages with interruptions.

In: mean time between interruptions, seconds of a checkpoint, of a restart, of the work. Out: intervals, wall time, goodput.

Published rates: 419 unexpected interruptions in 54 days on 16,384 H100 (Llama 3, arXiv 2407.21783, section 3.3.4, table 5), which is one
in 3.1 hours, or one in 50,700 device hours.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_patch.errors import ConfigError

LLAMA3_DEVICE_HOURS = 16_384 * 54 * 24 / 419
"""Device hours between unexpected interruptions (arXiv 2407.21783, section 3.3.4)."""


def young_interval(save_seconds: float, mtbf_seconds: float) -> float:
    """Seconds of work between checkpoints: √(2·δ·M) (Young, Communications of the ACM 17(9), 1974)."""
    return math.sqrt(2 * save_seconds * mtbf_seconds)


def daly_interval(save_seconds: float, mtbf_seconds: float) -> float:
    """Seconds of work between checkpoints, higher order (Daly, Future Generation Computer Systems 22(3), 2006, equation 37).

    √(2δM)·(1 + √(δ/2M)/3 + (δ/2M)/9) - δ for δ < 2M, else M.
    """
    if save_seconds >= 2 * mtbf_seconds:
        return mtbf_seconds
    ratio = save_seconds / (2 * mtbf_seconds)
    return young_interval(save_seconds, mtbf_seconds) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_seconds


def expected_goodput(interval: float, save_seconds: float, restart_seconds: float, mtbf_seconds: float) -> float:
    """Useful time over wall time with exponential failures: τ / (M·e^(R/M)·(e^((τ + δ)/M) - 1)) (Daly 2006, equation 20).

    Args:
        interval: τ, seconds of work between checkpoints.
        save_seconds: δ.
        restart_seconds: R, from a failure to the first step after it; failures during it count.
        mtbf_seconds: M.
    """
    m = mtbf_seconds
    if (interval + save_seconds + restart_seconds) / m > 700:
        return 0.0  # below what a float holds
    return interval / (m * math.exp(restart_seconds / m) * math.expm1((interval + save_seconds) / m))


@dataclass(frozen=True)
class Interruptions:
    """What stops a job, and what that takes.

    Args:
        device_hours: between unexpected failures of one device, on average; the job of N devices fails N times as often.
        preemptions_per_day: of the whole job, on average; announced, so that the job saves before it stops.
        save_seconds: a checkpoint, in which nothing is trained.
        restart_seconds: from a failure to the first step after it.
        preemption_seconds: from a preemption's save to the first step after it.
    """

    device_hours: float = LLAMA3_DEVICE_HOURS
    preemptions_per_day: float = 0.0
    save_seconds: float = 60.0
    restart_seconds: float = 600.0
    preemption_seconds: float = 1800.0

    def __post_init__(self) -> None:
        for name in ("device_hours", "save_seconds", "restart_seconds", "preemption_seconds"):
            if not getattr(self, name) > 0 or not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name} = {getattr(self, name)}", "numbers above zero")
        if not 0 <= self.preemptions_per_day < math.inf:
            raise ConfigError(f"preemptions_per_day = {self.preemptions_per_day}", "finite numbers from 0")

    def mtbf_seconds(self, devices: int) -> float:
        """Mean time between unexpected failures of a job of so many devices."""
        return self.device_hours * 3600 / devices

    @property
    def preemption_gap_seconds(self) -> float:
        """Mean time between preemptions; infinite where there are none."""
        return 86400 / self.preemptions_per_day if self.preemptions_per_day else math.inf


@dataclass(frozen=True)
class StageWork:
    """A stage as work: its steps and the seconds of each."""

    name: str
    steps: int
    step_seconds: float


@dataclass(frozen=True)
class Event:
    """Something that happened in a simulated run, `at` seconds of wall time, `work` seconds of useful work behind it."""

    at: float
    work: float
    kind: str
    text: str


@dataclass(frozen=True)
class Simulation:
    """A simulated run.

    Args:
        wall_seconds: from its start to its end.
        useful_seconds: of steps that counted.
        lost_seconds: of steps that were done again.
        save_seconds: of checkpoints.
        down_seconds: of restarts.
        failures: unexpected ones.
        preemptions: announced ones.
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
    """Runs stages step by step through failures and preemptions.

    A checkpoint is taken every `interval` seconds of work, rounded to whole steps, and at each stage's end. A failure throws the run back
    to the last one, at whatever it was (a step, a save or a restart); a preemption saves first and loses nothing but time.

    Args:
        stages: in order.
        devices: of the job.
        interruptions: rates and durations.
        interval: seconds of work between checkpoints.
        seed: of the draws; the same seed gives the same run.

    Raises:
        ConfigError: no work, an interval that is not above zero, or interruptions that leave less than a hundredth of the time.
    """
    if not stages or interval <= 0 or any(stage.steps < 1 or not stage.step_seconds > 0 for stage in stages):
        raise ConfigError(f"stages {[s.name for s in stages]} and an interval of {interval} s", "steps, seconds and an interval above zero")
    mtbf, gap = interruptions.mtbf_seconds(devices), interruptions.preemption_gap_seconds
    useful_share = expected_goodput(interval, interruptions.save_seconds, interruptions.restart_seconds, mtbf)
    if gap < math.inf:
        useful_share *= gap / (gap + interruptions.save_seconds + interruptions.preemption_seconds)
    if useful_share < 0.01:
        raise ConfigError(
            f"{devices:,} devices of which one fails every {interruptions.device_hours:g} hours, {interruptions.preemptions_per_day:g} "
            f"preemptions a day, {interruptions.restart_seconds:g} s to restart: the run would stand still",
            "interruptions that leave at least a hundredth of the time",
            "take rarer ones, fewer devices, or quicker saves and restarts",
        )
    draw = random.Random(seed)
    pending: list[tuple[float, str]] = [(draw.expovariate(1 / mtbf), "failure")]
    if gap < math.inf:
        pending.append((draw.expovariate(1 / gap), "preemption"))
    heapq.heapify(pending)
    clock = useful = lost = saving = down = 0.0
    counts = {"failure": 0, "preemption": 0}
    events: list[Event] = []
    stage_seconds: dict[str, float] = {}

    def renew(kind: str) -> None:
        heapq.heapreplace(pending, (pending[0][0] + draw.expovariate(1 / (mtbf if kind == "failure" else gap)), kind))

    def restart(seconds: float) -> None:
        """Down time; a failure in it begins it anew, a preemption in it changes nothing."""
        nonlocal clock, down
        end = clock + seconds
        while pending[0][0] < end:
            at, kind = pending[0]
            renew(kind)
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
            renew(kind)
            counts[kind] += 1
            behind = useful
            if kind == "failure":
                lost += min(at - clock, work)
                saving += max(0.0, at - clock - work)
                clock = at
                restart(interruptions.restart_seconds)
            else:
                # The step that runs is finished, then saved; what comes in that time is met by the next turn.
                steps = min(segment, math.ceil((at - clock) / stage.step_seconds))
                useful, saving = useful + steps * stage.step_seconds, saving + interruptions.save_seconds
                done += steps
                clock += steps * stage.step_seconds + interruptions.save_seconds
                restart(interruptions.preemption_seconds)
            events.append(Event(at, behind, kind, stage.name))
        stage_seconds[stage.name] = clock - began
        if index + 1 < len(stages):
            events.append(Event(clock, useful, "switch", f"{stage.name} to {stages[index + 1].name}"))
    return Simulation(clock, useful, lost, saving, down, counts["failure"], counts["preemption"], stage_seconds, tuple(events))
