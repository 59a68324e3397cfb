"""The stage plan: the ordered stages of a run, and all arithmetic on them.

In: numbers (no torch, no files). Out: which stage a step belongs to, how many tokens, samples and micro-batches a step has, where a stage
begins and ends, what a run costs relative to token-level training. The rest of the program takes these numbers from here.

Terms: a **patch** is K consecutive tokens that the model reads as one **position**. A **sample** has T positions, so T·K input tokens. A
**step** is one optimizer step over a global batch of samples. The corpus is divided among the stages in **blocks**. Budgets and learning
rates are counted in tokens, compute in positions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from typing import Any, Literal

from megatron_patch.errors import ConfigError
from megatron_patch.utils.records import record_from_json, whole_number
from megatron_patch.utils.registry import lookup
from megatron_patch.utils.units import plural

Side = Literal["both", "input", "output"]
LrPolicy = Literal["restart", "continue", "rewarm"]
OptimizerPolicy = Literal["reset", "keep", "reset_moments"]
LrStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
WsdDecayStyle = Literal["linear", "cosine", "exponential", "minus-sqrt"]

LONGEST_PATCH = 1 << 16
"""Largest patch size that is accepted. A larger one is a mistake, and would need a list of weights of that length."""
LOOKAHEAD_TOKENS = 64
"""Tokens that are reserved after the last block of a corpus, for the labels of patches up to this size. It is a constant rather than the
largest patch of the plan, so that a run in two parts reads the same blocks as one run."""


POSITION_WEIGHTS: dict[str, Callable[[int], float]] = {
    "uniform": lambda k: 1.0,
    "power": lambda k: 1.0 / (k + 1),
    "exponential": lambda k: math.exp(-k),
    "first": lambda k: float(k == 0),
}
"""The formulas of --position-weights by name: from a label's index k within its patch (from 0) to its weight before scaling.

Your own script may add formulas; `position_weights` scales the weights to sum to the number of labels."""


@dataclass(frozen=True)
class LrShape:
    """One learning-rate schedule; lengths are in tokens.

    Args:
        lr: the highest learning rate.
        min_lr: the learning rate at the end of the decay.
        warmup_tokens: length of the linear warm-up from 0.
        style: shape of the decay.
        decay_tokens: tokens from the schedule's start to where `min_lr` is reached; None for the schedule's end.
        wsd_decay_tokens: length of the final decay of WSD (warm-up, stable, decay).
        wsd_decay_style: shape of that final decay.
    """

    lr: float
    min_lr: float = 0.0
    warmup_tokens: int = 0
    style: LrStyle = "cosine"
    decay_tokens: int | None = None
    wsd_decay_tokens: int = 0
    wsd_decay_style: WsdDecayStyle = "linear"


@dataclass(frozen=True)
class ExpertBalance:
    """How a stage balances the load of experts, in a model that has some; 0 turns a part off.

    Args:
        aux_loss_coeff: coefficient of the auxiliary loss over the global batch.
        z_loss_coeff: coefficient of the z-loss.
        bias_update_rate: how much the bias of an expert moves in a step.

    Raises:
        ConfigError: a number is below 0.
    """

    aux_loss_coeff: float = 0.0
    z_loss_coeff: float = 0.0
    bias_update_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("aux_loss_coeff", "z_loss_coeff", "bias_update_rate"):
            if not getattr(self, name) >= 0.0:
                raise ConfigError(f"{name} of experts is {getattr(self, name)}", "numbers from 0", f"correct {name}")


NO_BALANCE = ExpertBalance()
"""Nothing balances the load of experts."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run: how tokens become positions, how many of them are in a step, and how many steps there are.

    Args:
        name: the stage's name in logs and metrics.
        patch_size: K, tokens in a patch; 1 is ordinary next-token training.
        positions: T, positions of a sample.
        micro_batch_size: samples in one forward pass, of one rank, or of the ranks that share their positions.
        global_batch_size: samples of all ranks in one optimizer step.
        steps: optimizer steps.
        side: where the model has patches: in its input, in its output (the labels), or both.
        position_weights: one weight for each label of a position; they sum to `labels_per_position`.
        anneal_share: share of the stage's steps, at its end, over which the weights move to the first label.
        lr: the learning-rate schedule that begins here, if `lr_policy` is "restart".
        lr_policy: "restart" begins a schedule; "continue" continues the running one; "rewarm" continues it and multiplies it with a
            linear warm-up of `rewarm_tokens`.
        rewarm_tokens: length of that warm-up in tokens.
        optimizer: what the switch to this stage does to the optimizer's state: "reset" clears it, "reset_moments" sets both moments
            to zero and keeps the step count (so there is no new bias correction), "keep" leaves it as it is.
        blend: the stage's data blend as (dataset prefix, weight); None for the blend of the run.
        earlier_ends: where the stage ended, in blocks from its start, before more --train-tokens extended it. Shuffle windows also begin
            there, so that samples that were read are not read again.
        context_parallel_size: ranks that share the positions of each sample, a divisor of the data-parallel ranks.
        expert_balance: how the load of experts is balanced.

    Raises:
        ConfigError: a number is out of range, or the number of weights is not the number of labels.

    Examples:
        >>> stage = Stage("patch", patch_size=4, positions=16, micro_batch_size=2, global_batch_size=8, steps=10)
        >>> stage.sample_tokens, stage.tokens_per_step, stage.gradient_accumulation(data_parallel_size=2)
        (64, 512, 2)
    """

    name: str
    patch_size: int
    positions: int
    micro_batch_size: int
    global_batch_size: int
    steps: int
    side: Side = "both"
    position_weights: tuple[float, ...] = ()
    anneal_share: float = 0.0
    lr: LrShape = field(default_factory=lambda: LrShape(lr=1e-3))
    lr_policy: LrPolicy = "restart"
    rewarm_tokens: int = 0
    optimizer: OptimizerPolicy = "reset"
    blend: tuple[tuple[str, float], ...] | None = None
    earlier_ends: tuple[int, ...] = ()
    context_parallel_size: int = 1
    expert_balance: ExpertBalance = NO_BALANCE

    def __post_init__(self) -> None:
        for name in ("patch_size", "positions", "micro_batch_size", "global_batch_size", "steps", "context_parallel_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"stage {self.name!r}: {name} is {getattr(self, name)}", "whole numbers from 1", f"raise {name}")
        if self.patch_size > LONGEST_PATCH:
            raise ConfigError(f"stage {self.name!r}: patch_size is {self.patch_size}", f"up to {LONGEST_PATCH}", "lower patch_size")
        if not self.position_weights:
            object.__setattr__(self, "position_weights", (1.0,) * self.labels_per_position)
        if len(self.position_weights) != self.labels_per_position:
            raise ConfigError(
                f"stage {self.name!r}: {plural(len(self.position_weights), 'position weight')}",
                f"one for each of the {plural(self.labels_per_position, 'label')} of a position",
                "correct the position weights",
            )

    @property
    def input_patch_size(self) -> int:
        """Number of tokens that are averaged into one position."""
        return 1 if self.side == "output" else self.patch_size

    @property
    def labels_per_position(self) -> int:
        """Number of labels that each position predicts."""
        return 1 if self.side == "input" else self.patch_size

    @property
    def sample_tokens(self) -> int:
        """Input tokens of a sample."""
        return self.positions * self.input_patch_size

    @property
    def tokens_per_step(self) -> int:
        """Input tokens of one optimizer step over all ranks."""
        return self.global_batch_size * self.sample_tokens

    @property
    def positions_per_step(self) -> int:
        """Positions of one optimizer step over all ranks."""
        return self.global_batch_size * self.positions

    @property
    def tokens(self) -> int:
        """Input tokens of the stage."""
        return self.steps * self.tokens_per_step

    @property
    def samples(self) -> int:
        """Samples of the stage."""
        return self.steps * self.global_batch_size

    def sample_ranks(self, data_parallel_size: int) -> int:
        """Returns how many groups of ranks read different samples: data-parallel ranks / context-parallel size, at least 1."""
        return max(1, data_parallel_size // self.context_parallel_size)

    @property
    def rank_positions(self) -> int:
        """Positions of a sample that one rank holds outside of attention."""
        return self.positions // self.context_parallel_size

    def gradient_accumulation(self, data_parallel_size: int) -> int:
        """Returns the micro-batches of each rank in one step; the last one is padded with samples that do not count."""
        return -(-self.global_batch_size // (self.micro_batch_size * self.sample_ranks(data_parallel_size)))

    def weights_at(self, stage_step: int) -> tuple[float, ...]:
        """Returns the label weights in step `stage_step` (from 0): w·(1 - a) + a·(only the first label), where annealing raises a to 1."""
        start = self.steps * (1.0 - self.anneal_share)
        if self.anneal_share <= 0.0 or stage_step < start:
            return self.position_weights
        alpha = min(1.0, (stage_step + 1 - start) / max(1.0, self.steps - start))
        return tuple(
            (1.0 - alpha) * weight + (alpha * self.labels_per_position if k == 0 else 0.0) for k, weight in enumerate(self.position_weights)
        )


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Args:
        stage_index: the current stage, counted from 0.
        stage_step: steps of this stage that are done.
    """

    stage_index: int
    stage_step: int


@dataclass(frozen=True)
class StagePlan:
    """The ordered stages of a run.

    Args:
        stages: one stage or more.
        block_tokens: tokens of a block, a multiple of the `sample_tokens` of every stage. Every stage but the last reads full blocks, so
            that the next one can continue where it ended, whatever its sample length is.

    Raises:
        ConfigError: the samples of a stage do not fill blocks, or a stage that is not the last ends inside a block.

    Examples:
        >>> stages = (Stage("patch", 4, 16, 2, 2, 10), Stage("token", 1, 16, 2, 8, 5))
        >>> plan = StagePlan(stages, block_tokens=64)
        >>> plan.progress(12), plan.consumed_tokens(plan.progress(12)), plan.cost()
        (Progress(stage_index=1, stage_step=2), 1536, 0.5)
    """

    stages: tuple[Stage, ...]
    block_tokens: int

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("the plan has no stages", "at least one stage", "give --recipe or --stages")
        for index, stage in enumerate(self.stages):
            if self.block_tokens % stage.sample_tokens:
                raise ConfigError(
                    f"stage {stage.name!r}: a sample has {stage.sample_tokens} tokens "
                    f"({stage.positions} positions of {plural(stage.input_patch_size, 'token')}), which does not divide "
                    f"the block of {self.block_tokens}",
                    f"blocks of a multiple of {math.lcm(*(other.sample_tokens for other in self.stages))} tokens",
                    "change or remove --block-tokens, or change --seq-length or the stage's patch_size",
                )
            if index < len(self.stages) - 1 and stage.tokens % self.block_tokens:
                raise ConfigError(
                    f"stage {stage.name!r} ends inside a block: it has {stage.tokens} tokens, a block has {self.block_tokens}",
                    "full blocks in every stage but the last",
                    "change the stage's number of steps",
                )
            blocks = self.last_block(index) - self.first_block(index)
            if any(not low < high for low, high in itertools.pairwise((0, *stage.earlier_ends, blocks + 1))):
                raise ConfigError(
                    f"stage {stage.name!r}: earlier_ends is {list(stage.earlier_ends)}"[:300],
                    f"ascending numbers of blocks from 1 to {blocks}",
                    "use the plan of a checkpoint that is not damaged",
                )

    @property
    def finest_stage(self) -> Stage:
        """The first stage with the smallest patches; in most plans the stage at K = 1."""
        return min(self.stages, key=lambda stage: stage.patch_size)

    @property
    def lookahead_tokens(self) -> int:
        """Tokens after the last block that labels may come from; the same for all usual plans, so that their blocks are the same."""
        return max(LOOKAHEAD_TOKENS, *(stage.patch_size for stage in self.stages))

    @property
    def tokens(self) -> int:
        """Input tokens of the run."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return sum(stage.steps for stage in self.stages)

    def first_token(self, stage_index: int) -> int:
        """Returns the tokens that are read before the stage begins."""
        return sum(stage.tokens for stage in self.stages[:stage_index])

    def first_step(self, stage_index: int) -> int:
        """Returns the steps before the stage begins."""
        return sum(stage.steps for stage in self.stages[:stage_index])

    def first_block(self, stage_index: int) -> int:
        """Returns the index of the stage's first block."""
        return self.first_token(stage_index) // self.block_tokens

    def last_block(self, stage_index: int) -> int:
        """Returns the index after the stage's last block; only the last stage may leave its last block unfinished."""
        return -(-self.first_token(stage_index + 1) // self.block_tokens)

    def progress(self, step: int) -> Progress:
        """Returns the progress after `step` steps; between two stages it is the start of the second one.

        Raises:
            ConfigError: the run has fewer steps.
        """
        if not 0 <= step <= self.steps:
            raise ConfigError(
                f"step {step} is outside the plan", f"steps from 0 to {self.steps}", "give another step, or raise --train-tokens"
            )
        for index, stage in enumerate(self.stages):
            if step < stage.steps:
                return Progress(index, step)
            step -= stage.steps
        return Progress(len(self.stages) - 1, self.stages[-1].steps)

    def step(self, progress: Progress) -> int:
        """Returns the steps that are done."""
        return self.first_step(progress.stage_index) + progress.stage_step

    def consumed_tokens(self, progress: Progress) -> int:
        """Returns the input tokens that have been read."""
        return self.first_token(progress.stage_index) + progress.stage_step * self.stages[progress.stage_index].tokens_per_step

    def consumed(self, progress: Progress, per_step: Callable[[Stage], float]) -> float:
        """Returns the sum of `per_step(stage)` over all steps that are done, for example their compute or their positions."""
        done = sum(stage.steps * per_step(stage) for stage in self.stages[: progress.stage_index])
        return done + progress.stage_step * per_step(self.stages[progress.stage_index])

    def cost(self) -> float:
        """Returns the positions per token: c = sum over stages of share/K, which is λ/K + 1 - λ for two stages (arXiv 2407.12665)."""
        return sum(stage.steps * stage.positions_per_step for stage in self.stages) / self.tokens

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain JSON values, for checkpoints."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> StagePlan:
        """Returns the plan that `to_json` wrote.

        Raises:
            ConfigError: a field is missing, unknown or of the wrong type.
        """
        try:
            stages = tuple(record_from_json(Stage, raw) for raw in data["stages"])
            return StagePlan(stages, whole_number(data["block_tokens"], 1))
        except (KeyError, TypeError, ValueError) as error:
            allowed = f"stages with the fields {', '.join(f.name for f in fields(Stage))}"
            raise ConfigError(f"this is not a stage plan: {error}", allowed, "use a checkpoint that is not damaged") from error


def tokens_of_steps(stages: Sequence[Stage], steps: int | Fraction) -> Fraction:
    """Returns the tokens of the first `steps` steps of consecutive stages; steps after the last one are as large as its own."""
    tokens, left = Fraction(0), Fraction(steps)
    for stage in stages[:-1]:
        taken = min(left, Fraction(stage.steps))
        tokens += taken * stage.tokens_per_step
        left -= taken
    return tokens + left * stages[-1].tokens_per_step


def steps_of_tokens(stages: Sequence[Stage], tokens: int | Fraction) -> Fraction:
    """Returns the steps that read the first `tokens` tokens of consecutive stages: the inverse of `tokens_of_steps`."""
    steps, left = Fraction(0), Fraction(tokens)
    for stage in stages[:-1]:
        taken = min(left, Fraction(stage.tokens))
        steps += taken / stage.tokens_per_step
        left -= taken
    return steps + left / stages[-1].tokens_per_step


def position_weights(kind: str | tuple[float, ...], labels: int) -> tuple[float, ...]:
    """Returns the weights w_k of a position's labels, scaled to sum to `labels` so that the loss stays an average over labels.

    Args:
        kind: a name in `POSITION_WEIGHTS`, or the weights themselves.
        labels: number of labels of a position.

    Raises:
        ConfigError: an unknown name, the wrong number of weights, a weight that is negative or not finite, or no weight above zero.
    """
    if labels > LONGEST_PATCH:
        raise ConfigError(f"patches of {labels} tokens", f"up to {LONGEST_PATCH}", "lower the patch size")
    if isinstance(kind, str):
        formula = lookup(POSITION_WEIGHTS, kind, "--position-weights", also=f"{plural(labels, 'number')} with commas between them")
        raw = [float(formula(k)) for k in range(labels)]
    else:
        raw = [float(weight) for weight in kind]
        if len(raw) != labels:
            raise ConfigError(
                f"{plural(len(raw), 'position weight')} for {plural(labels, 'label')} of a position",
                "one for each label",
                "correct the weights",
            )
    # Of weights that are finite, the sum may not be.
    if min(raw) < 0.0 or not sum(raw) > 0.0 or not math.isfinite(sum(raw)):
        raise ConfigError(f"position weights {raw}"[:300], "finite numbers from 0, at least one above 0", "correct the weights")
    if kind == "uniform":
        return (1.0,) * labels
    return tuple(weight * labels / sum(raw) for weight in raw)
