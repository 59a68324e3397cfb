"""The cost of a run relative to token-level training: FLOPs of a step of each stage, and FLOPs expressed as tokens.

In: the model's shape and the stage plan. Out: numbers for metrics, the dry run and plots. Compute grows with positions, so a patch stage
pays once for K tokens. **Cost** always means FLOPs relative to token-level training on the same tokens; **cost tokens** are the tokens that
token-level training reads for the same FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_patch.model.flops import training_flops_per_position
from megatron_patch.model.shape import ModelShape
from megatron_patch.stages import Progress, Stage, StagePlan


@dataclass(frozen=True)
class Cost:
    """FLOPs and cost of a stage plan.

    Args:
        shape: shape of the model.
        plan: the stages.
        token_positions: positions per sample of the token-level training that the plan is compared with.
    """

    shape: ModelShape
    plan: StagePlan
    token_positions: int

    def step_flops(self, stage: Stage) -> float:
        """Returns the FLOPs of one optimizer step, forward and backward, summed over all ranks."""
        return stage.positions_per_step * training_flops_per_position(self.shape, stage.positions)

    @property
    def token_flops(self) -> float:
        """FLOPs of one token in token-level training."""
        return training_flops_per_position(self.shape, self.token_positions)

    def flops(self, progress: Progress) -> float:
        """Returns the FLOPs of the run up to this progress."""
        return self.plan.consumed(progress, self.step_flops)

    def cost_tokens(self, progress: Progress) -> float:
        """Returns the tokens that token-level training reads for the FLOPs up to this progress."""
        return self.flops(progress) / self.token_flops

    def share(self, progress: Progress) -> float:
        """Returns the cost up to this progress: FLOPs relative to token-level training on the tokens read so far; 0 at the start."""
        tokens = self.plan.consumed_tokens(progress)
        return self.cost_tokens(progress) / tokens if tokens else 0.0

    @property
    def total(self) -> float:
        """The cost of the whole run: its FLOPs relative to token-level training on the same tokens."""
        return self.share(Progress(len(self.plan.stages) - 1, self.plan.stages[-1].steps))
