"""Inputs for the loss kernels on every device, the results of the formula in float64, and the tolerance of the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from megatron_patch.ops import IGNORE_INDEX

# Half a unit in the last place of the result's dtype, and its smallest step.
ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SUBNORMAL = {torch.float64: 0.0, torch.float32: 1e-36, torch.bfloat16: 1e-36, torch.float16: 2**-25}
RELATIVE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
NARROW = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class LossCase:
    """Logits [N, V], labels [N, K] with repeated and ignored ones, and weights of labels.

    Args:
        logits: in the dtype under test.
        labels: int64.
        label_weights: [K], in the dtype that sums are taken in, or None.
        z_loss: the coefficient of lse².
    """

    logits: torch.Tensor
    labels: torch.Tensor
    label_weights: torch.Tensor | None
    z_loss: float

    @property
    def weights(self) -> torch.Tensor:
        """[N, K], float64: 0 where a label is not scored."""
        scored = (self.labels != IGNORE_INDEX).double()
        return scored if self.label_weights is None else scored * self.label_weights.double()

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(nll [N, K], lse [N]) in float64."""
        logits = self.logits.double()
        lse = torch.logsumexp(logits, dim=1)
        picked = logits.gather(1, self.labels.clamp(min=0))
        return torch.where(self.labels == IGNORE_INDEX, 0.0, lse[:, None] - picked), lse

    def exact_row_losses(self) -> torch.Tensor:
        """[N]: weighted, with the z-loss."""
        nll, lse = self.exact()
        return (self.weights * (nll + self.z_loss * lse.square()[:, None])).sum(dim=1)

    def exact_gradient(
        self, grad_nll: torch.Tensor | None = None, grad_lse: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """d loss / d logits in float64, and the sum of its terms' magnitudes; by default of the weighted loss with its z-loss."""
        lse = torch.logsumexp(self.logits.double(), dim=1)
        if grad_nll is None or grad_lse is None:
            grad_nll, grad_lse = self.weights, 2 * self.z_loss * lse * self.weights.sum(dim=1)
        scored = self.labels != IGNORE_INDEX
        taken = torch.where(scored, grad_nll.double(), 0.0)
        softmax = torch.exp(self.logits.double() - lse[:, None])
        onehot = torch.zeros_like(softmax).scatter_add(1, self.labels.clamp(min=0), taken)
        sizes = torch.zeros_like(softmax).scatter_add(1, self.labels.clamp(min=0), taken.abs())
        factor = (taken.sum(dim=1) + grad_lse.double())[:, None]
        sizes += (taken.abs().sum(dim=1) + grad_lse.double().abs())[:, None] * softmax
        return factor * softmax - onehot, sizes


def loss_case(
    seed: int,
    rows: int,
    k: int,
    vocab: int,
    dtype: torch.dtype,
    weighted: bool = False,
    z_loss: float = 0.0,
    spread: float = 3.0,
    device: str = "cpu",
) -> LossCase:
    """Returns a random case on a device; about a fifth of the labels is ignored, and a fifth repeated."""
    draw = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
    logits = (spread * torch.randn(rows, vocab, **draw)).to(dtype)
    labels = torch.randint(0, vocab, (rows, k), **draw)
    labels = torch.where(torch.rand(rows, k, **draw) < 0.2, labels[:, :1], labels)
    labels = labels.masked_fill(torch.rand(rows, k, **draw) < 0.2, IGNORE_INDEX)
    number = torch.float64 if dtype == torch.float64 else torch.float32
    weights = 1.0 / torch.arange(1, k + 1, dtype=number, device=device) if weighted else None
    return LossCase(logits, labels, weights, z_loss)


def assert_within(value: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, dtype: torch.dtype) -> None:
    """Within 1e-6 of the sum of the terms' magnitudes (1e-13 in float64), and half a unit in the last place of the dtype."""
    value = value.detach().to(exact.device).double()
    allowed = (
        RELATIVE[dtype] * magnitude
        + ROUNDING[dtype] * exact.abs() * (1 + 1e-6)
        + SUBNORMAL[dtype] * (1 + (magnitude.max() if magnitude.numel() else 0.0))
    )
    assert value.shape == exact.shape
    worst = (value - exact).abs() - allowed
    assert not bool((worst > 0).any()) and not bool(value.isnan().any()), f"off by {worst.max():.3g} more than allowed"


LOSS_CASES = st.builds(
    loss_case,
    seed=st.integers(0, 10**6),
    rows=st.integers(0, 9),
    k=st.integers(1, 9),
    vocab=st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 257, 1000, 2049, 4100])),
    dtype=st.sampled_from(NARROW),
    weighted=st.booleans(),
    z_loss=st.sampled_from([0.0, 0.01]),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
)
