"""Patch-level training written a second time, from the papers alone (arXiv 2407.12665 and 2605.06546), on transformers and torch.

Muon, too, is written from its publications (Keller Jordan's "Muon: An optimizer for hidden layers in neural networks" and
arXiv 2502.16982), one matrix at a time and in float64.

In: a model of transformers, the tokens of a dataset as an array, the spans of tokens that each step reads, and the stages. Out: for each
step the loss, the learning rate, the norm of the gradient before clipping, the tokens read, and the cost.

Nothing of megatron_patch is imported here, so that no error of its data, model, schedule or optimizer code can be in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

Spans = Sequence[tuple[int, int]]
"""The samples of a step: (first token, number of input tokens)."""


QUINTIC = ((3.4445, -4.7750, 2.0315),) * 5


def match_adamw(rows: int, columns: int) -> float:
    """The factor of arXiv 2502.16982."""
    return 0.2 * math.sqrt(max(rows, columns))


@dataclass(frozen=True)
class Muon:
    """Muon for the matrices of the blocks, AdamW for everything else.

    Args:
        momentum: its decay rate.
        nesterov: whether the mean of gradient and momentum is orthogonalized.
        scale: from (outputs, inputs) of a matrix to the factor of its update.
        coefficients: (a, b, c) of each step X <- aX + b(XX')X + c(XX')(XX')X.
        lr: learning rate of the matrices, relative to that of the stage.
        decay: their weight decay.
        vocabulary_lr: learning rate of word embeddings and head, relative to that of the stage.
        vocabulary_decay: their weight decay.
    """

    momentum: float = 0.95
    nesterov: bool = True
    scale: Callable[[int, int], float] = match_adamw
    coefficients: Sequence[tuple[float, float, float]] = QUINTIC
    lr: float = 1.0
    decay: float = 0.1
    vocabulary_lr: float = 1.0
    vocabulary_decay: float = 0.1


class MuonMatrices:
    """The matrices of the blocks and their momentum. GPT-2 of transformers stores matrices as [inputs, outputs], and query, key and value
    as one matrix, which are three matrices to Muon."""

    def __init__(self, model: nn.Module, muon: Muon) -> None:
        self.muon = muon
        blocks = model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers
        self.stored = {name: p for name, p in blocks.named_parameters() if p.ndim == 2}
        self.momentum: dict[tuple[str, int], torch.Tensor] = {}
        self.transposed = hasattr(model.base_model, "h")

    def reset(self) -> None:
        """Forgets the momentum."""
        self.momentum.clear()

    def step(self, lr: float) -> None:
        """Takes one step from the gradients."""
        for name, parameter in self.stored.items():
            parts = 3 if "c_attn" in name else 1
            pairs = zip(parameter.data.chunk(parts, dim=1), parameter.grad.chunk(parts, dim=1), strict=True)
            for number, (stored, gradient) in enumerate(pairs):
                weight, g = (stored.T, gradient.T) if self.transposed else (stored, gradient)
                self._step_matrix((name, number), weight, g.double(), lr * self.muon.lr)

    def _step_matrix(self, key: tuple[str, int], weight: torch.Tensor, g: torch.Tensor, lr: float) -> None:
        muon = self.muon
        m = self.momentum[key] = muon.momentum * self.momentum.get(key, torch.zeros_like(g)) + (1 - muon.momentum) * g
        x = muon.momentum * m + (1 - muon.momentum) * g if muon.nesterov else m
        x = x / x.square().sum().sqrt()
        for a, b, c in muon.coefficients:
            square = x @ x.T
            x = a * x + b * square @ x + c * square @ square @ x
        weight.copy_((1 - lr * muon.decay) * weight.double() - lr * muon.scale(*weight.shape) * x)


@dataclass(frozen=True)
class OracleStage:
    """A stage: patch size K, positions T of a sample, samples of a step, steps, and what the papers leave to the user.

    Args:
        lr: from the tokens that the run has read after a step to the learning rate of that step.
        weights: step of the stage, from 0 -> weight of each of the K labels of a position.
        start: what happens to the optimizer at the start of the stage: "new", "keep", or "zero moments".
    """

    patch_size: int
    positions: int
    samples: int
    steps: int
    lr: Callable[[int], float]
    start: str = "new"
    weights: Callable[[int], Sequence[float]] | None = None


def cosine(tokens: float, warmup: float, length: float, lr: float, min_lr: float) -> float:
    """Linear warm-up from 0, then half a cosine down to `min_lr`; all lengths in tokens from the schedule's start."""
    if tokens < warmup:
        return lr * tokens / warmup
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * (tokens - warmup) / (length - warmup))) / 2


def warmup_stable_decay(tokens: float, warmup: float, length: float, decay: float, lr: float, min_lr: float) -> float:
    """Linear warm-up from 0, a constant rate, and a linear decay to `min_lr` over the last `decay` tokens."""
    return min(lr, lr * tokens / warmup, min_lr + (lr - min_lr) * (length - tokens) / decay)


def patch_loss(model: nn.Module, tokens: torch.Tensor, patch_size: int, weights: torch.Tensor) -> torch.Tensor:
    """The published loss: -1/(T·K) Σ_t Σ_k w_k log p(x[(t+1)·K + k] | patches 0..t), averaged over the samples.

    Args:
        model: a causal language model of transformers.
        tokens: int64 [B, (T + 1)·K].
        patch_size: K.
        weights: w_k, [K].
    """
    patches = tokens.unflatten(1, (-1, patch_size))
    embeddings = model.get_input_embeddings()(patches[:, :-1]).mean(dim=2)
    log_p = torch.log_softmax(model(inputs_embeds=embeddings).logits, dim=-1)
    return -(log_p.gather(2, patches[:, 1:]) * weights).sum() / (patches[:, 1:].numel() * weights.mean())


def flops_per_position(model: nn.Module, positions: int) -> float:
    """Multiplications and additions of the forward pass: two for each element of each matrix, and the two products of attention, in which
    a position attends to itself and to those before it."""
    layers = [module for module in model.base_model.modules() if not isinstance(module, nn.Embedding)]
    matrices = [p for module in layers for p in module.parameters(recurse=False) if p.ndim == 2]
    elements = sum(p.numel() for p in [*matrices, model.get_output_embeddings().weight])
    return 2 * elements + model.config.num_hidden_layers * 4 * model.config.hidden_size * (positions + 1) / 2


def train(
    model: nn.Module,
    corpus: np.ndarray,
    steps: Sequence[Spans],
    stages: Sequence[OracleStage],
    token_positions: int,
    muon: Muon | None = None,
) -> Iterator[dict[str, float]]:
    """Trains and yields what the metrics of each step must be. AdamW has betas 0.9 and 0.95, epsilon 1e-8 and decay 0.1 of matrices only.

    Args:
        model: the model; its weights are changed.
        corpus: all token ids of the dataset.
        steps: the spans that each step reads.
        stages: the stages; together they have as many steps.
        token_positions: positions of a sample of the token-level training that the cost is relative to.
        muon: Muon's settings; None: AdamW steps all weights.
    """
    parameters = list(model.parameters())
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    hidden = None if muon is None else MuonMatrices(model, muon)
    if muon is not None and hidden is not None:
        vocabulary = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
        others = set(matrices) - vocabulary - set(hidden.stored.values())
        groups = [
            {"params": list(vocabulary), "weight_decay": muon.vocabulary_decay, "factor": muon.vocabulary_lr},
            {"params": list(others), "weight_decay": 0.1},
            {"params": vectors, "weight_decay": 0.0},
        ]
    remaining, tokens_read, spent = iter(steps), 0, 0.0
    for stage in stages:
        if stage.start == "new":
            optimizer = torch.optim.AdamW([dict(group) for group in groups if group["params"]], betas=(0.9, 0.95), eps=1e-8)
        if hidden is not None and stage.start != "keep":
            hidden.reset()
        if stage.start == "zero moments":
            for state in optimizer.state.values():
                state["exp_avg"].zero_()
                state["exp_avg_sq"].zero_()
        size = stage.positions * stage.patch_size
        for number in range(stage.steps):
            spans = next(remaining)
            assert [length for _, length in spans] == [size] * stage.samples, "a step reads all of its samples, whole and once"
            samples = np.stack([corpus[first : first + size + stage.patch_size] for first, _ in spans])
            weights = stage.weights(number) if stage.weights else [1.0] * stage.patch_size
            tokens_read += size * stage.samples
            spent += stage.samples * stage.positions * flops_per_position(model, stage.positions)
            model.zero_grad()
            loss = patch_loss(model, torch.from_numpy(samples.astype(np.int64)), stage.patch_size, torch.tensor(weights))
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = stage.lr(tokens_read) * group.get("factor", 1.0)
            optimizer.step()
            if hidden is not None:
                hidden.step(stage.lr(tokens_read))
            cost = spent / flops_per_position(model, token_positions) / tokens_read
            yield {"loss": loss.item(), "lr": stage.lr(tokens_read), "grad_norm": norm.item(), "tokens": tokens_read, "cost": cost}
    assert next(remaining, None) is None, "the stages have as many steps as the run"
