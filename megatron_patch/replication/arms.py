"""The arms of a study: ways to spend the same compute, each given as flags of pretrain_gpt_patch.py.

In: a budget of B cost tokens, which is the number of tokens that token-level training reads for the compute that every arm gets.
Out: `Arm` records. An arm that reads patches reads more than B tokens, as many as make its cost equal. Cost is reported relative to
token-level training on 2·B tokens, so an arm of equal cost has cost 0.5.

An arm's name is `[OPTIMIZER-]NAME[+OPTION=VALUE]...`. NAME is one of this file's, trained with AdamW. `muon-NAME` is the same arm, and its
baseline, with another optimizer and its own tuned rates. `NAME+lr=0.016` is the arm with one more option of the training program.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
        optimizer: name of its optimizer.
    """

    name: str
    description: str
    tokens: float
    flags: tuple[str, ...]
    baseline: str | None
    cost: float = 1.0
    program: str | None = None
    optimizer: str = "adamw"

    @property
    def token_level(self) -> bool:
        """Whether the arm reads single tokens only."""
        return self.tokens == 1.0

    @property
    def way(self) -> str:
        """The name without the optimizer: arms of one way differ in the optimizer only."""
        return self.name.removeprefix(f"{self.optimizer}-")

    @property
    def options(self) -> dict[str, str]:
        """The flags by name, each with its values as one text; the last flag of a name counts."""
        starts = [number for number, word in enumerate(self.flags) if word.startswith("--")]
        ends = [*starts[1:], len(self.flags)]
        return {self.flags[start]: " ".join(self.flags[start + 1 : end]) for start, end in zip(starts, ends, strict=True)}

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


def one_schedule(
    name: str,
    description: str,
    patch_stages: Sequence[tuple[int, Fraction]],
    schedule: tuple[str, ...] = DECAY_TENTH,
    baseline: str = "token-wsd",
    **token_stage: Any,
) -> Arm:
    """Returns an arm whose stages share one warm-up–stable–decay schedule and have the same positions per step.

    Args:
        name: of the arm.
        description: one phrase for tables.
        patch_stages: (K, share of the compute) of each stage before the token stage.
        schedule: flags of the learning-rate schedule.
        baseline: name of the token-level arm on the same schedule.
        token_stage: keys that change the token stage. Without any, the arm is token superposition for a list of patch sizes.
    """
    stages = [
        {"name": f"patch-{patch_size}", "patch_size": patch_size, "compute_share": float(share), "lr_policy": "continue"}
        for patch_size, share in patch_stages
    ]
    stages[0]["lr_policy"] = "restart"
    stages.append({"name": "token", "patch_size": 1, "lr_policy": "continue", **token_stage})
    stages_flag = _stages_flag(*({**stage, "batch": "constant-positions"} for stage in stages))
    flags = (*stages_flag, *WSD, *schedule)
    return Arm(name, description, float(tokens_for_compute_shares(patch_stages)), flags, baseline)


def all_arms(
    lr: float,
    batch_tokens: int,
    more_arms: Sequence[Arm] = (),
    optimizers: Mapping[str, Mapping[str, Any]] | None = None,
    min_lr_share: float | None = None,
) -> tuple[Arm, ...]:
    """Returns every arm: for each optimizer the main ones first, and `more_arms` last.

    Args:
        lr: the study's peak learning rate, which some arms scale.
        batch_tokens: tokens per step of token-level training, which one arm halves.
        more_arms: arms in addition to those of this file.
        optimizers: optimizer -> its tuned options, such as {"muon": {"lr": 0.016}}; None: AdamW with the options of the configuration.
        min_lr_share: an optimizer with an lr of its own gets this share of it as min-lr; None: that of the configuration.

    Raises:
        ConfigError: two arms share a name, or a baseline does not exist.
    """
    arms: tuple[Arm, ...] = ()
    for optimizer, options in ({"adamw": {}} if optimizers is None else optimizers).items():
        own_lr = float(options.get("lr", lr))
        flags = _option_flags({**({} if optimizer == "adamw" else {"optimizer": optimizer}), **options}, min_lr_share)
        arms += tuple(_with_optimizer(arm, optimizer, flags) for arm in (*_main_arms(own_lr, batch_tokens), *_long_decay_arms()))
    arms += tuple(more_arms)
    names = [arm.name for arm in arms]
    for arm in more_arms:
        if names.count(arm.name) > 1:
            raise ConfigError(f"two arms are named {arm.name!r}", "one arm of each name", "rename the added arm")
        if arm.baseline is not None and arm.baseline not in names:
            raise ConfigError(f"arm {arm.name!r} has the unknown baseline {arm.baseline!r}", ", ".join(names), "name one of these arms")
    return arms


def _option_flags(options: Mapping[str, Any], min_lr_share: float | None) -> tuple[str, ...]:
    """Returns options as flags; an lr brings its min-lr along, so that only the height of the schedule changes."""
    given = {name.replace("_", "-"): value for name, value in options.items()}
    if "lr" in given and "min-lr" not in given and min_lr_share is not None:
        given["min-lr"] = f"{float(given['lr']) * min_lr_share:g}"
    return tuple(word for name, value in given.items() for word in (f"--{name}", str(value)))


def is_learning_rate(value: Any) -> bool:
    """Returns whether a value of a file or a flag is a finite number above 0, or its text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False
    try:
        return 0 < float(value) < math.inf
    except (ValueError, OverflowError):
        return False


def _with_optimizer(arm: Arm, optimizer: str, flags: tuple[str, ...]) -> Arm:
    """Returns the arm with another optimizer. Its flags come first, so that an arm about the learning rate keeps its own."""
    if optimizer == "adamw":
        return replace(arm, flags=(*flags, *arm.flags))
    baseline = arm.baseline and f"{optimizer}-{arm.baseline}"
    return replace(
        arm,
        name=f"{optimizer}-{arm.name}",
        description=f"{arm.description}; optimizer {optimizer}",
        flags=(*flags, *arm.flags),
        baseline=baseline,
        optimizer=optimizer,
    )


def with_options(arm: Arm, added: str, min_lr_share: float | None) -> Arm:
    """Returns the arm with further options of the training program, compared with the arm itself at token level, else with its baseline.

    Args:
        arm: the arm.
        added: `OPTION=VALUE`, joined by `+`.
        min_lr_share: see `all_arms`.

    Raises:
        ConfigError: an entry is not OPTION=VALUE, names an option of FIXED_OPTIONS, or has a learning rate that is not one.
    """
    pairs = [word.partition("=")[::2] for word in added.split("+")]
    named = [(name.replace("_", "-"), value) for name, value in pairs]
    if any(not name or not value or name in FIXED_OPTIONS or (name == "lr" and not is_learning_rate(value)) for name, value in named):
        raise ConfigError(
            f"--arms {arm.name}+{added}",
            f"NAME+OPTION=VALUE with an option other than {', '.join(FIXED_OPTIONS)}, and an lr above 0",
            "correct the entry; arms with other patches or another optimizer have names of their own, which --plan lists",
        )
    flags = _option_flags(dict(pairs), min_lr_share)
    return replace(
        arm,
        name=f"{arm.name}+{added}",
        description=f"{arm.description}; {', '.join(f'{name} {value}' for name, value in pairs)}",
        flags=(*arm.flags, *flags),
        baseline=arm.name if arm.token_level else arm.baseline,
    )


FIXED_OPTIONS = (
    *("train-tokens", "seed", "stages", "recipe", "patch-size", "patch-fraction", "patch-compute-share", "optimizer"),
    *("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "num-query-groups", "vocab-size", "seq-length"),
    *("data-path", "split", "eval-tokens", "load", "save"),
)
"""Options that are the same in all arms, or that arms of their own differ in: an arm whose name changed one would cost another amount,
would have another model or other data, or would not be this study's."""


def _long_decay_arms() -> tuple[Arm, ...]:
    """Returns the arms on the long decay, the default at small scale: they compare K, r, switches and weights."""
    three_tenths, schedule, baseline = Fraction(3, 10), DECAY_HALF, "token-wsd-long"

    def patches(patch_size: int, what: str, suffix: str = "", share: Fraction = three_tenths, *flags: str) -> Arm:
        name = f"superposition-k{patch_size}{suffix}-long"
        return superposition(
            name, f"token superposition with patches of {patch_size}{what}", patch_size, share, *flags, schedule=schedule, baseline=baseline
        )

    def switch(patch_size: int, suffix: str, what: str, **token_stage: Any) -> Arm:
        name, what = f"superposition-k{patch_size}-{suffix}-long", f"superposition-k{patch_size}-long with {what}"
        return one_schedule(name, what, [(patch_size, three_tenths)], schedule, baseline, **token_stage)

    long, power = " and a decay over half of the budget", ("--position-weights", "power")
    arms = [patches(patch_size, long) for patch_size in (3, 4, 6, 8)]
    arms += [switch(patch_size, "reset", "the optimizer reset at the switch", optimizer="reset") for patch_size in (2, 4, 6)]
    arms += [switch(patch_size, "rewarm", "a new warm-up after the switch", lr_policy="rewarm") for patch_size in (2, 4, 6)]
    arms += [
        patches(patch_size, f" for {share} of the compute and a decay over half of the budget", f"-r{share[2:]}0", Fraction(share))
        for patch_size in (2, 4, 6)
        for share in ("0.1", "0.2")
    ]
    arms += [patches(patch_size, f", labels weighted 1/(k+1){long}", "-power", three_tenths, *power) for patch_size in (4, 6, 8)]
    stairs = [(4, Fraction(15, 100)), (2, Fraction(15, 100))]
    arms.append(one_schedule("stairs-4-2-1-long", f"stairs-4-2-1 with{long[4:]}", stairs, schedule, baseline))
    return tuple(arms)


def _main_arms(lr: float, batch_tokens: int) -> tuple[Arm, ...]:
    """Returns the arms of the papers' schedules with AdamW and their variations, the main ones first."""
    two_thirds, three_tenths = Fraction(2, 3), Fraction(3, 10)
    return (
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


def select_arms(names: Sequence[str], arms: Sequence[Arm], min_lr_share: float | None = None) -> tuple[Arm, ...]:
    """Returns the named arms and the baselines that they need, in the order of `names`, each after its baseline.

    Args:
        names: of the arms wanted; an empty sequence selects all.
        arms: from `all_arms`.
        min_lr_share: see `all_arms`.

    Raises:
        ConfigError: a name does not exist.
    """
    if not names:
        return tuple(arms)
    by_name, baselines = {arm.name: arm for arm in arms}, {arm.baseline for arm in arms}
    unknown = [name for name in names if name.partition("+")[0] not in by_name]
    if unknown:
        raise ConfigError(f"--arms {' '.join(unknown)}: no such arm", ", ".join(by_name), "choose names from this list")
    chosen: dict[str, Arm] = {}
    for name in names:
        plain, _, added = name.partition("+")
        arm = with_options(by_name[plain], added, min_lr_share) if added else by_name[plain]
        # A baseline needs none itself: its own one is another schedule, with which it can be compared where both are named.
        needed = by_name[arm.baseline] if arm.baseline and arm.name not in baselines else arm
        chosen |= {one.name: one for one in (needed, arm) if one.name not in chosen}
    return tuple(chosen.values())
