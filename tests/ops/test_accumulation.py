"""Gradients added to an accumulator, in the backward pass or, product by product, in the forward pass, compared with the default."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from megatron_patch import ops
from megatron_patch.ops import fused_embedding, fused_linear_loss, native, plain
from tests.ops.cases import loss_case
from tests.ops.test_fused_loss import peak_bytes

compiled = pytest.mark.skipif(native.load_error() is not None, reason=f"compiled operators: {native.load_error()}")
WAYS = {"backward": {}, "forward": {"unit_gradient": True}}
kernels = torch.ops.megatron_patch


def head_case(seed, rows, k, vocab, width, dtype, weighted=True):
    """(hidden, weight, labels, label weights, an accumulator that is not empty)."""
    generator = torch.Generator().manual_seed(seed)
    case = loss_case(seed, rows, k, vocab, torch.float32, weighted)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).to(dtype).requires_grad_()
    accumulator = torch.randn(vocab, width, generator=generator).to(plain.accumulation_dtype(dtype))
    return hidden, weight, case.labels, case.label_weights, accumulator


@compiled
@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=40)
@given(
    st.integers(0, 10**6),
    st.integers(0, 23),
    st.integers(1, 5),
    st.integers(1, 200),
    st.integers(1, 33),
    st.integers(1, 30),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([0.0, 0.01]),
)
def test_what_is_added_equals_the_plain_formula_in_float64(way, seed, rows, k, vocab, width, chunk_rows, dtype, z_loss):
    hidden, weight, labels, label_weights, accumulator = head_case(seed, rows, k, vocab, width, dtype)
    start, factor = accumulator.clone(), 1.0 if way == "forward" else 0.7
    loss, count = fused_linear_loss.linear_multi_token_loss(
        *(hidden, weight, labels, label_weights, z_loss),
        chunk_rows=chunk_rows,
        weight_grad_accumulator=accumulator,
        **WAYS[way],
    )
    (loss * factor).backward()
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    exact, exact_count = plain.linear_multi_token_loss(*wide, labels, label_weights, z_loss)
    (exact * factor).backward()
    assert loss.item() == pytest.approx(exact.item(), rel=2e-6, abs=1e-6) and count.item() == pytest.approx(exact_count.item())
    assert weight.grad is None
    for value, expected, rounding in ((hidden.grad, wide[0].grad, 0.0), (accumulator.double() - start, wide[1].grad, start.norm())):
        assert (value.double() - expected).norm() <= 3e-6 * (expected.norm() + rows * (1 + z_loss) + rounding)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("way", WAYS)
def test_an_accumulator_of_zeros_holds_what_the_default_gradient_is_rounded_from(dtype, way):
    hidden, weight, labels, label_weights, accumulator = head_case(3, 300, 4, 200, 24, dtype)
    accumulator.zero_()
    loss, _ = fused_linear_loss.linear_multi_token_loss(hidden, weight, labels, label_weights, chunk_rows=70)
    by_hidden, by_weight = torch.autograd.grad(loss, (hidden, weight))
    mine, _ = fused_linear_loss.linear_multi_token_loss(
        *(hidden, weight, labels, label_weights), chunk_rows=70, weight_grad_accumulator=accumulator, **WAYS[way]
    )
    mine.backward()
    assert torch.equal(mine, loss) and torch.equal(hidden.grad, by_hidden)
    assert torch.equal(accumulator.to(dtype), by_weight)


@compiled
@pytest.mark.parametrize("way", WAYS)
def test_micro_batches_and_a_tied_embedding_add_to_one_accumulator(way):
    accumulator, total = torch.zeros(50, 8), torch.zeros(50, 8, dtype=torch.float64)
    for seed in range(3):
        _, weight, labels, label_weights, _ = head_case(seed, 40, 4, 50, 8, torch.float32)
        ids = labels.clamp(min=0)
        hidden = fused_embedding.patch_embedding(weight, ids, None, accumulator)
        ops.linear_multi_token_loss(hidden, weight, labels, label_weights, weight_grad_accumulator=accumulator, **WAYS[way])[0].backward()
        assert weight.grad is None
        wide = weight.detach().double().requires_grad_()
        plain.linear_multi_token_loss(plain.patch_embedding(wide, ids), wide, labels, label_weights)[0].backward()
        total += wide.grad
    torch.testing.assert_close(accumulator.double(), total, rtol=1e-5, atol=1e-5)


@compiled
@pytest.mark.parametrize("factor", [2.0, 0.0, float("nan")])
def test_a_broken_promise_of_a_unit_gradient_shows_as_nan(factor):
    hidden, weight, labels, label_weights, accumulator = head_case(1, 9, 3, 20, 4, torch.bfloat16)
    loss, _ = ops.linear_multi_token_loss(hidden, weight, labels, label_weights, weight_grad_accumulator=accumulator, unit_gradient=True)
    (loss * factor).backward()
    assert bool(hidden.grad.isnan().all())


@compiled
@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_added_without_a_gradient_of_the_weight(way):
    hidden, weight, labels, label_weights, accumulator = head_case(1, 9, 3, 20, 4, torch.float32)
    start = accumulator.clone()
    options = {"weight_grad_accumulator": accumulator, **WAYS[way]}
    with torch.no_grad():
        loss, _ = ops.linear_multi_token_loss(hidden, weight, labels, label_weights, **options)
    frozen, _ = ops.linear_multi_token_loss(hidden, weight.detach(), labels, label_weights, **options)
    frozen.backward()
    assert torch.equal(accumulator, start) and not loss.requires_grad and bool(hidden.grad.any())
    # Frozen hidden states: the weight's gradient alone.
    alone, _ = ops.linear_multi_token_loss(hidden.detach(), weight, labels, label_weights, **options)
    alone.backward()
    assert not torch.equal(accumulator, start) and weight.grad is None


def test_the_plain_formulas_add_too():
    hidden, weight, labels, label_weights, accumulator = head_case(1, 9, 3, 20, 4, torch.float32)
    start = accumulator.clone()
    loss, _ = ops.linear_multi_token_loss(
        hidden, weight, labels, label_weights, "plain", weight_grad_accumulator=accumulator, unit_gradient=True
    )
    by_weight = torch.autograd.grad(ops.linear_multi_token_loss(hidden, weight, labels, label_weights, "plain")[0], weight)[0]
    loss.backward()
    assert torch.equal(accumulator, start + by_weight) and weight.grad is None


@pytest.mark.parametrize("operators", [pytest.param("fused", marks=compiled), "plain"])
def test_an_accumulator_that_does_not_fit_is_named(operators):
    hidden, weight, labels, label_weights, accumulator = head_case(1, 9, 3, 20, 4, torch.bfloat16)
    for bad in (accumulator[:19], accumulator.bfloat16(), accumulator.double(), accumulator.t().contiguous().t(), accumulator.to("meta")):
        with pytest.raises(ValueError, match=r"weight_grad_accumulator is .*; allowed: contiguous torch.float32 \[20, 4\] on cpu"):
            ops.linear_multi_token_loss(hidden, weight, labels, label_weights, operators, weight_grad_accumulator=bad)
    for bad in ([0.0], 3.0):
        with pytest.raises(
            TypeError, match=rf"weight_grad_accumulator is (list|float) .*{bad}.*; allowed: a contiguous .* tensor \[20, 4\]"
        ):
            ops.linear_multi_token_loss(hidden, weight, labels, label_weights, operators, weight_grad_accumulator=bad)
    with pytest.raises(ValueError, match="unit_gradient is True without weight_grad_accumulator"):
        ops.linear_multi_token_loss(hidden, weight, labels, label_weights, operators, unit_gradient=True)


@pytest.mark.parametrize("operators", [pytest.param("fused", marks=compiled), "plain"])
def test_an_accumulator_that_shares_memory_with_the_weight_is_refused(operators):
    hidden, _, labels, label_weights, _ = head_case(1, 9, 3, 20, 4, torch.float32)
    flat = torch.randn(240)
    weight = flat[:80].view(20, 4).requires_grad_()
    for bad in (weight.detach(), flat.detach()[76:156].view(20, 4), torch.from_numpy(flat.detach().numpy())[:80].view(20, 4)):
        with pytest.raises(
            ValueError, match="weight_grad_accumulator shares memory with the weight; allowed: a tensor with separate memory"
        ):
            ops.linear_multi_token_loss(hidden, weight, labels, label_weights, operators, weight_grad_accumulator=bad)
        with pytest.raises(ValueError, match="weight_grad_accumulator shares memory with the weight"):
            ops.patch_embedding(weight, labels.clamp(min=0), operators, weight_grad_accumulator=bad)
    # An adjacent span of the same buffer does not share memory.
    accumulator = flat.detach()[80:160].view(20, 4)
    start = accumulator.clone()
    ops.linear_multi_token_loss(hidden, weight, labels, label_weights, operators, weight_grad_accumulator=accumulator)[0].backward()
    assert weight.grad is None and not torch.equal(accumulator, start)


@pytest.mark.parametrize("operators", [pytest.param("fused", marks=compiled), "plain"])
def test_the_weight_s_hooks_run_with_none(operators):
    hidden, weight, labels, label_weights, accumulator = head_case(1, 9, 3, 20, 4, torch.float32)
    seen = []
    weight.register_hook(seen.append)
    loss, _ = ops.linear_multi_token_loss(hidden, weight, labels, label_weights, operators, weight_grad_accumulator=accumulator)
    loss.backward()
    assert seen == [None] and weight.grad is None


@compiled
def test_with_a_unit_gradient_no_backward_pass_adds_whatever_it_brings():
    hidden, weight, labels, label_weights, accumulator = head_case(1, 9, 3, 20, 4, torch.float32)
    for states in (hidden, hidden.detach()):
        loss, _ = ops.linear_multi_token_loss(
            states, weight, labels, label_weights, weight_grad_accumulator=accumulator, unit_gradient=True
        )
        added = accumulator.clone()
        loss.backward(retain_graph=True)
        (2 * loss).backward()
        assert torch.equal(accumulator, added)
    assert bool(hidden.grad.isnan().all())


@compiled
def test_the_gradient_of_hidden_alone_adds_too():
    hidden, weight, labels, label_weights, accumulator = head_case(1, 9, 3, 20, 4, torch.float32)
    start = accumulator.clone()
    torch.autograd.grad(ops.linear_multi_token_loss(hidden, weight, labels, label_weights, weight_grad_accumulator=accumulator)[0], hidden)
    assert not torch.equal(accumulator, start)


@compiled
def test_passes_the_operator_checks_of_torch():
    hidden, weight, labels, label_weights, accumulator = head_case(1, 9, 3, 20, 4, torch.float32)
    arguments = (hidden.detach(), weight.detach(), labels, label_weights, 0.1, None, None, 4)
    torch.library.opcheck(kernels.linear_multi_token_loss_add_.default, (accumulator, *arguments))
    torch.library.opcheck(kernels.with_gradient.default, (hidden, weight, torch.tensor(1.0), torch.randn(9, 4)))


@compiled
@pytest.mark.parametrize("way", WAYS)
def test_traces_without_a_graph_break(way):
    def step(hidden, weight, labels, label_weights, accumulator):
        return ops.linear_multi_token_loss(hidden * 2, weight, labels, label_weights, weight_grad_accumulator=accumulator, **WAYS[way])[0]

    torch._dynamo.reset()
    results = []
    for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        hidden, weight, labels, label_weights, accumulator = head_case(1, 9, 3, 20, 4, torch.float32)
        start = accumulator.clone()
        loss = function(hidden, weight, labels, label_weights, accumulator)
        assert torch.equal(accumulator, start) == (way == "backward")
        loss.backward()
        assert weight.grad is None and not torch.equal(accumulator, start)
        results.append((loss.detach(), hidden.grad, accumulator))
    torch.testing.assert_close(*results)


@compiled
@pytest.mark.parametrize("way", WAYS)
def test_the_products_are_counted_once(way):
    hidden, weight, labels, label_weights, accumulator = head_case(1, 9, 3, 20, 4, torch.float32)
    with FlopCounterMode(display=False) as counter:
        ops.linear_multi_token_loss(hidden, weight, labels, label_weights, weight_grad_accumulator=accumulator, **WAYS[way])[0].backward()
    assert counter.get_total_flops() == 6 * 9 * 20 * 4


@compiled
def test_a_unit_gradient_needs_no_table_of_the_weight_s_size():
    vocab, width = 5000, 64
    hidden, weight, labels, label_weights, accumulator = head_case(1, 4, 2, vocab, width, torch.float32)

    def peak(**options):
        return peak_bytes(lambda: ops.linear_multi_token_loss(hidden, weight, labels, label_weights, **options)[0].backward())

    table = vocab * width * 4
    weight.grad = torch.zeros_like(weight)
    default = peak()
    backward, forward = (peak(weight_grad_accumulator=accumulator, **options) for options in WAYS.values())
    assert default >= backward + 0.9 * table and backward >= forward + 0.9 * table
