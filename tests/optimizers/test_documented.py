"""The ranges of singular values in docs/optimizers.md."""

import re
from pathlib import Path

import numpy as np

from megatron_patch.optimizers.newton_schulz import COEFFICIENTS, coefficients

PAGE = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()


def test_singular_values_end_in_the_ranges_of_the_page():
    ranges = re.findall(r"(0\.\d\d) and (1\.\d\d)\s+\(`(\w+)`\)", PAGE)
    assert {kind for _, _, kind in ranges} == set(COEFFICIENTS)
    for low, high, kind in ranges:
        values = np.geomspace(0.003, 1, 100_001)
        for a, b, c in coefficients(kind, 5):
            values = a * values + b * values**3 + c * values**5
        assert float(low) <= values.min() < float(low) + 0.02 and float(high) - 0.02 < values.max() <= float(high), kind
