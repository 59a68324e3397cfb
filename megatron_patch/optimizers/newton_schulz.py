"""Orthogonalization of matrices by Newton-Schulz steps.

In: a batch of matrices. Out: matrices with the same singular vectors and singular values near 1. A step computes
X ← a·X + b·(X·Xᵀ)·X + c·(X·Xᵀ)²·X, which maps each singular value σ to a·σ + b·σ³ + c·σ⁵.
"""

from __future__ import annotations

import torch

from megatron_patch.config.options import MuonCoefficients

Coefficients = tuple[float, float, float]

_POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
"""The best polynomial of degree 5 for each step, from singular values of at least 1e-3 (arXiv 2505.16932)."""
_MARGIN = 1.01
"""Rounding in bfloat16 may leave singular values this far above the bound for which a polynomial is the best one (the same paper)."""

COEFFICIENTS: dict[MuonCoefficients, tuple[Coefficients, ...]] = {
    # One polynomial for all steps (Keller Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024).
    "simple": ((3.4445, -4.7750, 2.0315),),
    # A polynomial for each of five steps (modded-nanogpt, train_gpt_medium.py); Megatron's default.
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "polar_express": (*((a / _MARGIN, b / _MARGIN**3, c / _MARGIN**5) for a, b, c in _POLAR_EXPRESS), (1.875, -1.25, 0.375)),
}
"""The coefficients (a, b, c) of each step, by the names of Megatron, which are those of NVIDIA's Emerging-Optimizers."""


def coefficients(kind: MuonCoefficients, steps: int) -> list[Coefficients]:
    """Returns the coefficients (a, b, c) of each step.

    Steps after those of the table begin with its first ones again; those of "polar_express" have the last ones, to which the
    polynomials converge.
    """
    table = COEFFICIENTS[kind]
    return [table[min(step, len(table) - 1) if kind == "polar_express" else step % len(table)] for step in range(steps)]


def newton_schulz(matrices: torch.Tensor, kind: MuonCoefficients = "simple", steps: int = 5) -> torch.Tensor:
    """Returns the orthogonalized matrices.

    Args:
        matrices: [N, rows, columns]; the products are computed in its dtype.
        kind: which coefficients.
        steps: number of steps.

    Returns:
        [N, rows, columns]: about U·Vᵀ for a matrix U·S·Vᵀ; zeros for a matrix of zeros.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = (x / norm.clamp(min=1e-7)).to(matrices.dtype)
    for a, b, c in coefficients(kind, steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
