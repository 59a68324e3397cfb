"""Plans from recipes or lists of stages, and their learning rates, for loops that are not this program's.

In: numbers and names, those of the command line's flags. Out: a `StagePlan`; the learning rate at any number of tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_patch.errors import ConfigError
from megatron_patch.stages import LrStyle, StagePlan
from megatron_patch.training.lr_schedule import LrSchedule, build_lr_schedule


def build_plan(
    recipe: str | None = None,
    *,
    train_tokens: int | None = None,
    seq_length: int,
    global_batch_size: int,
    micro_batch_size: int | None = None,
    gradient_accumulation: int | None = None,
    world_size: int = 1,
    patch_size: int | None = None,
    patch_fraction: float | None = None,
    patch_compute_share: float | None = None,
    stages: Sequence[Mapping[str, Any]] | None = None,
    position_weights: str = "uniform",
    lr: float = 3e-4,
    min_lr: float = 0.0,
    lr_warmup_tokens: int = 0,
    lr_decay_style: LrStyle | None = None,
) -> StagePlan:
    """Returns the plan of a run: patches first, single tokens last.

    Args:
        recipe: "patch-train" (arXiv 2407.12665), "token-superposition" (arXiv 2605.06546) or "token-level"; None: patch-train where
            `patch_size` is above 1, else token-level, or what `stages` lists.
        train_tokens: tokens of the run; None only where every entry of `stages` gives its tokens or steps.
        seq_length: positions of a sample; a sample at patch size K has K times as many tokens.
        global_batch_size: samples of one optimizer step at K = 1, over all ranks. At K, patch-train has K times fewer, as many tokens.
        micro_batch_size: samples of one forward pass of a rank, in every stage; by default 1.
        gradient_accumulation: instead, micro-batches of a step, the same in every stage, for trainers that cannot change it.
        world_size: ranks that read different samples.
        patch_size: K of the recipe's patch stage.
        patch_fraction: share of the tokens that is read as patches, between 0 and 1; by default 2/3 for patch-train.
        patch_compute_share: instead, share of the compute; by default 0.3 for token-superposition.
        stages: instead of a recipe, one mapping for each stage with the keys of the `stages:` list of a configuration file, such as
            `{"patch_size": 4, "token_share": 0.5, "optimizer": "keep"}`.
        position_weights: "uniform", "power", "exponential", "first", or K numbers with commas between them.
        lr: highest learning rate.
        min_lr: learning rate at the end of the decay.
        lr_warmup_tokens: tokens of the linear warm-up.
        lr_decay_style: "constant", "linear", "cosine", "inverse-square-root" or "WSD"; None: that of the recipe.

    Returns:
        The plan. `plan.stages` has the stages, `plan.progress(step)` says where a step belongs, `plan.cost()` is the compute relative to
        token-level training on the same tokens.

    Raises:
        ConfigError: the numbers make no plan; the message names flags, which are these arguments with dashes.

    Examples:
        >>> plan = build_plan("patch-train", patch_size=4, train_tokens=9600, seq_length=16, global_batch_size=8)
        >>> [(stage.name, stage.patch_size, stage.steps, stage.global_batch_size) for stage in plan.stages]
        [('patch', 4, 50, 2), ('token', 1, 25, 8)]
        >>> plan.cost()
        0.5
    """
    # tyro, which these modules import for the command line, is not needed to use the operators.
    from megatron_patch.config.options import ScheduleOptions, StageOptions
    from megatron_patch.config.plan_builder import build_plan as build

    if micro_batch_size is not None and gradient_accumulation is not None:
        raise ConfigError(
            f"micro_batch_size {micro_batch_size} together with gradient_accumulation {gradient_accumulation}",
            "one of them",
            "remove micro_batch_size for a trainer with a constant number of micro-batches, else gradient_accumulation",
        )
    numbers = {"seq_length": seq_length, "global_batch_size": global_batch_size, "world_size": world_size}
    numbers |= {"micro_batch_size": 1 if micro_batch_size is None else micro_batch_size}
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}", "whole numbers from 1", f"raise {name}")
    try:
        listed = None if stages is None else json.dumps([dict(stage) for stage in stages])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"stages: {error}", "a mapping for each stage, of texts, numbers and lists", "correct the list") from error
    options = StageOptions(
        recipe=recipe,
        patch_size=patch_size,
        patch_fraction=patch_fraction,
        patch_compute_share=patch_compute_share,
        stages=listed,
        train_tokens=train_tokens,
        seq_length=seq_length,
        micro_batch_size=numbers["micro_batch_size"],
        global_batch_size=global_batch_size,
        position_weights=position_weights,
    )
    schedule = ScheduleOptions(lr=lr, min_lr=min_lr, lr_warmup_tokens=lr_warmup_tokens, lr_decay_style=lr_decay_style)
    plan = build(options, schedule, world_size)
    return plan if gradient_accumulation is None else _accumulating(plan, gradient_accumulation, world_size)


def _accumulating(plan: StagePlan, micro_batches: int, world_size: int) -> StagePlan:
    """Returns the plan with micro-batches of such sizes that each rank has this number of them in every step."""
    for stage in plan.stages:
        if micro_batches < 1 or stage.global_batch_size % (micro_batches * world_size):
            raise ConfigError(
                f"gradient_accumulation {micro_batches} on {world_size} ranks: stage {stage.name!r} has steps of {stage.global_batch_size} "
                f"samples (patch size {stage.patch_size})",
                f"in each stage a multiple of {max(1, micro_batches) * world_size} samples",
                "raise global_batch_size, lower gradient_accumulation, or use a recipe with a constant number of positions",
            )
    sized = (dataclasses.replace(stage, micro_batch_size=stage.global_batch_size // (micro_batches * world_size)) for stage in plan.stages)
    return StagePlan(tuple(sized), plan.block_tokens)


@functools.lru_cache(maxsize=16)
def _schedule(plan: StagePlan) -> LrSchedule:
    return build_lr_schedule(plan)


def learning_rate(plan: StagePlan, tokens: int) -> float:
    """Returns the learning rate of a step, as a function of tokens over all stages.

    Args:
        plan: the plan.
        tokens: tokens that the run has read after the step, so that the first step is not wasted at a rate of 0:
            `plan.consumed_tokens(plan.progress(step + 1))` for step number `step` from 0.

    Returns:
        The rate; after the last token that at the end.

    Examples:
        >>> plan = build_plan(patch_size=2, train_tokens=4096, patch_fraction=0.5, seq_length=16, global_batch_size=4, lr=1.0)
        >>> [round(learning_rate(plan, tokens), 2) for tokens in (64, 1024, 2048, 2112, 4096)]  # the second stage restarts
        [1.0, 0.5, 0.0, 1.0, 0.0]
    """
    return _schedule(plan).at(tokens)
