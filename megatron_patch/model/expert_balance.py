"""The balance of a router: what it counts, the terms that it adds to the gradient, and the bias by which it chooses.

In: the router's logits and choices. Out: the same logits with the gradient of the balance terms; numbers of positions for each expert,
which the engine sums over all ranks after a step. Both terms depend on the **global** batch alone, so that results depend neither on the
number of ranks nor on the micro-batch size:

    auxiliary loss  α · E · Σₑ loadₑ · mean over positions of pₑ        p: scores divided by their sum; load: mean of earlier global batches
    z-loss          β · mean over positions of (log Σₑ exp logitₑ)²     (ST-MoE, arXiv 2202.08906)

The load of the batch itself is known only after it; the auxiliary loss of Switch Transformer (arXiv 2101.03961) is the same with that one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_patch.model.expert_shape import ExpertShape
from megatron_patch.parallel.tensor import TensorParallel


class RouterBalance(nn.Module):
    """The counts, loads and bias of one router. They stay float32 or integers, whatever dtype the model gets.

    Args:
        experts: the experts.
        parallel: the ranks that each choose for all positions.

    Attributes:
        load: float32 [E], share of each expert in the choices of earlier global batches; in checkpoints.
        bias: float32 [E], added to the scores for the choice; None in a model without it; in checkpoints.
        counts: int64 [E], choices of this rank's positions since the last step.
        entropy: float64 [2], sum over these positions of the entropy of p in nats, and their number.
        factors: float32 [2], α·E and β times what makes a sum over a rank's positions a part of the mean over the global batch.
        adds_gradient: whether α or β is above 0.
    """

    def __init__(self, experts: ExpertShape, parallel: TensorParallel) -> None:
        super().__init__()
        self.score, self.ranks = experts.score, parallel.size
        self.adds_gradient = False
        # Made from integers: under ZeRO 3, DeepSpeed rounds every new floating-point tensor.
        zeros = torch.zeros(experts.count, dtype=torch.int64)
        self.load: torch.Tensor
        self.bias: torch.Tensor | None
        self.counts: torch.Tensor
        self.entropy: torch.Tensor
        self.factors: torch.Tensor
        self.register_buffer("load", zeros.to(torch.float32) + 1.0 / experts.count)
        self.register_buffer("bias", zeros.to(torch.float32) if experts.bias else None)
        self.register_buffer("counts", zeros, persistent=False)
        self.register_buffer("entropy", zeros[:2].to(torch.float64), persistent=False)
        self.register_buffer("factors", zeros[:2].to(torch.float32), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> RouterBalance:
        """Moves the buffers where `fn` would, but keeps their dtypes, and sets those that leave the meta device to their initial values."""
        device = fn(torch.zeros((), dtype=torch.int64)).device
        for name, old in self._buffers.items():
            if old is None or old.device == device:
                continue
            if old.is_meta or device.type == "meta":
                self._buffers[name] = torch.full_like(old, 1.0 / len(old) if name == "load" else 0.0, device=device)
            else:
                self._buffers[name] = old.to(device)
        return self

    def with_gradient(self, logits: torch.Tensor, counted: int) -> torch.Tensor:
        """Returns the logits [N, E] such that gradients of auxiliary loss and z-loss are added to theirs, for the first `counted`."""
        if not self.adds_gradient:
            return logits
        result: torch.Tensor = _AddToGradient.apply(logits, self._gradient(logits.detach()[:counted]))
        return result

    def _gradient(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns the gradient of the balance terms with respect to the logits [N, E], as this rank's part of it."""
        softmax = logits.softmax(-1)
        # d pₑ / d logitⱼ, for both kinds of scores, times the loads.
        p, slope = (softmax, 1.0) if self.score == "softmax" else _normalized_sigmoid(logits)
        auxiliary = p * slope * (self.load - (p * self.load).sum(-1, keepdim=True))
        z = 2.0 * logits.logsumexp(-1, keepdim=True) * softmax
        alpha, beta = (self.factors / self.ranks).unbind()
        return (alpha * auxiliary + beta * z).to(logits.dtype)

    def count_choices(self, chosen: torch.Tensor, scores: torch.Tensor) -> None:
        """Counts choices.

        Args:
            chosen: int64 [N, top_k].
            scores: [N, E], without gradient.
        """
        flat = chosen.flatten()
        self.counts.scatter_add_(0, flat, torch.ones_like(flat))
        p = scores / scores.sum(-1, keepdim=True).clamp(min=1e-30)
        entropy = -(p * p.clamp(min=1e-30).log()).sum(dtype=torch.float64)
        self.entropy += torch.stack([entropy, torch.full_like(entropy, len(scores))])


def _normalized_sigmoid(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (sigmoids divided by their sum, 1 - sigmoid) of [N, E]."""
    scores = logits.sigmoid()
    return scores / scores.sum(-1, keepdim=True).clamp(min=1e-30), 1.0 - scores


class _AddToGradient(torch.autograd.Function):
    """Forward, the logits; backward, their gradient plus a further one."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(extra)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (extra,) = ctx.saved_tensors
        return grad + F.pad(extra, (0, 0, 0, len(grad) - len(extra))), None
