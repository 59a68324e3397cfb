"""What the options of experts mean for stages and ranks. In: options, the plan. Out: `ExpertBalance`, or an error with all problems."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from megatron_patch.config.options import EngineOptions, ExpertOptions
from megatron_patch.config.problems import one_error, problem_of, problems_of
from megatron_patch.config.stage_spec import BALANCE_KEYS, StageSpec
from megatron_patch.errors import ConfigError
from megatron_patch.model.shape import ModelShape
from megatron_patch.model.sharding import check_sharding
from megatron_patch.stages import NO_BALANCE, ExpertBalance, StagePlan
from megatron_patch.utils.units import plural


def balance_of(options: ExpertOptions) -> ExpertBalance:
    """Returns how the options balance the load of experts, in stages that give no coefficients of their own."""
    if options.num_experts is None:
        return NO_BALANCE
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
        if spec.moe_aux_loss_coeff and options.num_experts is not None and options.moe_router_load_balancing_type == "none":
            found.append(
                ConfigError(
                    f"stage {stage.name!r}: moe_aux_loss_coeff {spec.moe_aux_loss_coeff} with --moe-router-load-balancing-type none",
                    "--moe-router-load-balancing-type global_aux_loss with a coefficient",
                    "change the type, with --moe-aux-loss-coeff 0 for the other stages, or remove the coefficient",
                )
            )
    if found:
        raise one_error([problem_of(error) for error in found])


def check_expert_parallel(options: EngineOptions, shape: ModelShape, boundaries: Sequence[int], data_parallel_size: int) -> None:
    """Checks that data-parallel ranks can divide the experts.

    Args:
        options: options of the layout.
        shape: the model's shape.
        boundaries: first layer of each pipeline rank, and the number of layers.
        data_parallel_size: number of ranks that share a global batch.

    Raises:
        ConfigError: they cannot; the message has all reasons.
    """
    size = options.expert_model_parallel_size
    if size == 1:
        return
    flag, found = f"--expert-model-parallel-size {size}", list[ConfigError]()
    if shape.experts is None:
        raise ConfigError(
            f"{flag} in a model without experts", "--num-experts with expert parallelism", f"give --num-experts, or remove {flag}"
        )
    if data_parallel_size % size:
        ranks = plural(data_parallel_size, "data-parallel rank")
        found.append(ConfigError(f"{flag} with {ranks}", f"a divisor of {data_parallel_size}", "change the size or the number of ranks"))
    found += [problem.error for problem in problems_of(lambda: check_sharding(shape, options.tensor_model_parallel_size, size))]
    parts = enumerate(itertools.pairwise(boundaries))
    without = [rank for rank, (first, last) in parts if not shape.expert_layers(range(first, last))]
    if without:
        ranks = f"pipeline rank{'s' if len(without) > 1 else ''} {', '.join(map(str, without))}"
        found.append(
            ConfigError(
                f"{flag} with {ranks} of blocks without experts or no blocks, which DeepSpeed would wait for",
                "at least one block with experts on each pipeline rank",
                "change --moe-layer-freq, --pipeline-model-parallel-size or --pipeline-balance, or use --expert-model-parallel-size 1",
            )
        )
    if found:
        raise one_error([problem_of(error) for error in found])
