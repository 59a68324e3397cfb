"""Which layouts of N devices can run a model, the quickest first.

In: a run's options, devices. Out: plans, ranked by the estimated time of the whole run. Each candidate goes through the same checks as a
run that asks for it, so that what is listed can be started.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_patch.config.options import Options
from megatron_patch.config.parsing import ParsedOptions
from megatron_patch.config.resolve import resolve
from megatron_patch.engine.deepspeed_config import engine_config
from megatron_patch.errors import ConfigError
from megatron_patch.planning.hardware import Hardware
from megatron_patch.planning.layout import Recompute, layout_of
from megatron_patch.planning.plan import Plan, make_plan


@dataclass(frozen=True)
class Choice:
    """What a search varies."""

    tensor: int
    pipeline: int
    zero_stage: Literal[1, 2, 3]
    micro_batch_size: int
    recompute: Recompute

    def flags(self) -> str:
        """As a user writes it."""
        words = [f"--tensor-model-parallel-size {self.tensor}", "--sequence-parallel"] if self.tensor > 1 else []
        words += [f"--pipeline-model-parallel-size {self.pipeline}"] if self.pipeline > 1 else []
        words += [f"--zero-stage {self.zero_stage}", f"--micro-batch-size {self.micro_batch_size}"]
        return " ".join(words + ([f"--recompute-granularity {self.recompute}"] if self.recompute != "none" else []))

    def of(self, options: Options) -> Options:
        """A run's options with this layout."""
        engine = dataclasses.replace(
            options.engine,
            tensor_model_parallel_size=self.tensor,
            pipeline_model_parallel_size=self.pipeline,
            sequence_parallel=self.tensor > 1,
            zero_stage=self.zero_stage,
            recompute_granularity=self.recompute,
        )
        stages = dataclasses.replace(options.stages, micro_batch_size=self.micro_batch_size)
        return dataclasses.replace(options, engine=engine, stages=stages)


@dataclass(frozen=True)
class Candidate:
    """A layout that fits.

    Args:
        choice: that asks for it.
        plan: what it takes.
    """

    choice: Choice
    plan: Plan

    @property
    def seconds_per_token(self) -> float:
        """Of the whole run: batches are rounded to the layout, so that runs differ a little in length."""
        return self.plan.run.seconds / self.plan.run.tokens


def _powers(limit: int) -> list[int]:
    return [1 << exponent for exponent in range(limit.bit_length()) if 1 << exponent <= limit]


def choices(ranks: int, hardware: Hardware) -> Iterator[Choice]:
    """Every layout worth a look: tensor parallelism inside a node (positions sharded with it), pipelines by powers of two, ZeRO 1 to 3
    where it goes, four micro-batches, with and without recomputation.
    """
    for tensor, pipeline in itertools.product(_powers(hardware.node_devices), _powers(min(64, ranks))):
        if ranks % (tensor * pipeline) == 0:
            stages: tuple[Literal[1, 2, 3], ...] = (1, 2, 3) if pipeline == 1 else (1,)
            for zero, micro in itertools.product(stages, (1, 2, 4, 8)):
                yield Choice(tensor, pipeline, zero, micro, "none")
                yield Choice(tensor, pipeline, zero, micro, "full")


def search(parsed: ParsedOptions, ranks: int, hardware: Hardware) -> tuple[list[Candidate], int]:
    """Tries layouts of a run.

    Args:
        parsed: the run's options; those of the layout are replaced.
        ranks: devices.
        hardware: what they are.

    Returns:
        (what fits, the quickest first, one micro-batch of each layout; how many were tried).

    Raises:
        ConfigError: no layout passes the run's own checks.
    """
    best: dict[tuple[int, int, int, str], Candidate] = {}
    tried = 0
    failure: ConfigError | None = None
    for choice in choices(ranks, hardware):
        tried += 1
        try:
            run = resolve(ParsedOptions(choice.of(parsed.options), parsed.origins), ranks)
            layout = layout_of(run, engine_config(run.options.engine, run.options.schedule, run.origins, run.plan, run.data_parallel_size))
        except ConfigError as error:
            failure = error
            continue
        plan = make_plan(run.shape, run.plan, layout, hardware, run.options.stages.seq_length)
        key = (choice.tensor, choice.pipeline, choice.zero_stage, choice.recompute)
        candidate = Candidate(choice, plan)
        if plan.fits and (key not in best or candidate.seconds_per_token < best[key].seconds_per_token):
            best[key] = candidate
    if not best and failure is not None:
        raise failure
    return sorted(best.values(), key=lambda candidate: candidate.seconds_per_token), tried
