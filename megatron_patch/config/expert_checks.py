"""Checks of the options of experts, before a model exists. In: options. Out: nothing, or an error that names flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megatron_patch.config.layer_patterns import dense_blocks
from megatron_patch.config.option_types import flag_of
from megatron_patch.config.options import ExpertOptions
from megatron_patch.config.problems import one_error, problems_of
from megatron_patch.errors import ConfigError


def check_experts(options: ExpertOptions, num_layers: int, origins: Mapping[str, str]) -> None:
    """Checks options of experts against each other.

    Args:
        options: the options.
        num_layers: blocks of the model.
        origins: name -> "flag" or the path of the file, for the options that were given.

    Raises:
        ConfigError: options of experts without experts, a bias that would not move, a router that would not learn, or a
            wrong pattern; the message has all.
    """
    if options.num_experts is None:
        given = [flag_of(field.name) for field in dataclasses.fields(options) if field.name in origins]
        if given:
            raise ConfigError(
                f"{', '.join(given)} without --num-experts",
                "--num-experts with the number of experts of a block",
                f"give --num-experts, or remove {'them' if len(given) > 1 else given[0]}",
            )
        return

    def bias() -> None:
        if "moe_router_bias_update_rate" in origins and not options.moe_router_enable_expert_bias:
            raise ConfigError(
                "--moe-router-bias-update-rate without --moe-router-enable-expert-bias",
                "both of them, or neither",
                "give --moe-router-enable-expert-bias, or remove the rate",
            )

    def auxiliary_loss() -> None:
        if "moe_aux_loss_coeff" in origins and options.moe_aux_loss_coeff > 0 and options.moe_router_load_balancing_type == "none":
            raise ConfigError(
                f"--moe-aux-loss-coeff {options.moe_aux_loss_coeff} with --moe-router-load-balancing-type none",
                "--moe-router-load-balancing-type global_aux_loss with a coefficient",
                "change the type, or remove the coefficient",
            )

    def scores() -> None:
        if options.moe_router_pre_softmax and options.moe_router_score_function == "sigmoid":
            raise ConfigError(
                "--moe-router-pre-softmax with --moe-router-score-function sigmoid",
                "--moe-router-pre-softmax with softmax",
                "remove one of the two",
            )

    def one_choice() -> None:
        normalized = not options.moe_router_pre_softmax
        if options.moe_router_topk == 1 and normalized:
            raise ConfigError(
                "--moe-router-topk 1 with weights that are divided by their sum: the weight of the only expert is always 1, so the router "
                "would not learn from the loss",
                "--moe-router-topk from 2, or --moe-router-pre-softmax",
                "give --moe-router-pre-softmax with softmax, or raise --moe-router-topk",
            )

    if problems := problems_of(bias, auxiliary_loss, scores, one_choice, lambda: dense_blocks(options, num_layers)):
        raise one_error(problems)
