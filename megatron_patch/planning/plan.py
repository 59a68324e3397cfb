"""The plan of a run: memory of each rank, time of a step, cost against token-level training, and checkpoint interval.

In: model, stages, layout, hardware. Out: `Plan`, whose JSON form separates counted numbers from estimated ones.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from megatron_patch.errors import ConfigError, DoesNotFitError
from megatron_patch.model.shape import ModelShape
from megatron_patch.planning.cost import Cost
from megatron_patch.planning.hardware import Hardware
from megatron_patch.planning.layout import Layout, PlannedOptimizer
from megatron_patch.planning.memory import COUNTED_PARTS, Memory, hidden_parameters, rank_memory, rank_parameters, state_values
from megatron_patch.planning.published import calibration
from megatron_patch.planning.reliability import Interruptions, StageWork, daly_interval, expected_goodput, young_interval
from megatron_patch.planning.timing import StepTime, bubble_share, step_time
from megatron_patch.planning.traffic import Traffic, traffic
from megatron_patch.stages import Stage, StagePlan
from megatron_patch.utils.units import plural


@dataclass(frozen=True)
class PipelinePart:
    """The part of the model that ranks with the same pipeline rank hold; it is the same on all of them.

    Args:
        pipeline_rank: index in the pipeline.
        ranks: number of ranks with this pipeline rank.
        layers: their layers; 0 is the embedding, L + 1 the final norm and head.
        parameters: exact number of parameters of each rank.
        memory: memory of each rank in the stage that needs most.
        peak_stage: name of that stage.
    """

    pipeline_rank: int
    ranks: int
    layers: range
    parameters: int
    memory: Memory
    peak_stage: str

    def describe(self, num_layers: int) -> str:
        """Returns the layers as text, such as "embedding, blocks 0-11"."""
        blocks = [layer - 1 for layer in self.layers if 1 <= layer <= num_layers]
        pieces = ["embedding"] if 0 in self.layers else []
        if blocks:
            pieces.append(f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]}-{blocks[-1]}")
        return ", ".join(pieces + (["norm and head"] if num_layers + 1 in self.layers else []))


def pipeline_parts(
    shape: ModelShape, plan: StagePlan, layout: Layout, device: Literal["cuda", "cpu"] = "cuda", node_devices: int = 8
) -> list[PipelinePart]:
    """Returns the part of the model and the memory of each pipeline rank."""
    parts = []
    for rank, layers in enumerate(layout.layers_by_pipeline_rank(shape)):
        needs = [(rank_memory(shape, layout, layers, rank, stage, device, node_devices), stage.name) for stage in plan.stages]
        memory, peak_stage = max(needs, key=lambda need: need[0].total)
        parts.append(
            PipelinePart(rank, layout.ranks // layout.pipeline, layers, rank_parameters(shape, layout, layers), memory, peak_stage)
        )
    return parts


@dataclass(frozen=True)
class StageEstimate:
    """A stage on the planned hardware.

    Args:
        stage: the stage.
        flops: exact FLOPs of all its steps.
        time: estimated time of one step.
        bubble: smallest possible share of a step in which the pipeline is idle.
        traffic: bytes sent per step by each rank of the pipeline rank that sends most.
    """

    stage: Stage
    flops: float
    time: StepTime
    bubble: float
    traffic: tuple[Traffic, ...]

    @property
    def seconds(self) -> float:
        """Estimated seconds of all its steps."""
        return self.stage.steps * self.time.total


@dataclass(frozen=True)
class Resources:
    """The resources that a run needs.

    Args:
        tokens: tokens read.
        flops: FLOPs of all steps.
        seconds: time of all steps, without evaluations, checkpoints and failures.
        device_hours: hours summed over all devices.
        dollars: price of these device hours.
    """

    tokens: float
    flops: float
    seconds: float
    device_hours: float
    dollars: float


@dataclass(frozen=True)
class CheckpointSchedule:
    """The recommended interval between checkpoints.

    Args:
        bytes: size of a checkpoint with float32 weights and optimizer states.
        mtbf_seconds: mean time between failures of the job.
        save_seconds: time that training pauses for each checkpoint.
        young_seconds: interval by Young's formula.
        daly_seconds: interval by Daly's higher-order formula.
        steps: Daly's interval in steps of the longest stage.
        goodput: useful time over wall time with Daly's interval.
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
    """Everything that is predicted about a run.

    Args:
        shape: shape of the model.
        plan: the stages.
        layout: layout of the ranks.
        hardware: devices and links.
        parts: part of the model and memory by pipeline rank.
        stages: time and traffic of each stage.
        run: resources of the run.
        token_level: resources of token-level training on the same tokens.
        equal_cost: resources of token-level training with the same FLOPs.
        checkpoints: the recommended checkpoint interval.
    """

    shape: ModelShape
    plan: StagePlan
    layout: Layout
    hardware: Hardware
    parts: tuple[PipelinePart, ...]
    stages: tuple[StageEstimate, ...]
    run: Resources
    token_level: Resources
    equal_cost: Resources
    checkpoints: CheckpointSchedule

    @property
    def fullest(self) -> PipelinePart:
        """The pipeline rank that needs most memory."""
        return max(self.parts, key=lambda part: part.memory.total)

    @property
    def fits(self) -> bool:
        """Whether the memory of every rank fits into the usable memory of a device."""
        return self.fullest.memory.total <= self.hardware.usable_gib * 2**30

    def check_memory(self) -> None:
        """Checks that every rank fits.

        Raises:
            DoesNotFitError: a rank does not.
        """
        if self.fits:
            return
        part = self.fullest
        ranks = f"ranks of pipeline rank {part.pipeline_rank} need" if self.layout.pipeline > 1 else "each rank needs"
        raise DoesNotFitError(
            f"{ranks} about {part.memory.total / 2**30:,.1f} GiB in stage {part.peak_stage}, more than {self.hardware.usable_text()}",
            f"plans of at most {self.hardware.usable_gib:.1f} GiB a rank",
            "give --search to list the layouts that fit, "
            + ("" if self.layout.recompute == "full" else "--recompute-granularity full, ")
            + "or more devices with --world-size",
        )

    def work(self) -> list[StageWork]:
        """Returns the stages as input for `simulate`."""
        return [StageWork(estimate.stage.name, estimate.stage.steps, estimate.time.total) for estimate in self.stages]

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values: exact numbers under "counted", all others under "estimated"."""
        layout = {"zero_stage" if key == "zero_level" else key: value for key, value in dataclasses.asdict(self.layout).items()}
        # Figures that only Muon or context parallelism has, and the defaults of their parts of the layout, are left out without them.
        optimizer, context = self.layout.optimizer, max(self.layout.context) > 1
        unused = frozenset() if optimizer.full_matrices else frozenset({"matrices", "orthogonalization"})
        unused |= frozenset() if context else frozenset({"context"})
        unused |= frozenset() if self.layout.experts > 1 else frozenset({"experts"})
        if self.layout.experts == 1:
            del layout["experts"]
        if not context:
            del layout["context"], layout["context_exchange"]
        for key in ("optimizer", "sub_group_elements") if optimizer == PlannedOptimizer() else ():
            del layout[key]
        return {
            "layout": {"name": self.layout.name(), **layout, "data": self.layout.data},
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
                        **{f"{name}_bytes": value for name, value in part.memory.to_json().items() if name in COUNTED_PARTS},
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
                "usable_gib": self.hardware.usable_gib,
                "times": calibration(self.hardware),
                "ranks": [
                    {
                        "pipeline_rank": part.pipeline_rank,
                        "fullest_stage": part.peak_stage,
                        **{f"{name}_bytes": value for name, value in part.memory.to_json().items() if name not in COUNTED_PARTS | unused},
                    }
                    for part in self.parts
                ],
                "stages": [
                    {
                        "stage": estimate.stage.name,
                        "step_seconds": estimate.time.total,
                        **{
                            f"{name}_seconds": value
                            for name, value in dataclasses.asdict(estimate.time).items()
                            if name != "mfu" and name not in unused
                        },
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
    """Returns the stage of token-level training to compare with: the plan's last stage, or its equivalent at K = 1.

    The equivalent has about the same tokens per step, in samples of `token_positions` positions.
    """
    last = plan.stages[-1]
    if last.patch_size == 1:
        return last
    samples = max(layout.data * last.micro_batch_size, round(last.tokens_per_step / token_positions))
    return Stage("token", 1, token_positions, last.micro_batch_size, samples, 1)


def make_plan(
    shape: ModelShape, plan: StagePlan, layout: Layout, hardware: Hardware, token_positions: int, interruptions: Interruptions | None = None
) -> Plan:
    """Returns the plan of a run.

    Args:
        shape: shape of the model.
        plan: the stages.
        layout: layout of the ranks.
        hardware: devices and links.
        token_positions: positions per sample of the token-level training that the run is compared with.
        interruptions: rates for the checkpoint interval; None uses the published failure rate.

    Raises:
        ConfigError: the number of ranks is not a multiple of tensor times pipeline parallel size.
    """
    if layout.ranks % (layout.tensor * layout.pipeline) or not layout.data:
        raise ConfigError(
            f"{plural(layout.ranks, 'rank')} cannot form TP{layout.tensor} x PP{layout.pipeline}",
            f"multiples of {layout.tensor * layout.pipeline} ranks",
            "change --world-size or the parallel sizes",
        )
    cost = Cost(shape, plan, token_positions)
    parts = tuple(pipeline_parts(shape, plan, layout, node_devices=hardware.node_devices))
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

    def resources(tokens: float, flops: float, seconds: float) -> Resources:
        hours = seconds * layout.ranks / 3600
        return Resources(tokens, flops, seconds, hours, hours * hardware.dollars_per_hour)

    equal = flops / cost.token_flops
    longest = max(stages, key=lambda estimate: estimate.seconds)
    return Plan(
        shape,
        plan,
        layout,
        hardware,
        parts,
        tuple(stages),
        resources(plan.tokens, flops, seconds),
        resources(plan.tokens, plan.tokens * cost.token_flops, plan.tokens * per_token),
        resources(equal, flops, equal * per_token),
        _checkpoints(shape, layout, interruptions or Interruptions(), longest.time.total),
    )


def _checkpoints(shape: ModelShape, layout: Layout, interruptions: Interruptions, step_seconds: float) -> CheckpointSchedule:
    alone, layers = Layout(ranks=1), range(shape.num_layers + 2)
    parameters, hidden = rank_parameters(shape, alone, layers), hidden_parameters(shape, alone, layers)
    mtbf = interruptions.mtbf_seconds(layout.ranks)
    daly = daly_interval(interruptions.save_seconds, mtbf)
    return CheckpointSchedule(
        bytes=4 * (parameters + state_values(parameters, hidden, layout)),
        mtbf_seconds=mtbf,
        save_seconds=interruptions.save_seconds,
        young_seconds=young_interval(interruptions.save_seconds, mtbf),
        daly_seconds=daly,
        steps=max(1, round(daly / step_seconds)),
        goodput=expected_goodput(daly, interruptions.save_seconds, interruptions.restart_seconds, mtbf),
    )
