"""Turns the amounts of stages into tokens: shares of tokens, of compute or of steps, and the rest.

In: the stages as described, the tokens of a step in each. Out: the tokens of each stage, as fractions.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import cast

from megatron_patch.config.stage_spec import AMOUNTS, StageSpec
from megatron_patch.errors import ConfigError
from megatron_patch.utils.units import format_count


def stage_tokens(
    specs: Sequence[StageSpec], step_tokens: Sequence[int], input_patch_sizes: Sequence[int], train_tokens: int | None
) -> list[Fraction]:
    """Returns the tokens of each stage, before they are rounded to steps.

    Args:
        specs: the stages, with their amounts.
        step_tokens: tokens in a step of each stage.
        input_patch_sizes: tokens that each stage averages into one position.
        train_tokens: tokens of the run (--train-tokens), or None.

    Raises:
        ConfigError: the amounts contradict each other or --train-tokens, or leave nothing for a stage.
    """
    kinds = _amount_kinds(specs, train_tokens)
    total = None if train_tokens is None else Fraction(train_tokens)
    amounts: list[Fraction | None] = []
    for spec, kind, tokens in zip(specs, kinds, step_tokens, strict=True):
        if kind == "tokens":
            amounts.append(Fraction(cast("int", spec.tokens)))
        elif kind == "steps":
            amounts.append(Fraction(cast("int", spec.steps) * tokens))
        elif kind == "token_share":
            amounts.append(Fraction(cast("float", spec.token_share)) * cast("Fraction", total))
        else:
            amounts.append(None)
    # A share of compute or of steps refers to this measure of a stage's tokens.
    units = [
        Fraction(1, tokens if "step_share" in kinds else patch_size)
        for tokens, patch_size in zip(step_tokens, input_patch_sizes, strict=True)
    ]
    shares = {
        index: Fraction(getattr(spec, kind))
        for index, (spec, kind) in enumerate(zip(specs, kinds, strict=True))
        if kind in ("compute_share", "step_share")
    }
    if None in amounts:
        _fill_in(amounts, shares, units, cast("Fraction", total), kinds.index(None) if None in kinds else None)
    result = [cast("Fraction", amount) for amount in amounts]
    if min(result) <= 0:
        raise ConfigError(
            f"the stages take {format_count(float(sum(a for a in result if a > 0)))} of {format_count(float(total or 0))} training tokens",
            "amounts that leave tokens for every stage",
            "raise --train-tokens, or lower the amounts of the stages",
        )
    run_units = sum((a * u for a, u in zip(result, units, strict=True)), Fraction(0))
    for index, share in shares.items():
        found = result[index] * units[index] / run_units
        if abs(found - share) > 0.01:
            raise ConfigError(
                f"stages: entry {index + 1} has {kinds[index]} {float(share):g}, but the other amounts make it {float(found):.3g}",
                "shares that sum to 1, or one stage without an amount, which takes the rest",
                "remove the amount of one stage",
            )
    return result


def _amount_kinds(specs: Sequence[StageSpec], train_tokens: int | None) -> list[str | None]:
    """Returns how each stage gives its amount (a name in `AMOUNTS`); None for the stage that takes the rest."""
    kinds: list[str | None] = []
    for number, spec in enumerate(specs, start=1):
        given = [kind for kind in AMOUNTS if getattr(spec, kind) is not None]
        if len(given) > 1:
            raise ConfigError(f"stages: entry {number} gives {' and '.join(given)}", f"one of {', '.join(AMOUNTS)}", "keep one of them")
        kinds.append(given[0] if given else None)
        value = getattr(spec, given[0]) if given else 1
        if not value > 0 or (given and given[0].endswith("share") and not value <= 1):
            raise ConfigError(f"stages: entry {number}: {given[0]} is {value}", "amounts above 0, shares up to 1", f"correct {given[0]}")
    if kinds.count(None) > 1:
        raise ConfigError(
            "stages: more than one stage without an amount", "one stage that takes the rest", "give the other stages an amount"
        )
    if train_tokens is None and any(kind not in ("tokens", "steps") for kind in kinds):
        raise ConfigError(
            "--train-tokens is missing", "a number of tokens, which shares and the rest refer to", "give --train-tokens 10B, for example"
        )
    if "compute_share" in kinds and "step_share" in kinds:
        raise ConfigError("stages: compute_share together with step_share", "one of the two in a list", "use the same kind in all stages")
    return kinds


def _fill_in(
    amounts: list[Fraction | None], shares: dict[int, Fraction], units: Sequence[Fraction], total: Fraction, rest: int | None
) -> None:
    """Sets the amounts that are None: those of stages with a share of compute or of steps, and that of the stage that takes the rest.

    A stage with share r_i takes r_i·C units, with C the units of the run: positions for compute, steps for steps. Let u_i be the
    units per token (1/K_i, or 1/tokens per step), F the stages with a known number of tokens, and R the stage that takes the rest of N
    tokens. Then C = Σ_F u·tokens + Σ_i r_i·C + u_R·(N - Σ_F tokens - Σ_i r_i·C/u_i), which is solved for C.

    Args:
        amounts: the tokens of each stage, or None; changed in place.
        shares: stage index -> share.
        units: units per token of each stage.
        total: tokens of the run.
        rest: index of the stage that takes the rest, or None.
    """
    share_sum = sum(shares.values(), Fraction(0))
    if rest is not None and share_sum >= 1:
        raise ConfigError(
            f"stages: shares that sum to {float(share_sum):g} leave nothing for entry {rest + 1}",
            "shares that sum to less than 1, next to a stage without an amount",
            "lower a share, or give every stage an amount",
        )
    fixed = sum((amount for amount in amounts if amount is not None), Fraction(0))
    fixed_units = sum((a * u for a, u in zip(amounts, units, strict=True) if a is not None), Fraction(0))
    tokens_per_unit = sum((share / units[index] for index, share in shares.items()), Fraction(0))
    if rest is None:
        run_units = (total - fixed) / tokens_per_unit
    else:
        run_units = (fixed_units + (total - fixed) * units[rest]) / (1 - share_sum + tokens_per_unit * units[rest])
    for index, share in shares.items():
        amounts[index] = share * run_units / units[index]
    if rest is not None:
        amounts[rest] = total - sum((amount for amount in amounts if amount is not None), Fraction(0))
