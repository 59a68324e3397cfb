"""Newton-Schulz steps against the polynomials of the singular values, in float64."""

import pytest
import torch

from megatron_patch.optimizers.newton_schulz import COEFFICIENTS, coefficients, newton_schulz

# Each step's (a, b, c) as NVIDIA's Emerging-Optimizers lists them, which rounds those of Polar Express to four digits.
PUBLISHED = {
    "simple": [(3.4445, -4.7750, 2.0315)],
    "quintic": [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
    "polar_express": [
        (8.2051, -22.9019, 16.4607),
        (4.0664, -2.8612, 0.5184),
        (3.9096, -2.8234, 0.5250),
        (3.2856, -2.4153, 0.4853),
        (2.2779, -1.6198, 0.3985),
        (1.8726, -1.2307, 0.3585),
        (1.8564, -1.2132, 0.3568),
        (1.8750, -1.2500, 0.3750),
    ],
}


def expected(matrix, kind, steps):
    """U·p(S)·Vᵀ, where p is applied to each singular value of the normalized matrix."""
    u, values, v = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    for a, b, c in coefficients(kind, steps):
        values = a * values + b * values**3 + c * values**5
    return u @ torch.diag(values) @ v


@pytest.mark.parametrize("kind", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(24, 24), (8, 40), (40, 8), (1, 5), (5, 1)])
def test_each_singular_value_goes_through_the_polynomials(shape, kind):
    batch = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for steps in (1, 5, 10):
        found = newton_schulz(batch, kind, steps)
        for matrix, result in zip(batch, found, strict=True):
            torch.testing.assert_close(result, expected(matrix, kind, steps), rtol=1e-9, atol=1e-9)
            alone = newton_schulz(matrix[None], kind, steps)[0]
            torch.testing.assert_close(alone, result, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "lowest", "highest"), [("simple", 0.68, 1.21), ("polar_express", 0.86, 1.14)])
def test_five_steps_bring_all_but_tiny_singular_values_near_one(kind, lowest, highest):
    values = torch.logspace(-2.3, 0, 64, dtype=torch.float64)
    u, v = (torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(n)))[0] for n in (1, 2))
    matrix = u @ torch.diag(values) @ v
    matrix *= 0.3 / matrix.norm()
    found = torch.linalg.svdvals(newton_schulz(matrix[None], kind)[0])
    usable = values / values.norm() > 3e-3
    assert int(usable.sum()) > 40 and lowest < found.flip(0)[usable].min() and found.max() < highest


@pytest.mark.parametrize("kind", COEFFICIENTS)
def test_extreme_inputs_stay_finite(kind):
    assert torch.equal(newton_schulz(torch.zeros(2, 4, 8), kind), torch.zeros(2, 4, 8))
    matrix = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(newton_schulz(matrix * 1e12, kind), newton_schulz(matrix, kind), rtol=1e-4, atol=1e-5)
    # Of a matrix of rank one the norm is the singular value, which rounding may leave above 1.
    outer = torch.randn(64, 1, generator=torch.Generator().manual_seed(4)) @ torch.randn(1, 96, generator=torch.Generator().manual_seed(5))
    for dtype in (torch.float32, torch.bfloat16):
        found = newton_schulz(outer[None].to(dtype), kind, 8)
        assert found.dtype == dtype and 0.5 < torch.linalg.svdvals(found[0].float())[0] < 1.3


@pytest.mark.parametrize("kind", COEFFICIENTS)
def test_coefficients_are_the_published_ones(kind):
    for found, published in zip(coefficients(kind, len(PUBLISHED[kind])), PUBLISHED[kind], strict=True):
        assert found == pytest.approx(published, abs=1e-4)
    assert coefficients(kind, 9)[8] == coefficients(kind, 9)[{"simple": 0, "quintic": 3, "polar_express": 7}[kind]]


def test_polar_express_converges_with_further_steps():
    matrix = torch.randn(4, 4, generator=torch.Generator().manual_seed(2))
    result = newton_schulz(matrix[None], "polar_express", 12)[0]
    torch.testing.assert_close(result @ result.T, torch.eye(4), rtol=0, atol=1e-5)
