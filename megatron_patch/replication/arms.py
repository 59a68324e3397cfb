"""The arms of a study: ways to spend the same compute, each given as flags of pretrain_gpt_patch.py.

In: a budget of B cost tokens, which is the number of tokens that token-level training reads for the compute that every arm gets.
Out: `Arm` records. An arm that reads patches reads more than B tokens, as many as make its cost equal. Cost is reported relative to
token-level training on 2·B tokens, so an arm of equal cost has cost 0.5.
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
        name: used for the run's folder and in tables.
        description: one phrase for tables.
        tokens: tokens read per cost token of the budget; 1 for token-level training.
        flags: of the training program, without the number of tokens.
        baseline: name of the arm at equal cost that this one is compared with, on the same kind of learning-rate schedule; None for a
            baseline.
        cost: multiple of the budget that the arm spends; 1 for all but the full-cost reference.
        program: a training script of your own that registers what `flags` name; None: this program.
    """

    name: str
    description: str
    tokens: float
    flags: tuple[str, ...]
    baseline: str | None
    cost: float = 1.0
    program: str | None = None

    def train_tokens(self, budget: int) -> int:
        """Returns the number of tokens to read for a budget of cost tokens."""
        return round(budget * self.cost * self.tokens)


def tokens_for_token_share(patch_size: int, token_share: Fraction) -> Fraction:
    """Returns the tokens read per cost token when a share λ of the tokens is read in patches of K: 1 / (λ/K + 1 - λ)."""
    return 1 / (token_share / patch_size + 1 - token_share)


def tokens_for_compute_shares(stages: Sequence[tuple[int, Fraction]]) -> Fraction:
    """Returns the tokens read per cost token for stages given as (K, share of the compute); the remaining compute reads single tokens."""
    return sum((share * patch_size for patch_size, share in stages), Fraction(0)) + 1 - sum(share for _, share in stages)


TOKEN_LEVEL, WSD = ("--recipe", "token-level"), ("--lr-decay-style", "WSD")
DECAY_TENTH, DECAY_HALF = ("--lr-wsd-decay-fraction", "0.1"), ("--lr-wsd-decay-fraction", "0.5")
"""Length of the final decay of a warm-up–stable–decay schedule: the papers' tenth of the steps, and a long one of half of them."""


def _stages_flag(*stages: dict[str, Any]) -> tuple[str, str]:
    return "--stages", json.dumps(stages, separators=(",", ":"))


def _tuned_token_level(name: str, description: str, *flags: str) -> Arm:
    """Token-level training with one hyperparameter changed; shows whether the baseline is well tuned."""
    return Arm(name, description, 1.0, (*TOKEN_LEVEL, *flags), baseline="token")


def patch_train(name: str, description: str, patch_size: int, token_share: Fraction, **token_stage: Any) -> Arm:
    """Returns an arm with the two stages of Patch-Level Training (arXiv 2407.12665).

    Args:
        name: of the arm.
        description: one phrase for tables.
        patch_size: K of the first stage.
        token_share: λ, the share of the tokens that the first stage reads.
        token_stage: keys that change the second stage, such as `optimizer` or `lr`.
    """
    patch_stage = {"name": "patch", "patch_size": patch_size, "token_share": float(token_share)}
    return Arm(
        name,
        description,
        float(tokens_for_token_share(patch_size, token_share)),
        _stages_flag(patch_stage, {"name": "token", "patch_size": 1, **token_stage}),
        baseline="token",
    )


def superposition(
    name: str,
    description: str,
    patch_size: int,
    compute_share: Fraction,
    *flags: str,
    schedule: tuple[str, ...] = DECAY_TENTH,
    baseline: str = "token-wsd",
) -> Arm:
    """Returns an arm with the recipe of Token-Superposition Training (arXiv 2605.06546).

    Args:
        name: of the arm.
        description: one phrase for tables.
        patch_size: K of the first stage.
        compute_share: r, the share of the compute that the first stage takes.
        flags: further flags of the training program.
        schedule: flags of the learning-rate schedule.
        baseline: name of the token-level arm on the same schedule.
    """
    recipe = ("--recipe", "token-superposition", "--patch-size", str(patch_size), "--patch-compute-share", str(float(compute_share)))
    return Arm(
        name,
        description,
        float(tokens_for_compute_shares([(patch_size, compute_share)])),
        (*recipe, *schedule, *flags),
        baseline,
    )


def one_schedule(name: str, description: str, patch_stages: Sequence[tuple[int, Fraction]], **token_stage: Any) -> Arm:
    """Returns an arm whose stages share one warm-up–stable–decay schedule and have the same positions per step.

    Args:
        name: of the arm.
        description: one phrase for tables.
        patch_stages: (K, share of the compute) of each stage before the token stage.
        token_stage: keys that change the token stage. Without any, the arm is token superposition for a list of patch sizes.
    """
    stages = [
        {"name": f"patch-{patch_size}", "patch_size": patch_size, "compute_share": float(share), "lr_policy": "continue"}
        for patch_size, share in patch_stages
    ]
    stages[0]["lr_policy"] = "restart"
    stages.append({"name": "token", "patch_size": 1, "lr_policy": "continue", **token_stage})
    stages_flag = _stages_flag(*({**stage, "batch": "constant-positions"} for stage in stages))
    flags = (*stages_flag, *WSD, *DECAY_TENTH)
    return Arm(name, description, float(tokens_for_compute_shares(patch_stages)), flags, baseline="token-wsd")


def all_arms(lr: float, batch_tokens: int, more_arms: Sequence[Arm] = ()) -> tuple[Arm, ...]:
    """Returns every arm, the main ones first and `more_arms` last.

    Args:
        lr: the study's peak learning rate, which some arms scale.
        batch_tokens: tokens per step of token-level training, which one arm halves.
        more_arms: arms in addition to those of this file.

    Raises:
        ConfigError: two arms share a name, or a baseline does not exist.
    """
    two_thirds, three_tenths = Fraction(2, 3), Fraction(3, 10)
    arms: tuple[Arm, ...] = (
        Arm("token", "token-level training on a cosine schedule", 1.0, TOKEN_LEVEL, None),
        Arm("token-wsd", "token-level training on a warm-up–stable–decay schedule", 1.0, (*TOKEN_LEVEL, *WSD, *DECAY_TENTH), None),
        patch_train(
            "patch-k4",
            "patch-train: patches of 4 for 2/3 of the tokens, then tokens; new schedule and optimizer at the switch",
            4,
            two_thirds,
        ),
        patch_train("patch-k2", "patch-k4 with patches of 2", 2, two_thirds),
        superposition(
            "superposition-k3", "token superposition: patches of 3 for 0.3 of the compute; optimizer kept at the switch", 3, three_tenths
        ),
        one_schedule(
            "stairs-4-2-1",
            "patches of 4, then of 2 (0.15 of the compute each), then tokens; one schedule, optimizer kept",
            [(4, Fraction(15, 100)), (2, Fraction(15, 100))],
        ),
        Arm("token-full", "token-level training on twice the budget: the full-cost reference", 1.0, TOKEN_LEVEL, None, cost=2.0),
        _tuned_token_level("token-lr-half", "token with half the learning rate", "--lr", str(lr / 2)),
        _tuned_token_level("token-lr-double", "token with twice the learning rate", "--lr", str(lr * 2)),
        _tuned_token_level(
            "token-batch-half", "token with half the tokens per step and twice the steps", "--global-batch-tokens", str(batch_tokens // 2)
        ),
        superposition("superposition-k2", "token superposition with patches of 2", 2, three_tenths),
        superposition(
            "superposition-k2-cosine",
            "superposition-k2 on one cosine schedule",
            2,
            three_tenths,
            schedule=("--lr-decay-style", "cosine"),
            baseline="token",
        ),
        Arm(
            "token-wsd-long",
            "token-wsd with a decay over half of the budget",
            1.0,
            (*TOKEN_LEVEL, *WSD, *DECAY_HALF),
            baseline="token-wsd",
        ),
        superposition(
            "superposition-k2-long",
            "superposition-k2 with a decay over half of the budget",
            2,
            three_tenths,
            schedule=DECAY_HALF,
            baseline="token-wsd-long",
        ),
        superposition("superposition-k2-r10", "superposition-k2 with patches for 0.1 of the compute", 2, Fraction(1, 10)),
        superposition("superposition-k8", "token superposition with patches of 8", 8, three_tenths),
        superposition(
            "superposition-k8-power", "superposition-k8 with labels weighted 1/(k+1)", 8, three_tenths, "--position-weights", "power"
        ),
        superposition("superposition-k3-r10", "superposition-k3 with patches for 0.1 of the compute", 3, Fraction(1, 10)),
        superposition("superposition-k3-r20", "superposition-k3 with patches for 0.2 of the compute", 3, Fraction(1, 5)),
        superposition("superposition-k8-r10", "superposition-k8 with patches for 0.1 of the compute", 8, Fraction(1, 10)),
        superposition(
            "superposition-k3-soft",
            "superposition-k3 with a soft switch over the last third of the patch stage",
            3,
            three_tenths,
            "--anneal-share",
            "0.333",
        ),
        one_schedule(
            "superposition-k3-reset", "superposition-k3 with the optimizer reset at the switch", [(3, three_tenths)], optimizer="reset"
        ),
        one_schedule(
            "superposition-k3-rewarm",
            "superposition-k3 with a new warm-up after the switch",
            [(3, three_tenths)],
            lr_policy="rewarm",
        ),
        superposition("superposition-k2-r50", "superposition-k2 with patches for 0.5 of the compute", 2, Fraction(1, 2)),
        patch_train("patch-k2-keep", "patch-k2 with the optimizer kept at the switch", 2, two_thirds, optimizer="keep"),
        patch_train("patch-k4-keep", "patch-k4 with the optimizer kept at the switch", 4, two_thirds, optimizer="keep"),
        patch_train("patch-k4-lr-half", "patch-k4 with half the learning rate after the switch", 4, two_thirds, lr=lr / 2),
        patch_train("patch-k4-lr-double", "patch-k4 with twice the learning rate after the switch", 4, two_thirds, lr=lr * 2),
        patch_train("patch-k4-l20", "patch-k4 with patches for 0.2 of the tokens", 4, Fraction(1, 5)),
        patch_train("patch-k4-l40", "patch-k4 with patches for 0.4 of the tokens", 4, Fraction(2, 5)),
    )
    arms += tuple(more_arms)
    names = [arm.name for arm in arms]
    for arm in more_arms:
        if names.count(arm.name) > 1:
            raise ConfigError(f"two arms are named {arm.name!r}", "one arm of each name", "rename the added arm")
        if arm.baseline is not None and arm.baseline not in names:
            raise ConfigError(f"arm {arm.name!r} has the unknown baseline {arm.baseline!r}", ", ".join(names), "name one of these arms")
    return arms


def select_arms(names: Sequence[str], arms: Sequence[Arm]) -> tuple[Arm, ...]:
    """Returns the named arms and the baselines that they need, in the order of `arms`.

    Args:
        names: of the arms wanted; an empty sequence selects all.
        arms: from `all_arms`.

    Raises:
        ConfigError: a name does not exist.
    """
    by_name = {arm.name: arm for arm in arms}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ConfigError(f"--arms {' '.join(unknown)}: no such arm", ", ".join(by_name), "choose names from this list")
    wanted = set(names) | {baseline for name in names if (baseline := by_name[name].baseline)}
    return tuple(arm for arm in arms if not names or arm.name in wanted)
