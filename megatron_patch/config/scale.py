"""Defaults and advice by scale: patch size and final decay where none is given, and a note where patches are not expected to help.

In: options, a plan, the number of the model's parameters. Out: defaults, and notes for the console. docs/replication.md has the
measurements.
"""

from __future__ import annotations

from megatron_patch.config.options import Options, StageOptions
from megatron_patch.config.plan_builder import PUBLISHED_DECAY_FRACTION
from megatron_patch.config.stage_spec import recipe_name, stage_specs
from megatron_patch.stages import StagePlan
from megatron_patch.utils.units import plural

SMALL_MODEL = 100_000_000
"""Number of parameters below which a model counts as small."""
SHORT_RUN_STEPS = 5_000
"""Number of steps of token-level training below which a run of the same cost counts as short."""


def needs_patch_size(options: StageOptions) -> bool:
    """Returns whether the run has a recipe of patches (any but token-level) and no --patch-size."""
    return options.patch_size is None and recipe_name(options) not in (None, "token-level")


def default_patch_size(parameters: int) -> int:
    """Returns K for a recipe: 2 for small models, where it reached a lower loss than larger K (docs/replication.md), else the papers' 4."""
    return 2 if parameters < SMALL_MODEL else 4


def needs_decay_fraction(options: Options, plan: StagePlan) -> bool:
    """Returns whether any WSD schedule of the plan needs the default decay length, because no flag and no stage sets it."""
    schedule = options.schedule
    if schedule.lr_wsd_decay_tokens or schedule.lr_wsd_decay_steps or schedule.lr_wsd_decay_fraction:
        return False
    specs = stage_specs(options.stages)
    return any(
        stage.lr_policy == "restart" and stage.lr.style == "WSD" and not (spec.lr_wsd_decay_tokens or spec.lr_wsd_decay_steps)
        for spec, stage in zip(specs, plan.stages, strict=True)
    )


def default_decay_fraction(parameters: int) -> float:
    """Returns the share of the steps over which WSD decays: 0.5 for small models, where it was better (docs/replication.md), else 0.1."""
    return 0.5 if parameters < SMALL_MODEL else PUBLISHED_DECAY_FRACTION


def scale_notes(options: Options, plan: StagePlan, parameters: int) -> list[str]:
    """Returns a note where patches are not expected to help: for a short run of a small model. Empty for all other runs."""
    patches = any(stage.patch_size > 1 for stage in plan.stages)
    steps = plan.cost() * plan.tokens / plan.finest_stage.tokens_per_step
    if not patches or options.checkpoint.finetune or parameters >= SMALL_MODEL or steps >= SHORT_RUN_STEPS:
        return []
    measured = (
        f"Below {SHORT_RUN_STEPS:,} steps, small models trained with AdamW reached a lower loss with token-level training at equal cost"
    )
    other = "" if options.schedule.optimizer == "adamw" else f"; with {options.schedule.optimizer} that may differ"
    return [
        f"this run costs as much as {plural(round(steps), 'step')} of token-level training. {measured}{other} (docs/replication.md)",
    ]
