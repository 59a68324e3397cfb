"""Search for the layouts of N devices that can run a model, fastest first.

In: a run's options, devices. Out: plans, ranked by the estimated time of the run. Each candidate passes the same checks as a run with its
flags, so every listed layout can be started. Layouts that would change the global batch, because it is rounded to whole micro-batches of
all ranks, are left out: they would be another run.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_patch.config.options import Options
from megatron_patch.config.parsing import ParsedOptions
from megatron_patch.config.resolve import RunConfig, resolve
from megatron_patch.engine.deepspeed_config import resolve_engine_config
from megatron_patch.errors import ConfigError, DoesNotFitError
from megatron_patch.planning.hardware import Hardware
from megatron_patch.planning.layout import Recompute, layout_of
from megatron_patch.planning.plan import Plan, make_plan

BATCH_TOLERANCE = 0.05
"""Largest relative change of the global batch, in tokens, that a layout may cause."""


@dataclass(frozen=True)
class LayoutChoice:
    """The settings that a search varies."""

    tensor: int
    pipeline: int
    zero_level: Literal[1, 2, 3]
    micro_batch_size: int
    recompute: Recompute
    context: int = 1
    experts: int = 1

    def flags(self, options: Options, zero_level: int | None) -> str:
        """Returns the flags that change a run's options, with their ZeRO level, to this layout; "as given" if it is the run's own."""
        engine = options.engine
        words = [
            ("--tensor-model-parallel-size", self.tensor, engine.tensor_model_parallel_size),
            ("--pipeline-model-parallel-size", self.pipeline, engine.pipeline_model_parallel_size),
            ("--context-parallel-size", self.context, engine.context_parallel_size),
            ("--expert-model-parallel-size", self.experts, engine.expert_model_parallel_size),
            ("--zero-stage", self.zero_level, zero_level),
            ("--micro-batch-size", self.micro_batch_size, options.stages.micro_batch_size),
            ("--recompute-granularity", self.recompute, engine.recompute_granularity),
        ]
        changed = [f"{flag} {wanted}" for flag, wanted, given in words if wanted != given]
        if engine.sequence_parallel != (self.tensor > 1):
            changed.append("--sequence-parallel" if self.tensor > 1 else "--no-sequence-parallel")
        return " ".join(changed) or "as given"

    def apply(self, options: Options) -> Options:
        """Returns a run's options with this layout."""
        engine = dataclasses.replace(
            options.engine,
            tensor_model_parallel_size=self.tensor,
            pipeline_model_parallel_size=self.pipeline,
            context_parallel_size=self.context,
            expert_model_parallel_size=self.experts,
            sequence_parallel=self.tensor > 1,
            zero_stage=self.zero_level,
            recompute_granularity=self.recompute,
        )
        stages = dataclasses.replace(options.stages, micro_batch_size=self.micro_batch_size)
        return dataclasses.replace(options, engine=engine, stages=stages)


@dataclass(frozen=True)
class Candidate:
    """A layout whose memory fits.

    Args:
        choice: its settings.
        plan: the plan of the run with it.
        flags: the flags that change the run to it.
    """

    choice: LayoutChoice
    plan: Plan
    flags: str

    @property
    def seconds_per_token(self) -> float:
        """Seconds per token of the run, for ranking: batches are rounded to the layout, so runs differ slightly in length."""
        return self.plan.run.seconds / self.plan.run.tokens


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Args:
        candidates: layouts that fit, fastest first, each with its fastest micro-batch.
        tried: number of layouts and micro-batches that were tried.
        other_batch: number of those that would change the global batch by more than `BATCH_TOLERANCE`.
        smallest: the plan that needs least memory, whether it fits or not; None if none keeps the batch.
        given: the run's own layout; None if it is not possible on these devices.
    """

    candidates: list[Candidate]
    tried: int
    other_batch: int
    smallest: Candidate | None
    given: Plan | None

    def check(self, hardware: Hardware) -> None:
        """Checks that a layout was found.

        Raises:
            DoesNotFitError: none was.
        """
        if self.candidates:
            return
        least = self.smallest
        raise DoesNotFitError(
            f"no layout fits: the smallest, {least.plan.layout.name()}, needs about {least.plan.fullest.memory.total / 2**30:,.1f} GiB, "
            f"more than {hardware.usable_text()}"
            if least
            else "no layout keeps the global batch",
            f"layouts of at most {hardware.usable_gib:.1f} GiB a rank, with the global batch within {BATCH_TOLERANCE:.0%}",
            (
                "give more devices with --world-size, devices with more memory with --gpu, or a larger --global-batch-tokens"
                if self.other_batch
                else "give more devices with --world-size, or devices with more memory with --gpu"
            )
            if least
            else "give another number of devices with --world-size, or a larger --global-batch-tokens",
        )


def _powers(limit: int) -> list[int]:
    return [1 << exponent for exponent in range(limit.bit_length()) if 1 << exponent <= limit]


RANK_POSITIONS = 8192
"""Positions of a sample for each rank, below which a search does not try more context parallelism unless it is given.

Shorter parts are planned a few percent faster in places, by estimates of exchanges that were not measured."""


def layout_choices(
    ranks: int, hardware: Hardware, seq_length: int = 1, given_context: int = 1, experts: int = 1, given_experts: int = 1
) -> Iterator[LayoutChoice]:
    """Yields the layouts to try.

    Tensor-parallel sizes are powers of two up to a node, with sequence parallelism; pipeline-parallel sizes are powers of two; ZeRO is 1 to
    3 without a pipeline, else 1; micro-batches are 1, 2, 4 and 8; each with full recomputation and without. Context-parallel sizes are
    powers of two that leave each rank `RANK_POSITIONS` or more, and the given one. Expert-parallel sizes are powers of two whose ranks are
    in one node, and the given one.

    Args:
        ranks: number of devices.
        hardware: devices and links.
        seq_length: --seq-length.
        given_context: the run's own context-parallel size.
        experts: experts of a block; 1 without experts.
        given_experts: the run's own expert-parallel size.
    """
    contexts = sorted({*_powers(max(1, min(ranks, seq_length // RANK_POSITIONS))), given_context})
    for tensor, pipeline in itertools.product(_powers(hardware.node_devices), _powers(min(64, ranks))):
        if ranks % (tensor * pipeline) == 0:
            zero_levels: tuple[Literal[1, 2, 3], ...] = (1, 2, 3) if pipeline == 1 else (1,)
            for zero, micro, context in itertools.product(zero_levels, (1, 2, 4, 8), contexts):
                data = ranks // (tensor * pipeline)
                if data % context:
                    continue
                for size in sorted({*_powers(max(1, hardware.node_devices // tensor)), given_experts}):
                    if size == 1 or (zero < 3 and data % size == 0 and experts % (tensor * size) == 0):
                        yield LayoutChoice(tensor, pipeline, zero, micro, "none", context, size)
                        yield LayoutChoice(tensor, pipeline, zero, micro, "full", context, size)


def search(parsed: ParsedOptions, ranks: int, hardware: Hardware) -> Found:
    """Plans a run in every layout of `layout_choices`.

    Args:
        parsed: the run's options; those of the layout are replaced.
        ranks: number of devices.
        hardware: devices and links.

    Raises:
        ConfigError: no layout passes the checks of a run.
    """
    best: dict[tuple[int, int, int, str, int, int], Candidate] = {}

    def resolved(options: Options) -> RunConfig:
        return resolve(ParsedOptions(options, parsed.origins), ranks)

    def planned(run: RunConfig) -> Plan:
        engine = resolve_engine_config(run.options.engine, run.options.schedule, run.origins, run.plan, run.data_parallel_size)
        return make_plan(run.shape, run.plan, layout_of(run, engine), hardware, run.options.stages.seq_length)

    try:
        given = planned(resolved(parsed.options))
    except ConfigError:
        given = None
    zero_level = given.layout.zero_level if given else parsed.options.engine.zero_stage
    # One rank rounds nothing.
    alone = LayoutChoice(1, 1, 1, 1, "none").apply(parsed.options)
    asked = [stage.tokens_per_step for stage in resolve(ParsedOptions(alone, parsed.origins), 1).plan.stages]
    smallest: Candidate | None = None
    tried = other_batch = 0
    failure: ConfigError | None = None
    options, experts = parsed.options, parsed.options.experts.num_experts or 1
    sizes = options.engine.context_parallel_size, experts, options.engine.expert_model_parallel_size
    for choice in layout_choices(ranks, hardware, options.stages.seq_length, *sizes):
        tried += 1
        try:
            run = resolved(choice.apply(parsed.options))
            batches = [stage.tokens_per_step for stage in run.plan.stages]
            if any(abs(batch / wanted - 1) > BATCH_TOLERANCE for batch, wanted in zip(batches, asked, strict=True)):
                # Not planned: among many ranks, owners of Muon's matrices take longest to choose.
                other_batch += 1
                continue
            plan = planned(run)
        except ConfigError as error:
            failure = error
            continue
        key = (choice.tensor, choice.pipeline, choice.zero_level, choice.recompute, choice.context, choice.experts)
        candidate = Candidate(choice, plan, choice.flags(parsed.options, zero_level))
        if smallest is None or plan.fullest.memory.total < smallest.plan.fullest.memory.total:
            smallest = candidate
        if plan.fits and (key not in best or candidate.seconds_per_token < best[key].seconds_per_token):
            best[key] = candidate
    if smallest is None and not other_batch and failure is not None:
        raise failure
    return Found(sorted(best.values(), key=lambda candidate: candidate.seconds_per_token), tried, other_batch, smallest, given)
