"""Experts of any width: rows that the grouped product of torch does not take are multiplied expert by expert."""

from __future__ import annotations

import pytest
import torch

from megatron_patch.model.experts import GroupedLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 10), (10, 24), (12, 20), (16, 8)])
def test_experts_of_any_width_compute_the_products_of_their_matrices(inputs, outputs, dtype):
    torch.manual_seed(0)
    layer = GroupedLinear(3, inputs, outputs).to(dtype)
    torch.nn.init.normal_(layer.weight)
    rows, grad = torch.randn(7, inputs, dtype=dtype, requires_grad=True), torch.randn(7, outputs, dtype=dtype)
    result = layer(rows, torch.tensor([2, 2, 7], dtype=torch.int32))
    result.backward(grad)
    wide, expert = rows.detach().double(), torch.tensor([0, 0, 2, 2, 2, 2, 2])
    expected = torch.einsum("ni,noi->no", wide, layer.weight.detach().double()[expert])
    torch.testing.assert_close(result.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    expected_grad = torch.einsum("no,noi->ni", grad.double(), layer.weight.detach().double()[expert])
    torch.testing.assert_close(rows.grad.double(), expected_grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert layer.weight.grad is not None and not bool(layer.weight.grad[1].any()), "the second expert has no rows"
