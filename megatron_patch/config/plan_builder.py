"""From requested stages to a `StagePlan`: shares become tokens, tokens become steps, batches become whole micro-batches.

In: the options of a run and the number of data-parallel ranks. Out: the plan.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

from megatron_patch.config.options import ScheduleOptions, StageOptions
from megatron_patch.config.stage_spec import AMOUNTS, SCHEDULE_KEYS, StageSpec, parse_blend, stage_specs
from megatron_patch.errors import ConfigError
from megatron_patch.stages import POSITION_WEIGHTS, LrPolicy, LrShape, Stage, StagePlan, position_weights
from megatron_patch.utils.units import format_count

PUBLISHED_DECAY_FRACTION = 0.1
"""Share of the steps over which WSD decays in arXiv 2605.06546."""


@dataclass(frozen=True)
class _Geometry:
    """A stage before its amount is known."""

    request: StageSpec
    positions: int
    input_patch_size: int
    micro_batch_size: int
    constant_tokens: bool

    @property
    def sample_tokens(self) -> int:
        return self.positions * self.input_patch_size


def _geometry(request: StageSpec, options: StageOptions) -> _Geometry:
    name = request.name or f"K={request.patch_size}"
    if request.patch_size < 1:
        raise ConfigError(f"stage {name!r}: patch_size {request.patch_size}", "whole numbers from 1")
    if request.micro_batch_size is not None and request.micro_batch_size < 1:
        raise ConfigError(f"stage {name!r}: micro_batch_size {request.micro_batch_size}", "whole numbers from 1", "leave it out")
    batch = request.batch or options.batch or "constant-tokens"
    input_patch_size = 1 if request.side == "output" else request.patch_size
    positions = options.seq_length
    if (request.sample or options.sample) == "constant-tokens":
        if options.seq_length % input_patch_size:
            raise ConfigError(
                f"stage {name!r}: samples of {options.seq_length} tokens cannot be cut into patches of {input_patch_size}",
                "a --seq-length that the patch size divides",
                "change --seq-length or patch_size, or use sample: constant-positions",
            )
        positions = options.seq_length // input_patch_size
    return _Geometry(request, positions, input_patch_size, request.micro_batch_size or options.micro_batch_size, batch == "constant-tokens")


def _global_batches(geometries: Sequence[_Geometry], options: StageOptions, ranks: int) -> list[int]:
    """Samples of a step, for each stage: the token-level batch, held constant in tokens or in positions.

    A batch given in tokens is rounded to whole micro-batches of all ranks in every stage; one given in samples is taken as it is.
    """
    if (options.global_batch_size is None) == (options.global_batch_tokens is None):
        raise ConfigError(
            "the global batch is given twice" if options.global_batch_size else "no global batch is given",
            "one of --global-batch-tokens and --global-batch-size",
            "--global-batch-tokens 2M, for example",
        )

    def samples(geometry: _Geometry, tokens: int) -> Fraction:
        return Fraction(tokens, geometry.sample_tokens if geometry.constant_tokens else geometry.positions)

    if options.global_batch_size is not None:
        tokens = options.global_batch_size * options.seq_length
    else:
        assert options.global_batch_tokens is not None
        unit = math.lcm(*(g.micro_batch_size * ranks * (g.sample_tokens if g.constant_tokens else g.positions) for g in geometries))
        tokens = max(1, round(options.global_batch_tokens / unit)) * unit
    batches = [samples(geometry, tokens) for geometry in geometries]
    for geometry, batch in zip(geometries, batches, strict=True):
        if batch.denominator != 1:
            raise ConfigError(
                f"a step of {tokens} tokens does not divide into samples of {geometry.sample_tokens} tokens "
                f"(K = {geometry.request.patch_size})",
                f"--global-batch-size in multiples of {batch.denominator * (options.global_batch_size or 1)}",
                "give --global-batch-tokens (it is rounded), or batch: constant-positions",
            )
    return [int(batch) for batch in batches]


def _amounts(geometries: Sequence[_Geometry], batches: Sequence[int], options: StageOptions) -> list[Fraction]:
    """Tokens of each stage, before rounding to steps.

    A stage with a compute share r_i takes r_i·C units of compute, with C the run's whole compute (a unit is one position); one with a
    step share takes s_i·S steps. Writing u_i for units per token (1/K_i, or 1/tokens per step), F for the stages of known size and R
    for the stage that takes the rest of N tokens, C = Σ_F u·tokens + Σ_i r_i·C + u_R·(N - Σ_F tokens - Σ_i r_i·C/u_i) gives C.
    """
    total = None if options.train_tokens is None else Fraction(options.train_tokens)
    kinds: list[str | None] = []
    for number, geometry in enumerate(geometries, start=1):
        given = [kind for kind in AMOUNTS if getattr(geometry.request, kind) is not None]
        if len(given) > 1:
            raise ConfigError(f"stages: entry {number} gives {' and '.join(given)}", f"one of {', '.join(AMOUNTS)}", "keep one")
        kinds.append(given[0] if given else None)
        value = getattr(geometry.request, given[0]) if given else 1
        if not value > 0 or (given and given[0].endswith("share") and not value <= 1):
            raise ConfigError(f"stages: entry {number}: {given[0]} is {value}", "amounts above zero, shares up to 1")
    if kinds.count(None) > 1:
        raise ConfigError("stages: more than one stage without an amount", "one stage may take the rest", "give the others an amount")
    if total is None and any(kind not in ("tokens", "steps") for kind in kinds):
        raise ConfigError("--train-tokens is missing", "a number of tokens, as shares and a rest need it", "--train-tokens 10B")
    relative = {kind for kind in kinds if kind in ("compute_share", "step_share")}
    if len(relative) > 1:
        raise ConfigError("stages: compute_share beside step_share", "one of the two in a list", "use one kind")

    steps_tokens = [batch * geometry.sample_tokens for batch, geometry in zip(batches, geometries, strict=True)]
    units = [
        Fraction(1, step if "step_share" in relative else geometry.input_patch_size)
        for step, geometry in zip(steps_tokens, geometries, strict=True)
    ]
    amounts: list[Fraction | None] = []
    for geometry, kind, step in zip(geometries, kinds, steps_tokens, strict=True):
        request = geometry.request
        if kind == "tokens":
            amounts.append(Fraction(cast("int", request.tokens)))
        elif kind == "steps":
            amounts.append(Fraction(cast("int", request.steps) * step))
        elif kind == "token_share":
            amounts.append(Fraction(cast("float", request.token_share)) * cast("Fraction", total))
        else:
            amounts.append(None)
    fixed = sum((amount for amount in amounts if amount is not None), Fraction(0))
    if relative or None in kinds:
        assert total is not None
        rest = kinds.index(None) if None in kinds else None
        shares = {
            index: Fraction(getattr(geometry.request, cast("str", kind)))
            for index, (geometry, kind) in enumerate(zip(geometries, kinds, strict=True))
            if kind in relative
        }
        if rest is not None and sum(shares.values()) >= 1:
            raise ConfigError(
                f"stages: shares of {float(sum(shares.values())):g} in all leave nothing for entry {rest + 1}",
                "shares below 1 in all beside a stage without an amount",
                "lower a share, or give every stage one",
            )
        fixed_units = sum((a * u for a, u in zip(amounts, units, strict=True) if a is not None), Fraction(0))
        tokens_per_unit = sum((share / units[index] for index, share in shares.items()), Fraction(0))
        if rest is None:
            whole = (total - fixed) / tokens_per_unit
        else:
            whole = (fixed_units + (total - fixed) * units[rest]) / (1 - sum(shares.values()) + tokens_per_unit * units[rest])
        for index, share in shares.items():
            amounts[index] = share * whole / units[index]
        if rest is not None:
            amounts[rest] = total - sum((amount for amount in amounts if amount is not None), Fraction(0))
    result = [cast("Fraction", amount) for amount in amounts]
    if min(result) <= 0:
        raise ConfigError(
            f"the stages take {format_count(float(sum(a for a in result if a > 0)))} of {format_count(float(total or 0))} training tokens",
            "amounts that leave something to every stage",
            "raise --train-tokens or lower the shares",
        )
    if relative:
        whole = sum((a * u for a, u in zip(result, units, strict=True)), Fraction(0))
        for index, share in shares.items():
            found = result[index] * units[index] / whole
            if abs(found - share) > 0.01:
                raise ConfigError(
                    f"stages: entry {index + 1} asks for {kinds[index]} {float(share):g}, and would get {float(found):.3g}",
                    "shares that make up the whole run, or one stage without an amount that takes the rest",
                    "leave one stage's amount out",
                )
    return result


def build_plan(
    options: StageOptions, schedule: ScheduleOptions, data_parallel_size: int, decay_fraction: float = PUBLISHED_DECAY_FRACTION
) -> StagePlan:
    """Resolves stage options to a plan.

    Args:
        options: what to read.
        schedule: learning rates, where a stage does not give its own.
        data_parallel_size: ranks that share a global batch.
        decay_fraction: share of a schedule's steps over which WSD decays where neither a share nor tokens are given.

    Raises:
        ConfigError: anything that cannot be planned; the message names the flag or the stage.
    """
    specs = stage_specs(options)
    if options.stages is None:
        # Flags win over what a recipe sets.
        styles = [schedule.lr_decay_style or spec.lr_decay_style for spec in specs]
        specs = tuple(
            dataclasses.replace(spec, batch=options.batch or spec.batch, lr_decay_style=style)
            for spec, style in zip(specs, styles, strict=True)
        )
    geometries = [_geometry(spec, options) for spec in specs]
    batches = _global_batches(geometries, options, data_parallel_size)
    amounts = _amounts(geometries, batches, options)
    block = math.lcm(*(geometry.sample_tokens for geometry in geometries))
    if options.block_tokens is not None:
        if options.block_tokens % block:
            raise ConfigError(
                f"--block-tokens {options.block_tokens}: samples of "
                f"{', '.join(str(g.sample_tokens) for g in geometries)} tokens (T·K) do not divide it",
                f"multiples of {block}",
                "leave --block-tokens out, or change --seq-length or the patch sizes",
            )
        block = options.block_tokens
    stages: list[Stage] = []
    running: StageSpec | None = None
    for index, (geometry, batch, tokens) in enumerate(zip(geometries, batches, amounts, strict=True)):
        per_step = batch * geometry.sample_tokens
        unit = block // math.gcd(block, per_step) if index < len(geometries) - 1 else 1
        steps = max(1, round(tokens / (per_step * unit))) * unit
        if geometry.request.lr_policy in (None, "restart"):
            running = geometry.request
        stages.append(_stage(geometry, batch, steps, options, schedule, running))
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        stages = [dataclasses.replace(stage, name=f"{number}-{stage.name}") for number, stage in enumerate(stages, start=1)]
    return StagePlan(_with_schedules(stages, schedule, decay_fraction), block)


def _stage(
    geometry: _Geometry, batch: int, steps: int, options: StageOptions, schedule: ScheduleOptions, running: StageSpec | None
) -> Stage:
    """Returns a stage of the plan; `running` began the learning-rate schedule that runs in it (None: no schedule runs yet)."""
    request = geometry.request
    labels = 1 if request.side == "input" else request.patch_size
    kind: str | tuple[float, ...] = request.position_weights or options.position_weights
    if isinstance(kind, str) and "," in kind:
        try:
            kind = tuple(float(weight) for weight in kind.split(","))
        except ValueError:
            raise ConfigError(f"--position-weights {kind}", f"{', '.join(POSITION_WEIGHTS)}, or numbers with commas between them") from None
    if labels == 1 and not isinstance(kind, str) and request.position_weights is None:
        kind = "uniform"
    anneal = request.anneal_share if request.anneal_share is not None else 0.0
    if not 0.0 <= anneal <= 1.0:
        raise ConfigError(f"anneal_share {anneal}", "a share from 0 to 1")
    policy: LrPolicy = request.lr_policy or "restart"
    if running is None:
        raise ConfigError(f"the first stage has lr_policy: {policy}", "restart, as no schedule is running yet", "remove it")
    if policy != "restart":
        # A stage may repeat what its running schedule has.
        idle = [
            name
            for name in SCHEDULE_KEYS
            if getattr(request, name) not in (None, getattr(running, name)) and (policy, name) != ("rewarm", "lr_warmup_tokens")
        ]
        if idle:
            raise ConfigError(
                f"a stage with lr_policy: {policy} gives {idle[0]}, which would have no effect",
                "schedules of their own for stages with lr_policy: restart",
                f"remove {idle[0]}, or let the stage restart",
            )
    warmup = request.lr_warmup_tokens if request.lr_warmup_tokens is not None else schedule.lr_warmup_tokens
    return Stage(
        name=request.name or ("token" if request.patch_size == 1 else f"patch-{request.patch_size}"),
        patch_size=request.patch_size,
        positions=geometry.positions,
        micro_batch_size=geometry.micro_batch_size,
        global_batch_size=batch,
        steps=steps,
        side=request.side,
        position_weights=position_weights(kind, labels),
        anneal_share=anneal,
        lr=_lr_shape(request, schedule),
        lr_policy=policy,
        rewarm_tokens=warmup if policy == "rewarm" else 0,
        optimizer=request.optimizer or ("reset" if policy == "restart" else "keep"),
        blend=parse_blend(request.data_path, "stages: data_path") if request.data_path else None,
    )


def _lr_shape(request: StageSpec, schedule: ScheduleOptions) -> LrShape:
    def own(mine: Any, common: Any) -> Any:
        return common if mine is None else mine

    return LrShape(
        lr=own(request.lr, schedule.lr),
        min_lr=own(request.min_lr, schedule.min_lr),
        warmup_tokens=own(request.lr_warmup_tokens, schedule.lr_warmup_tokens),
        style=own(request.lr_decay_style, schedule.lr_decay_style or "cosine"),
        decay_tokens=own(request.lr_decay_tokens, schedule.lr_decay_tokens),
        wsd_decay_tokens=own(request.lr_wsd_decay_tokens, schedule.lr_wsd_decay_tokens or 0),
        wsd_decay_style=own(request.lr_wsd_decay_style, schedule.lr_wsd_decay_style),
    )


def _with_schedules(stages: Sequence[Stage], schedule: ScheduleOptions, decay_fraction: float) -> tuple[Stage, ...]:
    """Returns the stages with what depends on the length of a schedule: the warm-up given as a share, the length of WSD's decay."""
    result = []
    for index, stage in enumerate(stages):
        shape = stage.lr
        if stage.lr_policy == "restart":
            following = [other.lr_policy != "restart" for other in stages[index + 1 :]]
            end = index + 1 + (following.index(False) if False in following else len(following))
            covered = stages[index:end]
            tokens = sum(other.tokens for other in covered)
            if schedule.lr_warmup_fraction is not None and shape.warmup_tokens == 0:
                if not 0.0 <= schedule.lr_warmup_fraction < 1.0:
                    raise ConfigError(f"--lr-warmup-fraction {schedule.lr_warmup_fraction}", "a share from 0 to below 1")
                shape = dataclasses.replace(shape, warmup_tokens=round(tokens * schedule.lr_warmup_fraction))
            if shape.style == "WSD" and shape.wsd_decay_tokens == 0:
                share = decay_fraction if schedule.lr_wsd_decay_fraction is None else schedule.lr_wsd_decay_fraction
                shape = dataclasses.replace(shape, wsd_decay_tokens=_tokens_of_last_steps(covered, share))
            _check_lr(stage, shape, tokens)
        rewarm = stage.rewarm_tokens
        if stage.lr_policy == "rewarm" and rewarm == 0:
            rewarm = round(stage.tokens * (schedule.lr_warmup_fraction or 0.0))
            if rewarm == 0:
                raise ConfigError(
                    f"stage {stage.name!r} has lr_policy: rewarm and no warm-up",
                    "lr_warmup_tokens in the stage, --lr-warmup-tokens, or --lr-warmup-fraction (of the stage's tokens)",
                    "give one of them, or take lr_policy: continue",
                )
        result.append(dataclasses.replace(stage, lr=shape, rewarm_tokens=rewarm))
    return tuple(result)


def _tokens_of_last_steps(stages: Sequence[Stage], share: float) -> int:
    """Tokens of the last share of the steps of stages that follow each other."""
    # The share as it is written, as 0.1 of 30 steps in floating point would be more than three.
    left, tokens = math.ceil(sum(stage.steps for stage in stages) * Fraction(str(share))), 0
    for stage in reversed(stages):
        taken = min(left, stage.steps)
        tokens += taken * stage.tokens_per_step
        left -= taken
    return tokens


def _check_lr(stage: Stage, shape: LrShape, tokens: int) -> None:
    if not (shape.lr > 0.0 and math.isfinite(shape.lr)) or not 0.0 <= shape.min_lr <= shape.lr:
        raise ConfigError(
            f"stage {stage.name!r}: lr {shape.lr}, min_lr {shape.min_lr}", "lr above 0 and min_lr from 0 to lr", "check --lr and --min-lr"
        )
    if shape.warmup_tokens > tokens:
        raise ConfigError(
            f"stage {stage.name!r}: a warm-up of {format_count(shape.warmup_tokens)} tokens in a schedule of {format_count(tokens)}",
            "a warm-up shorter than the schedule",
            "lower --lr-warmup-tokens or raise --train-tokens",
        )
    if shape.style == "inverse-square-root" and shape.warmup_tokens == 0:
        raise ConfigError(
            f"stage {stage.name!r}: lr_decay_style inverse-square-root without a warm-up: the rate is lr · sqrt(warm-up / tokens)",
            "a warm-up above 0",
            "give --lr-warmup-tokens or --lr-warmup-fraction",
        )
    decays = shape.style not in ("constant", "inverse-square-root")
    if decays and shape.decay_tokens is not None and shape.decay_tokens <= shape.warmup_tokens:
        raise ConfigError(
            f"stage {stage.name!r}: a decay that ends after {format_count(shape.decay_tokens)} tokens behind a warm-up of "
            f"{format_count(shape.warmup_tokens)}",
            "lr_decay_tokens above the warm-up: they are counted from the schedule's start",
            "raise --lr-decay-tokens, or leave it out for the schedule's end",
        )
    if shape.wsd_decay_tokens > tokens:
        raise ConfigError(
            f"stage {stage.name!r}: a final decay of {format_count(shape.wsd_decay_tokens)} tokens in a schedule of {format_count(tokens)}",
            "a decay shorter than the schedule",
            "lower --lr-wsd-decay-tokens",
        )
