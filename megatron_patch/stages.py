"""The stage plan: the ordered list of stages that a run is made of, and all arithmetic on it.

In: nothing but numbers (no torch, no files). Out: answers to "which stage am I in", "how many tokens, samples and micro-batches
does a step hold", "where does a stage begin and end", "what does this cost beside token-level training". Everything else in the
program asks here; nothing else knows that there is more than one stage.

The words: a **patch** is K consecutive tokens read as one **position**; a **sample** has T positions, so `T * K` input tokens; a
**step** is one optimizer step over a global batch of samples; a **block** is the unit in which the corpus is dealt to the stages.
Tokens are the unit of account for budgets and learning rates, positions for compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
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
"""Beyond any use: what is above it is a slip, and would be a list of weights as long."""
LOOKAHEAD_TOKENS = 64
"""Left behind the last block of a corpus for the labels of patches up to this size: a constant, and not the plan's own largest patch, so
that a run in two parts reads the blocks that one run would have read."""


POSITION_WEIGHTS: dict[str, Callable[[int], float]] = {
    "uniform": lambda k: 1.0,
    "power": lambda k: 1.0 / (k + 1),
    "exponential": lambda k: 2.0**-k,
    "first": lambda k: float(k == 0),
}
"""The formulas of --position-weights by name: from a label's index k within its patch (from 0) to its weight before scaling.

A launcher script may add its own; `position_weights` scales the weights to sum to the number of labels."""


@dataclass(frozen=True)
class LrShape:
    """The shape of one learning-rate schedule, in tokens.

    Args:
        lr: the highest learning rate.
        min_lr: where the decay ends.
        warmup_tokens: tokens of linear warm-up from 0.
        style: the form of the decay.
        decay_tokens: tokens after which `min_lr` is reached, counted from the schedule's start; None: its end.
        wsd_decay_tokens: tokens of the final decay of warm-up-stable-decay.
        wsd_decay_style: the form of that final decay.
    """

    lr: float
    min_lr: float = 0.0
    warmup_tokens: int = 0
    style: LrStyle = "cosine"
    decay_tokens: int | None = None
    wsd_decay_tokens: int = 0
    wsd_decay_style: WsdDecayStyle = "linear"


@dataclass(frozen=True)
class Stage:
    """One leg of a run: how tokens become positions, how many of them make a step, and for how many steps.

    Args:
        name: how logs and metrics call the stage.
        patch_size: K, tokens in a patch; 1 is ordinary next-token training.
        positions: T, positions of a sample.
        micro_batch_size: samples of one rank in one forward pass.
        global_batch_size: samples of all ranks in one optimizer step.
        steps: optimizer steps.
        side: which side of the model reads patches: its input, its output (labels), or both.
        position_weights: one weight for each label of a position; they sum to `labels_per_position`.
        anneal_share: the last part of the stage, as a share of its steps, over which the weights move to the first label alone.
        lr: the learning-rate schedule that begins here, if `lr_policy` says so.
        lr_policy: "restart" begins a schedule; "continue" goes on with the running one; "rewarm" goes on with it under a new
            linear warm-up of `rewarm_tokens`.
        rewarm_tokens: length of that warm-up in tokens.
        optimizer: what the switch into this stage does to the optimizer: "reset" makes it new, "reset_moments" zeroes both
            moments but keeps the step count (so without new bias correction), "keep" leaves it.
        blend: the stage's own data blend as (path prefix, weight); None: the run's.
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

    def __post_init__(self) -> None:
        for name in ("patch_size", "positions", "micro_batch_size", "global_batch_size", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"stage {self.name!r}: {name} is {getattr(self, name)}", "whole numbers from 1")
        if self.patch_size > LONGEST_PATCH:
            raise ConfigError(f"stage {self.name!r}: patch_size is {self.patch_size}", f"up to {LONGEST_PATCH}")
        if not self.position_weights:
            object.__setattr__(self, "position_weights", (1.0,) * self.labels_per_position)
        if len(self.position_weights) != self.labels_per_position:
            raise ConfigError(
                f"stage {self.name!r}: {len(self.position_weights)} position weights",
                f"one for each of the {self.labels_per_position} labels of a position",
            )

    @property
    def input_patch_size(self) -> int:
        """Tokens averaged into one position."""
        return 1 if self.side == "output" else self.patch_size

    @property
    def labels_per_position(self) -> int:
        """Labels that each position is scored against."""
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
        """Input tokens of the whole stage."""
        return self.steps * self.tokens_per_step

    @property
    def samples(self) -> int:
        """Samples of the whole stage."""
        return self.steps * self.global_batch_size

    def gradient_accumulation(self, data_parallel_size: int) -> int:
        """Micro-batches of each rank in one step; the last is filled up with unscored samples where the division leaves a rest."""
        return -(-self.global_batch_size // (self.micro_batch_size * data_parallel_size))

    def weights_at(self, stage_step: int) -> tuple[float, ...]:
        """The label weights in step `stage_step` (from 0), after annealing: w·(1 - a) + a·(first label alone)."""
        start = self.steps * (1.0 - self.anneal_share)
        if self.anneal_share <= 0.0 or stage_step < start:
            return self.position_weights
        alpha = min(1.0, (stage_step + 1 - start) / max(1.0, self.steps - start))
        return tuple(
            (1.0 - alpha) * weight + (alpha * self.labels_per_position if k == 0 else 0.0) for k, weight in enumerate(self.position_weights)
        )


@dataclass(frozen=True)
class Progress:
    """Where a run stands: `stage_step` steps of stage `stage_index` are done."""

    stage_index: int
    stage_step: int


@dataclass(frozen=True)
class StagePlan:
    """The ordered stages of a run.

    Args:
        stages: at least one.
        block_tokens: B, the unit in which the corpus is dealt; a multiple of every stage's `sample_tokens`. Every stage but the last
            takes whole blocks, so that the next one can go on where it ended, whatever its own sample length.

    Raises:
        ConfigError: a stage's samples do not fill blocks, or a stage that is not the last ends inside one.
    """

    stages: tuple[Stage, ...]
    block_tokens: int

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("the plan has no stages", "at least one stage")
        for index, stage in enumerate(self.stages):
            if self.block_tokens % stage.sample_tokens:
                raise ConfigError(
                    f"stage {stage.name!r}: a sample has {stage.sample_tokens} tokens "
                    f"({stage.positions} positions of {stage.input_patch_size}), which does not divide the block of {self.block_tokens}",
                    f"blocks that are a multiple of {math.lcm(*(other.sample_tokens for other in self.stages))} tokens",
                    "change --block-tokens (or leave it out), --seq-length or the stage's patch_size",
                )
            if index < len(self.stages) - 1 and stage.tokens % self.block_tokens:
                raise ConfigError(
                    f"stage {stage.name!r} ends inside a block: {stage.tokens} tokens, blocks of {self.block_tokens}",
                    "whole blocks in every stage but the last",
                    "change the stage's number of steps",
                )

    @property
    def finest(self) -> Stage:
        """The first stage with the smallest patches: in most plans its token level."""
        return min(self.stages, key=lambda stage: stage.patch_size)

    @property
    def lookahead_tokens(self) -> int:
        """How far past the last block labels may be looked for; the same for all usual plans, so that they cut a corpus alike."""
        return max(LOOKAHEAD_TOKENS, *(stage.patch_size for stage in self.stages))

    @property
    def tokens(self) -> int:
        """Input tokens of the whole run."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(stage.steps for stage in self.stages)

    def first_token(self, stage_index: int) -> int:
        """Tokens read before the stage begins."""
        return sum(stage.tokens for stage in self.stages[:stage_index])

    def first_step(self, stage_index: int) -> int:
        """Steps taken before the stage begins."""
        return sum(stage.steps for stage in self.stages[:stage_index])

    def first_block(self, stage_index: int) -> int:
        """Blocks dealt before the stage begins."""
        return self.first_token(stage_index) // self.block_tokens

    def last_block(self, stage_index: int) -> int:
        """Blocks dealt when the stage has ended (its last block may be left unfinished in the last stage alone)."""
        return -(-self.first_token(stage_index + 1) // self.block_tokens)

    def progress(self, step: int) -> Progress:
        """The place after `step` steps; at a boundary the place is the beginning of the next stage.

        Raises:
            ConfigError: the run has fewer steps.
        """
        if not 0 <= step <= self.steps:
            raise ConfigError(f"step {step} is outside the plan", f"0 to {self.steps}")
        for index, stage in enumerate(self.stages):
            if step < stage.steps:
                return Progress(index, step)
            step -= stage.steps
        return Progress(len(self.stages) - 1, self.stages[-1].steps)

    def step(self, progress: Progress) -> int:
        """Steps taken at a place."""
        return self.first_step(progress.stage_index) + progress.stage_step

    def consumed_tokens(self, progress: Progress) -> int:
        """Input tokens read at a place."""
        return self.first_token(progress.stage_index) + progress.stage_step * self.stages[progress.stage_index].tokens_per_step

    def consumed(self, progress: Progress, price: Callable[[Stage], float]) -> float:
        """Sum of `price(stage)` over all steps up to a place: compute so far, positions so far, whatever a step costs."""
        done = sum(stage.steps * price(stage) for stage in self.stages[: progress.stage_index])
        return done + progress.stage_step * price(self.stages[progress.stage_index])

    def cost(self) -> float:
        """Positions computed per token read: the paper's c = sum over stages of share/K (λ/K + 1 - λ for two stages)."""
        return sum(stage.steps * stage.positions_per_step for stage in self.stages) / self.tokens

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values, for checkpoints."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> StagePlan:
        """Reads what `to_json` wrote.

        Raises:
            ConfigError: a field is missing or unknown.
        """
        try:
            stages = tuple(record_from_json(Stage, raw) for raw in data["stages"])
            return StagePlan(stages, whole_number(data["block_tokens"], 1))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"this is no stage plan: {error}", f"the fields {[f.name for f in fields(Stage)]}") from error


def position_weights(kind: str | tuple[float, ...], labels: int) -> tuple[float, ...]:
    """Returns the weights w_k of a position's labels, scaled to sum to `labels` so that the loss stays an average over labels.

    Args:
        kind: a name in `POSITION_WEIGHTS`, or the weights themselves.
        labels: number of labels of a position.

    Raises:
        ConfigError: an unknown name, the wrong number of weights, a weight that is negative or not finite, or no weight above zero.
    """
    if labels > LONGEST_PATCH:
        raise ConfigError(f"patches of {labels} tokens", f"up to {LONGEST_PATCH}")
    if isinstance(kind, str):
        formula = lookup(POSITION_WEIGHTS, kind, "--position-weights", also=f"{plural(labels, 'number')} with commas between them")
        raw = [float(formula(k)) for k in range(labels)]
    else:
        raw = [float(weight) for weight in kind]
        if len(raw) != labels:
            raise ConfigError(f"{plural(len(raw), 'position weight')} for {plural(labels, 'label')} of a position", "one for each label")
    if min(raw) < 0.0 or not sum(raw) > 0.0 or not all(math.isfinite(weight) for weight in raw):
        raise ConfigError(f"position weights {raw}"[:300], "finite numbers from 0, at least one of them above 0")
    if kind == "uniform":
        return (1.0,) * labels
    return tuple(weight * labels / sum(raw) for weight in raw)
