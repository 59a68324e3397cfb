"""The arms of a study: ways to spend the same compute, each as flags of pretrain_gpt_patch.py.

In: a budget B in cost tokens, the tokens that token-level training reads for the compute that every arm gets. Out: `Arm` records. An arm
that reads patches reads more than B tokens, so many that it costs as much. Half cost means: half of what token level costs on 2·B tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_patch.errors import ConfigError


@dataclass(frozen=True)
class Arm:
    """One way to spend the budget.

    Args:
        name: of its folder and in tables.
        what: a sentence for people.
        tokens: read per cost token of the budget; 1 for token level.
        flags: of pretrain_gpt_patch.py, without the number of tokens.
        baseline: the arm at equal cost and on the same kind of learning-rate schedule that it is compared with; None for a baseline.
        cost: budgets that it spends; 1 for all but the full-cost reference.
    """

    name: str
    what: str
    tokens: float
    flags: tuple[str, ...]
    baseline: str | None
    cost: float = 1.0

    def train_tokens(self, budget: int) -> int:
        """Tokens to read for a budget of cost tokens."""
        return round(budget * self.cost * self.tokens)


def tokens_for_share(patch_size: int, token_share: Fraction) -> Fraction:
    """Tokens read per cost token with a share λ of the tokens in patches of K: 1 / (λ/K + 1 - λ)."""
    return 1 / (token_share / patch_size + 1 - token_share)


def tokens_for_compute(parts: Sequence[tuple[int, Fraction]]) -> Fraction:
    """Tokens read per cost token where each (K, share of the compute) stage reads K tokens a position and the rest is token level."""
    return sum((share * patch_size for patch_size, share in parts), Fraction(0)) + 1 - sum(share for _, share in parts)


TOKEN_LEVEL, WSD = ("--recipe", "token-level"), ("--lr-decay-style", "WSD")
TENTH, HALF = ("--lr-wsd-decay-fraction", "0.1"), ("--lr-wsd-decay-fraction", "0.5")
"""How long the final decay of warm-up–stable–decay is: as the papers have it, and long."""


def _stages(*stages: dict[str, Any]) -> tuple[str, str]:
    return "--stages", json.dumps(stages, separators=(",", ":"))


def _token_level(name: str, what: str, *flags: str) -> Arm:
    """Token level with a knob turned, to see that the baseline is not a weak one."""
    return Arm(name, what, 1.0, (*TOKEN_LEVEL, *flags), baseline="token")


def _patch_train(name: str, what: str, patch_size: int, share: Fraction, **token_stage: Any) -> Arm:
    """Patch-train's two stages; `token_stage` changes the second."""
    patches = {"name": "patch", "patch_size": patch_size, "token_share": float(share)}
    return Arm(
        name,
        what,
        float(tokens_for_share(patch_size, share)),
        _stages(patches, {"name": "token", "patch_size": 1, **token_stage}),
        baseline="token",
    )


def _superposition(
    name: str, what: str, patch_size: int, share: Fraction, *more: str, decay: tuple[str, ...] = TENTH, baseline: str = "token-wsd"
) -> Arm:
    """Token superposition's recipe."""
    sizes = ("--patch-size", str(patch_size), "--patch-compute-share", str(float(share)))
    flags = ("--recipe", "token-superposition", *sizes, *decay, *more)
    return Arm(name, what, float(tokens_for_compute([(patch_size, share)])), flags, baseline)


def _one_schedule(name: str, what: str, parts: Sequence[tuple[int, Fraction]], **token_stage: Any) -> Arm:
    """Stages of (K, share of the compute) and then tokens, all on one warm-up–stable–decay schedule and with the same positions a step.

    `token_stage` changes what the last switch does; without it this is token superposition's recipe for any list of patch sizes.
    """
    stages = [
        {"name": f"patch-{patch_size}", "patch_size": patch_size, "compute_share": float(share), "lr_policy": "continue"}
        for patch_size, share in parts
    ]
    stages[0]["lr_policy"] = "restart"
    stages.append({"name": "token", "patch_size": 1, "lr_policy": "continue", **token_stage})
    words = _stages(*({**stage, "batch": "constant-positions"} for stage in stages))
    return Arm(name, what, float(tokens_for_compute(parts)), (*words, *WSD, *TENTH), baseline="token-wsd")


def all_arms(lr: float, batch_tokens: int) -> tuple[Arm, ...]:
    """Every arm, the main ones first.

    Args:
        lr: the study's highest learning rate, of which some arms take a multiple.
        batch_tokens: of a step at token level, of which an arm takes half.
    """
    two_thirds, three_tenths = Fraction(2, 3), Fraction(3, 10)
    return (
        Arm("token", "token level, all of the budget; cosine", 1.0, TOKEN_LEVEL, None),
        Arm("token-wsd", "token on a warm-up–stable–decay schedule", 1.0, (*TOKEN_LEVEL, *WSD, *TENTH), None),
        _patch_train("patch-k4", "patch-train: patches of 4 over 2/3 of the tokens, then tokens; lr and optimizer afresh", 4, two_thirds),
        _patch_train("patch-k2", "patch-k4 with patches of 2", 2, two_thirds),
        _superposition("superposition-k3", "token superposition: patches of 3 for 0.3 of the compute; optimizer kept", 3, three_tenths),
        _one_schedule(
            "stairs-4-2-1",
            "patches of 4, then of 2 (0.15 of the compute each), then tokens; one schedule, optimizer kept",
            [(4, Fraction(15, 100)), (2, Fraction(15, 100))],
        ),
        Arm("token-full", "token level at twice the budget: what full cost reaches", 1.0, TOKEN_LEVEL, None, cost=2.0),
        _token_level("token-lr-half", "token, half the learning rate", "--lr", str(lr / 2)),
        _token_level("token-lr-double", "token, twice the learning rate", "--lr", str(lr * 2)),
        _token_level("token-batch-half", "token, steps of half the tokens, twice as many", "--global-batch-tokens", str(batch_tokens // 2)),
        _superposition("superposition-k2", "token superposition with patches of 2", 2, three_tenths),
        _superposition(
            "superposition-k2-cosine",
            "superposition-k2 on one cosine",
            2,
            three_tenths,
            decay=("--lr-decay-style", "cosine"),
            baseline="token",
        ),
        Arm(
            "token-wsd-long",
            "token-wsd, its decay over half of the budget",
            1.0,
            (*TOKEN_LEVEL, *WSD, *HALF),
            baseline="token-wsd",
        ),
        _superposition(
            "superposition-k2-long",
            "superposition-k2, its decay over half of the budget",
            2,
            three_tenths,
            decay=HALF,
            baseline="token-wsd-long",
        ),
        _superposition("superposition-k2-r10", "superposition-k2 with patches for 0.1 of the compute", 2, Fraction(1, 10)),
        _superposition("superposition-k8", "token superposition with patches of 8", 8, three_tenths),
        _superposition(
            "superposition-k8-power", "superposition-k8, labels weighted 1/(k+1)", 8, three_tenths, "--position-weights", "power"
        ),
        _superposition("superposition-k3-r10", "superposition-k3 with patches for 0.1 of the compute", 3, Fraction(1, 10)),
        _superposition("superposition-k3-r20", "superposition-k3 with patches for 0.2 of the compute", 3, Fraction(1, 5)),
        _superposition("superposition-k8-r10", "superposition-k8 with patches for 0.1 of the compute", 8, Fraction(1, 10)),
        _superposition(
            "superposition-k3-soft",
            "superposition-k3, a soft switch over the last third of the patches",
            3,
            three_tenths,
            "--anneal-share",
            "0.333",
        ),
        _one_schedule(
            "superposition-k3-reset", "superposition-k3, optimizer made new at the switch", [(3, three_tenths)], optimizer="reset"
        ),
        _one_schedule(
            "superposition-k3-rewarm",
            "superposition-k3, the learning rate warmed up again after the switch",
            [(3, three_tenths)],
            lr_policy="rewarm",
        ),
        _superposition("superposition-k2-r50", "superposition-k2 with patches for 0.5 of the compute", 2, Fraction(1, 2)),
        _patch_train("patch-k2-keep", "patch-k2, optimizer kept at the switch", 2, two_thirds, optimizer="keep"),
        _patch_train("patch-k4-keep", "patch-k4, optimizer kept at the switch", 4, two_thirds, optimizer="keep"),
        _patch_train("patch-k4-lr-half", "patch-k4, half the learning rate after the switch", 4, two_thirds, lr=lr / 2),
        _patch_train("patch-k4-lr-double", "patch-k4, twice the learning rate after the switch", 4, two_thirds, lr=lr * 2),
        _patch_train("patch-k4-l20", "patch-k4 over 0.2 of the tokens", 4, Fraction(1, 5)),
        _patch_train("patch-k4-l40", "patch-k4 over 0.4 of the tokens", 4, Fraction(2, 5)),
    )


def select_arms(names: Sequence[str], lr: float, batch_tokens: int) -> tuple[Arm, ...]:
    """Arms by their names, with the baselines that they need, in the study's order.

    Args:
        names: none of them stands for all arms.
        lr: as `all_arms`.
        batch_tokens: as `all_arms`.

    Raises:
        ConfigError: a name that is none.
    """
    arms = {arm.name: arm for arm in all_arms(lr, batch_tokens)}
    unknown = [name for name in names if name not in arms]
    if unknown:
        raise ConfigError(f"--arms {' '.join(unknown)}", ", ".join(arms), "take names from this list")
    wanted = set(names) | {baseline for name in names if (baseline := arms[name].baseline)}
    return tuple(arm for arm in arms.values() if not names or arm.name in wanted)
