"""What a run costs beside token-level training: FLOPs of a step of each stage, and FLOPs as tokens.

In: the model's shape and the plan. Out: numbers for metrics, the dry run and plots. Compute is a matter of positions, so a patch stage
pays once for K tokens; the word **cost** always means FLOPs over the FLOPs of token-level training on the same tokens, and
**cost tokens** the tokens that token-level training would have read for the same FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_patch.model.flops import training_flops_per_position
from megatron_patch.model.shape import ModelShape
from megatron_patch.stages import Progress, Stage, StagePlan


@dataclass(frozen=True)
class Cost:
    """Prices of a plan.

    Args:
        shape: the model.
        plan: the stages.
        token_positions: positions of a token-level sample, the yardstick.
    """

    shape: ModelShape
    plan: StagePlan
    token_positions: int

    def step_flops(self, stage: Stage) -> float:
        """FLOPs of one optimizer step, forward and backward, over all ranks."""
        return stage.positions_per_step * training_flops_per_position(self.shape, stage.positions)

    @property
    def token_flops(self) -> float:
        """FLOPs of one token at token level."""
        return training_flops_per_position(self.shape, self.token_positions)

    def flops(self, progress: Progress) -> float:
        """FLOPs of the run up to a place."""
        return self.plan.consumed(progress, self.step_flops)

    def cost_tokens(self, progress: Progress) -> float:
        """Tokens that token-level training would have read for the FLOPs so far."""
        return self.flops(progress) / self.token_flops

    def share(self, progress: Progress) -> float:
        """FLOPs so far over those of token-level training on the tokens so far."""
        tokens = self.plan.consumed_tokens(progress)
        return self.cost_tokens(progress) / tokens if tokens else 0.0

    @property
    def whole(self) -> float:
        """The run's cost: its FLOPs over those of token-level training on the same tokens."""
        return self.share(Progress(len(self.plan.stages) - 1, self.plan.stages[-1].steps))
