"""What a run's size decides: patch size and final decay where none is given, and whether patches are expected to pay at all.

In: options, a plan, the number of a model's parameters. Out: defaults, and notes for people. What it rests on is in docs/replication.md.
"""

from __future__ import annotations

from megatron_patch.config.options import Options, StageOptions
from megatron_patch.config.plan_builder import PUBLISHED_DECAY_FRACTION
from megatron_patch.config.stage_spec import recipe_name, stage_specs
from megatron_patch.stages import StagePlan

SMALL_MODEL, SHORT_RUN_STEPS = 100_000_000, 5_000


def needs_patch_size(options: StageOptions) -> bool:
    """Returns whether the run has a recipe of patches (any but token-level) and no --patch-size."""
    return options.patch_size is None and recipe_name(options) not in (None, "token-level")


def default_patch_size(parameters: int) -> int:
    """K of a recipe for a model: 2 for small ones, at whose scale it ended before larger K (docs/replication.md), else the papers' 4."""
    return 2 if parameters < SMALL_MODEL else 4


def needs_decay_fraction(options: Options, plan: StagePlan) -> bool:
    """Whether a schedule of the plan is warm-up–stable–decay, and neither the run nor its first stage says how long the decay is."""
    if options.schedule.lr_wsd_decay_tokens or options.schedule.lr_wsd_decay_fraction:
        return False
    requests = stage_specs(options.stages)
    return any(
        stage.lr_policy == "restart" and stage.lr.style == "WSD" and not request.lr_wsd_decay_tokens
        for request, stage in zip(requests, plan.stages, strict=True)
    )


def default_decay_fraction(parameters: int) -> float:
    """Share of the steps over which WSD decays: half for small models, which ended lower so (docs/replication.md), else a tenth."""
    return 0.5 if parameters < SMALL_MODEL else PUBLISHED_DECAY_FRACTION


def scale_notes(options: Options, plan: StagePlan, parameters: int) -> list[str]:
    """Says where patches are not expected to pay: short runs of small models ended behind token level wherever both were run."""
    patches = any(stage.patch_size > 1 for stage in plan.stages)
    steps = plan.cost() * plan.tokens / plan.finest.tokens_per_step
    if not patches or options.checkpoint.finetune or parameters >= SMALL_MODEL or steps >= SHORT_RUN_STEPS:
        return []
    return [
        f"compute for {steps:,.0f} steps at token level: with fewer than {SHORT_RUN_STEPS:,}, small models ended behind token level at "
        "equal cost (docs/replication.md)"
    ]
