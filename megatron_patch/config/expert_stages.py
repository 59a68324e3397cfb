"""What the options of experts mean for the stages. In: options, the plan. Out: `ExpertBalance`, or an error that names the stages."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_patch.config.options import ExpertOptions
from megatron_patch.config.problems import one_error, problem_of
from megatron_patch.config.stage_spec import BALANCE_KEYS, StageSpec
from megatron_patch.errors import ConfigError
from megatron_patch.stages import ExpertBalance, StagePlan


def balance_of(options: ExpertOptions) -> ExpertBalance:
    """Returns how the options balance the load of experts, in stages that give no coefficients of their own."""
    if options.num_experts is None:
        return ExpertBalance()
    return ExpertBalance(
        aux_loss_coeff=options.moe_aux_loss_coeff if options.moe_router_load_balancing_type == "global_aux_loss" else 0.0,
        z_loss_coeff=options.moe_z_loss_coeff,
        bias_update_rate=options.moe_router_bias_update_rate if options.moe_router_enable_expert_bias else 0.0,
    )


def check_expert_stages(options: ExpertOptions, plan: StagePlan, specs: Sequence[StageSpec]) -> None:
    """Checks that stages balance only experts that exist.

    Args:
        options: the options of experts.
        plan: the plan.
        specs: its stages as described.

    Raises:
        ConfigError: they do not; the message has all stages.
    """
    found: list[ConfigError] = []
    for stage, spec in zip(plan.stages, specs, strict=True):
        given = [key for key in BALANCE_KEYS if getattr(spec, key) is not None]
        if given and options.num_experts is None:
            found.append(
                ConfigError(
                    f"stage {stage.name!r}: {', '.join(given)} without --num-experts",
                    f"{given[0]} in a model with experts",
                    "give --num-experts, or remove it",
                )
            )
        if "moe_router_bias_update_rate" in given and options.num_experts is not None and not options.moe_router_enable_expert_bias:
            found.append(
                ConfigError(
                    f"stage {stage.name!r}: moe_router_bias_update_rate without --moe-router-enable-expert-bias",
                    "both of them, or neither",
                    "give --moe-router-enable-expert-bias, or remove the rate",
                )
            )
    if found:
        raise one_error([problem_of(error) for error in found])
