"""The Newton-Schulz steps map singular values by the published polynomials and keep the singular vectors."""

import pytest
import torch

from megatron_patch.optimizers.newton_schulz import newton_schulz

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


@pytest.mark.parametrize(("kind", "steps"), [("simple", 5), ("simple", 7), ("quintic", 5), ("quintic", 7), ("polar_express", 5)])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_a_step_maps_singular_values_by_its_polynomial(kind, steps, shape):
    generator = torch.Generator().manual_seed(1)
    left, _, right = torch.linalg.svd(torch.randn(*shape, generator=generator, dtype=torch.float64), full_matrices=False)
    values = torch.tensor([1.0, 0.5, 0.2, 0.1, 0.05, 0.02], dtype=torch.float64)
    expected = values / values.norm()
    for step in range(steps):
        a, b, c = PUBLISHED[kind][step % len(PUBLISHED[kind])]
        expected = a * expected + b * expected**3 + c * expected**5
    result = newton_schulz((left * values @ right)[None].float(), kind, steps)[0]
    wanted = (left * expected @ right).float()
    torch.testing.assert_close(result, wanted, rtol=0, atol=2e-3 if kind == "polar_express" else 1e-5)


def test_polar_express_converges_with_further_steps():
    matrix = torch.randn(4, 4, generator=torch.Generator().manual_seed(2))
    result = newton_schulz(matrix[None], "polar_express", 12)[0]
    torch.testing.assert_close(result @ result.T, torch.eye(4), rtol=0, atol=1e-5)
