"""The whole plan of a run: what each rank holds, what a step takes, what the run costs beside token-level training, how often to save.

In: model, stages, layout, hardware. Out: `Plan`, with a JSON form that says of each number whether it is counted or estimated.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from megatron_patch.errors import ConfigError
from megatron_patch.model.shape import ModelShape
from megatron_patch.planning.cost import Cost
from megatron_patch.planning.hardware import Hardware
from megatron_patch.planning.layout import Layout
from megatron_patch.planning.memory import COUNTED, Memory, rank_memory, rank_parameters
from megatron_patch.planning.reliability import Interruptions, StageWork, daly_interval, expected_goodput, young_interval
from megatron_patch.planning.timing import StepTime, bubble_share, step_time
from megatron_patch.planning.traffic import Traffic, traffic
from megatron_patch.stages import Stage, StagePlan


@dataclass(frozen=True)
class PipelinePart:
    """What each rank of one pipeline stage holds; all ranks of it are alike.

    Args:
        pipeline_rank: which.
        ranks: how many.
        layers: 0 is the embedding, L + 1 the final norm and head.
        parameters: of each rank; exact.
        memory: in the stage of the run that needs most.
        fullest: name of that stage.
    """

    pipeline_rank: int
    ranks: int
    layers: range
    parameters: int
    memory: Memory
    fullest: str

    def describe(self, num_layers: int) -> str:
        """The layers in words."""
        blocks = [layer - 1 for layer in self.layers if 1 <= layer <= num_layers]
        words = ["embedding"] if 0 in self.layers else []
        if blocks:
            words.append(f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]}-{blocks[-1]}")
        return ", ".join(words + (["norm and head"] if num_layers + 1 in self.layers else []))


def pipeline_parts(shape: ModelShape, plan: StagePlan, layout: Layout, device: Literal["cuda", "cpu"] = "cuda") -> list[PipelinePart]:
    """One entry for each pipeline stage."""
    parts = []
    for rank, layers in enumerate(layout.parts(shape)):
        needs = [(rank_memory(shape, layout, layers, rank, stage, device), stage.name) for stage in plan.stages]
        memory, fullest = max(needs, key=lambda need: need[0].total)
        parts.append(PipelinePart(rank, layout.ranks // layout.pipeline, layers, rank_parameters(shape, layout, layers), memory, fullest))
    return parts


@dataclass(frozen=True)
class StageEstimate:
    """A stage of the run on this hardware.

    Args:
        stage: of the run.
        flops: of the whole stage; exact.
        time: of a step.
        bubble: share of a step in which a pipeline idles at best.
        traffic: of a rank of the busiest pipeline stage in a step.
    """

    stage: Stage
    flops: float
    time: StepTime
    bubble: float
    traffic: tuple[Traffic, ...]

    @property
    def seconds(self) -> float:
        """Of all its steps."""
        return self.stage.steps * self.time.total


@dataclass(frozen=True)
class Budget:
    """What a run takes.

    Args:
        tokens: it reads.
        flops: it computes.
        seconds: it lasts, without evaluations, checkpoints and failures.
        device_hours: on all devices.
        dollars: for them.
    """

    tokens: float
    flops: float
    seconds: float
    device_hours: float
    dollars: float


@dataclass(frozen=True)
class Checkpoints:
    """How often to save.

    Args:
        bytes: of a checkpoint, float32 weights and both moments.
        mtbf_seconds: mean time between failures of the job.
        save_seconds: taken from training by each checkpoint.
        young_seconds: the classic interval.
        daly_seconds: the higher-order one.
        steps: the latter in steps of the longest stage.
        goodput: useful time over wall time with it.
    """

    bytes: int
    mtbf_seconds: float
    save_seconds: float
    young_seconds: float
    daly_seconds: float
    steps: int
    goodput: float


@dataclass(frozen=True)
class Plan:
    """Everything that can be said before a run.

    Args:
        shape: the model.
        plan: the stages.
        layout: the ranks.
        hardware: the devices.
        parts: what ranks hold, by pipeline stage.
        stages: what each stage takes.
        run: the whole run.
        token_level: the same tokens at token level.
        equal_cost: token level for the run's own FLOPs.
        checkpoints: how often to save.
    """

    shape: ModelShape
    plan: StagePlan
    layout: Layout
    hardware: Hardware
    parts: tuple[PipelinePart, ...]
    stages: tuple[StageEstimate, ...]
    run: Budget
    token_level: Budget
    equal_cost: Budget
    checkpoints: Checkpoints

    @property
    def fullest(self) -> PipelinePart:
        """The ranks that need most memory."""
        return max(self.parts, key=lambda part: part.memory.total)

    @property
    def fits(self) -> bool:
        """Whether that is in a device's memory."""
        return self.fullest.memory.total <= self.hardware.memory_gib * 2**30

    def work(self) -> list[StageWork]:
        """The stages for a simulation."""
        return [StageWork(estimate.stage.name, estimate.stage.steps, estimate.time.total) for estimate in self.stages]

    def to_json(self) -> dict[str, Any]:
        """Plain values; under "counted" what is exact, under "estimated" what is not."""
        return {
            "layout": {"name": self.layout.name(), **dataclasses.asdict(self.layout), "data": self.layout.data},
            "hardware": dataclasses.asdict(self.hardware),
            "counted": {
                "tokens": self.run.tokens,
                "flops": self.run.flops,
                "cost": self.run.flops / self.token_level.flops,
                "checkpoint_bytes": self.checkpoints.bytes,
                "ranks": [
                    {
                        "pipeline_rank": part.pipeline_rank,
                        "ranks": part.ranks,
                        "layers": [part.layers.start, part.layers.stop - 1],
                        "parameters": part.parameters,
                        **{f"{name}_bytes": value for name, value in part.memory.to_json().items() if name in COUNTED},
                    }
                    for part in self.parts
                ],
                "stages": [
                    {
                        "stage": estimate.stage.name,
                        "patch_size": estimate.stage.patch_size,
                        "steps": estimate.stage.steps,
                        "tokens": estimate.stage.tokens,
                        "flops": estimate.flops,
                        "bubble": estimate.bubble,
                        "bytes_sent": {f"{row.kind} ({row.link})": row.bytes for row in estimate.traffic},
                    }
                    for estimate in self.stages
                ],
            },
            "estimated": {
                "fits": self.fits,
                "ranks": [
                    {
                        "pipeline_rank": part.pipeline_rank,
                        "fullest_stage": part.fullest,
                        **{f"{name}_bytes": value for name, value in part.memory.to_json().items() if name not in COUNTED},
                    }
                    for part in self.parts
                ],
                "stages": [
                    {
                        "stage": estimate.stage.name,
                        "step_seconds": estimate.time.total,
                        **{f"{name}_seconds": value for name, value in dataclasses.asdict(estimate.time).items() if name != "mfu"},
                        "mfu": estimate.time.mfu,
                        "tokens_per_second": estimate.stage.tokens_per_step / estimate.time.total,
                        "hours": estimate.seconds / 3600,
                    }
                    for estimate in self.stages
                ],
                "run": dataclasses.asdict(self.run),
                "token_level_same_tokens": dataclasses.asdict(self.token_level),
                "token_level_same_cost": dataclasses.asdict(self.equal_cost),
                "checkpoints": dataclasses.asdict(self.checkpoints),
            },
        }


def token_stage(plan: StagePlan, layout: Layout, token_positions: int) -> Stage:
    """A stage at K = 1 with the samples and positions of token-level training: the plan's own last one, or a patch stage's, unpatched."""
    last = plan.stages[-1]
    if last.patch_size == 1:
        return last
    samples = max(layout.data * last.micro_batch_size, round(last.tokens_per_step / token_positions))
    return Stage("token", 1, token_positions, last.micro_batch_size, samples, 1)


def make_plan(
    shape: ModelShape, plan: StagePlan, layout: Layout, hardware: Hardware, token_positions: int, interruptions: Interruptions | None = None
) -> Plan:
    """Plans a run.

    Args:
        shape: the model.
        plan: the stages.
        layout: the ranks.
        hardware: devices and links.
        token_positions: of a token-level sample, the yardstick.
        interruptions: for the checkpoint interval; None: the published rate.

    Raises:
        ConfigError: ranks that do not fill the grid.
    """
    if layout.ranks % (layout.tensor * layout.pipeline) or not layout.data:
        raise ConfigError(
            f"{layout.ranks} ranks for {layout.name()}", f"multiples of {layout.tensor * layout.pipeline}", "change --world-size"
        )
    cost = Cost(shape, plan, token_positions)
    parts = tuple(pipeline_parts(shape, plan, layout))
    stages = []
    for stage in plan.stages:
        sent = max(
            (traffic(shape, layout, part.layers, stage, hardware) for part in parts), key=lambda rows: sum(row.bytes for row in rows)
        )
        time = step_time(shape, layout, stage, hardware)
        stages.append(StageEstimate(stage, stage.steps * cost.step_flops(stage), time, bubble_share(layout, stage), tuple(sent)))
    seconds = sum(estimate.seconds for estimate in stages)
    flops = sum(estimate.flops for estimate in stages)
    token = token_stage(plan, layout, token_positions)
    per_token = step_time(shape, layout, token, hardware).total / token.tokens_per_step

    def budget(tokens: float, flops: float, seconds: float) -> Budget:
        hours = seconds * layout.ranks / 3600
        return Budget(tokens, flops, seconds, hours, hours * hardware.dollars_per_hour)

    equal = flops / cost.token_flops
    longest = max(stages, key=lambda estimate: estimate.seconds)
    return Plan(
        shape,
        plan,
        layout,
        hardware,
        parts,
        tuple(stages),
        budget(plan.tokens, flops, seconds),
        budget(plan.tokens, plan.tokens * cost.token_flops, plan.tokens * per_token),
        budget(equal, flops, equal * per_token),
        _checkpoints(shape, layout, interruptions or Interruptions(), longest.time.total),
    )


def _checkpoints(shape: ModelShape, layout: Layout, interruptions: Interruptions, step_seconds: float) -> Checkpoints:
    whole = rank_parameters(shape, Layout(ranks=1), range(shape.num_layers + 2))
    mtbf = interruptions.mtbf_seconds(layout.ranks)
    daly = daly_interval(interruptions.save_seconds, mtbf)
    return Checkpoints(
        bytes=12 * whole,
        mtbf_seconds=mtbf,
        save_seconds=interruptions.save_seconds,
        young_seconds=young_interval(interruptions.save_seconds, mtbf),
        daly_seconds=daly,
        steps=max(1, round(daly / step_seconds)),
        goodput=expected_goodput(daly, interruptions.save_seconds, interruptions.restart_seconds, mtbf),
    )
