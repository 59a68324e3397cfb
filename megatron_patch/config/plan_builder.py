"""Turns the stages that a run describes into a `StagePlan`: shares into tokens, tokens into steps, batches into full micro-batches.

In: the options of a run, the number of data-parallel ranks, the context-parallel size. Out: the plan.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_patch.config.amounts import stage_tokens
from megatron_patch.config.options import ScheduleOptions, StageOptions
from megatron_patch.config.schedules import with_schedules
from megatron_patch.config.stage_spec import BALANCE_KEYS, SCHEDULE_KEYS, StageSpec, parse_blend, stage_specs
from megatron_patch.errors import ConfigError
from megatron_patch.stages import NO_BALANCE, POSITION_WEIGHTS, ExpertBalance, LrPolicy, Stage, StagePlan, position_weights

PUBLISHED_DECAY_FRACTION = 0.1
"""Share of the steps over which WSD decays in arXiv 2605.06546."""
_WARMUP = ("lr_warmup_tokens", "lr_warmup_steps")


@dataclass(frozen=True)
class _SizedStage:
    """A stage whose samples are known, but not yet its number of steps."""

    spec: StageSpec
    positions: int
    input_patch_size: int
    micro_batch_size: int
    context_parallel_size: int
    constant_tokens: bool

    @property
    def sample_tokens(self) -> int:
        return self.positions * self.input_patch_size

    @property
    def batch_unit(self) -> int:
        """How much one sample adds to the batch size that all stages share: its tokens, or its positions."""
        return self.sample_tokens if self.constant_tokens else self.positions


def build_plan(
    options: StageOptions,
    schedule: ScheduleOptions,
    data_parallel_size: int,
    decay_fraction: float = PUBLISHED_DECAY_FRACTION,
    batch_of: StagePlan | None = None,
    context_parallel_size: int = 1,
    balance: ExpertBalance = NO_BALANCE,
) -> StagePlan:
    """Returns the plan of a run.

    Args:
        options: the stages, their tokens, samples and batches.
        schedule: the learning rates, for stages that set none.
        data_parallel_size: number of ranks that share a global batch.
        decay_fraction: share of a schedule's steps over which WSD decays where no other length is given.
        batch_of: the plan of the same run's first start, whose global batch is used in place of the options' and is not rounded to the
            ranks of this start.
        context_parallel_size: ranks that share a sample of --seq-length positions, in stages that do not give their own number.
        balance: how the load of experts is balanced, in stages that do not say.

    Raises:
        ConfigError: the options give no valid plan; the message names the flag or the stage.
    """
    sized = [_sized(spec, options, context_parallel_size) for spec in _specs(options, schedule)]
    if batch_of is None:
        batch = _global_batch(sized, options, data_parallel_size)
    else:
        batch = batch_of.stages[0].global_batch_size * sized[0].batch_unit
    batches = _samples_per_step(batch, sized, options)
    step_tokens = [batch * stage.sample_tokens for batch, stage in zip(batches, sized, strict=True)]
    amounts = stage_tokens([stage.spec for stage in sized], step_tokens, [stage.input_patch_size for stage in sized], options.train_tokens)
    block = _block_tokens(sized, options)
    stages: list[Stage] = []
    running: StageSpec | None = None
    for index, (stage, batch, tokens) in enumerate(zip(sized, batches, amounts, strict=True)):
        steps = whole_steps(tokens, step_tokens[index], block if index < len(sized) - 1 else 1)
        if stage.spec.lr_policy in (None, "restart"):
            running = stage.spec
        stages.append(dataclasses.replace(_stage(stage, batch, steps, options, running), expert_balance=_balance(stage.spec, balance)))
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        stages = [dataclasses.replace(stage, name=f"{number}-{stage.name}") for number, stage in enumerate(stages, start=1)]
    return with_schedules(StagePlan(tuple(stages), block), [stage.spec for stage in sized], schedule, decay_fraction)


def reschedule(plan: StagePlan, options: StageOptions, schedule: ScheduleOptions, decay_fraction: float) -> StagePlan:
    """Returns a plan with the learning rates that the options describe for stages of these lengths.

    Args:
        plan: as many stages as the options describe.
        options: the stages.
        schedule: the learning rates, for stages that set none.
        decay_fraction: as for `build_plan`.

    Raises:
        ConfigError: the learning rates do not fit the stages.
    """
    return with_schedules(plan, _specs(options, schedule), schedule, decay_fraction)


def whole_steps(tokens: Fraction | float, tokens_per_step: int, block_tokens: int) -> int:
    """Returns the number of steps that comes closest to reading `tokens` tokens, and reads full blocks.

    Args:
        tokens: tokens to read.
        tokens_per_step: tokens of a step.
        block_tokens: tokens of a block, at whose end all stages but the last must end; 1 for the last stage.
    """
    unit = block_tokens // math.gcd(block_tokens, tokens_per_step)
    return max(1, round(tokens / (tokens_per_step * unit))) * unit


def _specs(options: StageOptions, schedule: ScheduleOptions) -> tuple[StageSpec, ...]:
    """Returns the stages as described; flags override what a recipe sets, and entries of `stages:` override flags."""
    specs = stage_specs(options)
    if options.stages is not None:
        return specs
    return tuple(
        dataclasses.replace(spec, batch=options.batch or spec.batch, lr_decay_style=schedule.lr_decay_style or spec.lr_decay_style)
        for spec in specs
    )


def _sized(spec: StageSpec, options: StageOptions, context_parallel_size: int) -> _SizedStage:
    """Returns a stage with the samples that its description and the options give it, and the ranks that share each of them."""
    name = spec.name or f"K={spec.patch_size}"
    if spec.patch_size < 1:
        raise ConfigError(f"stage {name!r}: patch_size {spec.patch_size}", "whole numbers from 1", "give another patch_size")
    if spec.micro_batch_size is not None and spec.micro_batch_size < 1:
        raise ConfigError(
            f"stage {name!r}: micro_batch_size {spec.micro_batch_size}",
            "whole numbers from 1",
            "remove it from the stage to use --micro-batch-size",
        )
    if spec.context_parallel_size is not None and spec.context_parallel_size < 1:
        raise ConfigError(
            f"stage {name!r}: context_parallel_size {spec.context_parallel_size}",
            "whole numbers from 1",
            "remove it from the stage to use --context-parallel-size",
        )
    batch = spec.batch or options.batch or "constant-tokens"
    input_patch_size = 1 if spec.side == "output" else spec.patch_size
    positions = options.seq_length
    if (spec.sample or options.sample) == "constant-tokens":
        if options.seq_length % input_patch_size:
            raise ConfigError(
                f"stage {name!r}: a sample of {options.seq_length} tokens does not divide into patches of {input_patch_size}",
                "a --seq-length that is a multiple of patch_size",
                "change --seq-length or patch_size, or use sample: constant-positions",
            )
        positions = options.seq_length // input_patch_size
    return _SizedStage(
        spec,
        positions,
        input_patch_size,
        spec.micro_batch_size or options.micro_batch_size,
        spec.context_parallel_size or context_share(context_parallel_size, positions, options.seq_length),
        batch == "constant-tokens",
    )


def context_share(size: int, positions: int, seq_length: int) -> int:
    """Returns the context-parallel size of a stage: with fewer positions per sample than --seq-length, fewer ranks share a sample.

    It is the largest divisor of `size` that leaves each rank as many positions as a sample of --seq-length does, or more.
    """
    most = max(1, size * positions // seq_length)
    return max(divisor for divisor in range(1, min(size, most) + 1) if size % divisor == 0)


def _balance(spec: StageSpec, default: ExpertBalance) -> ExpertBalance:
    given = {field: getattr(spec, key) for key, field in BALANCE_KEYS.items()}
    return dataclasses.replace(default, **{name: value for name, value in given.items() if value is not None})


def _global_batch(sized: Sequence[_SizedStage], options: StageOptions, ranks: int) -> int:
    """Returns the size of a step at K = 1, in tokens or positions, which are the same there.

    A batch given in tokens is rounded to full micro-batches of all ranks in every stage; a batch given in samples is kept as given.
    """
    if (options.global_batch_size is None) == (options.global_batch_tokens is None):
        raise ConfigError(
            "the global batch is given twice" if options.global_batch_size else "the global batch is missing",
            "one of --global-batch-tokens and --global-batch-size",
            "remove one of the two" if options.global_batch_size else "give --global-batch-tokens 2M, for example",
        )
    if options.global_batch_size is not None:
        return options.global_batch_size * options.seq_length
    assert options.global_batch_tokens is not None
    # Ranks that share a sample read one micro-batch together; a size that does not divide the ranks is refused later.
    together = (stage.micro_batch_size * max(1, ranks // stage.context_parallel_size) * stage.batch_unit for stage in sized)
    unit = math.lcm(*together)
    return max(1, round(options.global_batch_tokens / unit)) * unit


def _samples_per_step(batch: int, sized: Sequence[_SizedStage], options: StageOptions) -> list[int]:
    """Returns the samples in a step of each stage, for a step of `batch` tokens or positions."""
    samples = [Fraction(batch, stage.batch_unit) for stage in sized]
    for stage, number in zip(sized, samples, strict=True):
        if number.denominator != 1:
            raise ConfigError(
                f"a step of {batch} tokens does not divide into samples of {stage.sample_tokens} tokens (K = {stage.spec.patch_size})",
                f"--global-batch-size in multiples of {number.denominator * (options.global_batch_size or 1)}",
                "give --global-batch-tokens, which is rounded, or use batch: constant-positions",
            )
    return [int(number) for number in samples]


def _block_tokens(sized: Sequence[_SizedStage], options: StageOptions) -> int:
    """Returns the tokens of a block: the number given, else the least common multiple of the samples."""
    block = math.lcm(*(stage.sample_tokens for stage in sized))
    if options.block_tokens is None:
        return block
    if options.block_tokens % block:
        samples = ", ".join(str(stage.sample_tokens) for stage in sized)
        raise ConfigError(
            f"--block-tokens {options.block_tokens} is not a multiple of the tokens in a sample (T·K) of every stage: {samples}",
            f"multiples of {block}",
            "remove --block-tokens, or change --seq-length or the patch sizes",
        )
    return options.block_tokens


def _stage(sized: _SizedStage, batch: int, steps: int, options: StageOptions, running: StageSpec | None) -> Stage:
    """Returns a stage of the plan, without its learning rates.

    Args:
        sized: the stage with its samples.
        batch: number of samples in a step.
        steps: number of optimizer steps.
        options: the label weights, for stages that set none.
        running: the stage that began the current learning-rate schedule; None if no schedule has begun.
    """
    spec = sized.spec
    labels = 1 if spec.side == "input" else spec.patch_size
    kind: str | tuple[float, ...] = spec.position_weights or options.position_weights
    if isinstance(kind, str) and "," in kind:
        try:
            kind = tuple(float(weight) for weight in kind.split(","))
        except ValueError:
            raise ConfigError(
                f"--position-weights {kind}",
                f"{', '.join(POSITION_WEIGHTS)}, or numbers with commas between them",
                "correct --position-weights",
            ) from None
    if labels == 1 and not isinstance(kind, str) and spec.position_weights is None:
        kind = "uniform"
    anneal = spec.anneal_share if spec.anneal_share is not None else 0.0
    if not 0.0 <= anneal <= 1.0:
        raise ConfigError(f"anneal_share {anneal}", "a share from 0 to 1", "give 0.2, for example, or leave it out")
    policy: LrPolicy = spec.lr_policy or "restart"
    if running is None:
        raise ConfigError(
            f"the first stage has lr_policy: {policy}", "restart, because no schedule runs yet", "remove lr_policy from the first stage"
        )
    if policy != "restart":
        # A stage may repeat the values of the current schedule.
        idle = [
            name
            for name in SCHEDULE_KEYS
            if getattr(spec, name) not in (None, getattr(running, name)) and not (policy == "rewarm" and name in _WARMUP)
        ]
        if idle:
            raise ConfigError(
                f"a stage with lr_policy: {policy} gives {idle[0]}, which would have no effect",
                f"{idle[0]} only in stages with lr_policy: restart",
                f"remove {idle[0]}, or use lr_policy: restart",
            )
    return Stage(
        name=spec.name or ("token" if spec.patch_size == 1 else f"patch-{spec.patch_size}"),
        patch_size=spec.patch_size,
        positions=sized.positions,
        micro_batch_size=sized.micro_batch_size,
        global_batch_size=batch,
        steps=steps,
        side=spec.side,
        position_weights=position_weights(kind, labels),
        anneal_share=anneal,
        lr_policy=policy,
        optimizer=spec.optimizer or ("reset" if policy == "restart" else "keep"),
        blend=parse_blend(spec.data_path, "stages: data_path") if spec.data_path else None,
        context_parallel_size=sized.context_parallel_size,
    )
