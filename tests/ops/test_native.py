"""The compiled patch embedding against the plain formula in float64, its bits, its errors, and torch's own operator checks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_patch.ops import native, plain

pytestmark = pytest.mark.skipif(native.load_error() is not None, reason=f"compiled operators: {native.load_error()}")


def case(seed, patches, k, vocab, hidden, dtype):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, hidden, generator=generator).to(dtype).requires_grad_()
    ids = torch.randint(0, vocab, (*patches, k), generator=generator)
    grad = torch.randn(*patches, hidden, generator=generator).to(dtype)
    return weight, ids, grad


def exact(weight, ids, grad):
    """Mean of K embeddings and its derivative in float64."""
    wide = weight.detach().double().requires_grad_()
    out = F.embedding(ids, wide).mean(dim=-2)
    out.backward(grad.double())
    return out.detach(), wide.grad


@settings(max_examples=60)
@given(
    st.integers(0, 10**6),
    st.lists(st.integers(0, 7), min_size=1, max_size=2),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 33),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_equals_the_formula_in_float64(seed, patches, k, vocab, hidden, dtype):
    weight, ids, grad = case(seed, patches, k, vocab, hidden, dtype)
    out = native.patch_embedding(weight, ids)
    out.backward(grad)
    expected, expected_grad = exact(weight, ids, grad)
    unit = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    for value, reference in ((out, expected), (weight.grad, expected_grad)):
        assert value.dtype == dtype and value.shape == reference.shape
        scale = reference.abs().max() if reference.numel() else 1.0
        torch.testing.assert_close(value.double(), reference, rtol=unit, atol=float(unit * scale))


def test_one_token_a_patch_is_an_ordinary_embedding_to_the_last_bit():
    weight, ids, grad = case(0, (4, 50), 1, 30, 17, torch.float32)
    native.patch_embedding(weight, ids).backward(grad)
    other = weight.detach().clone().requires_grad_()
    out = F.embedding(ids.squeeze(-1), other)
    out.backward(grad)
    assert torch.equal(native.patch_embedding(weight, ids), out)
    assert torch.equal(weight.grad, other.grad)


def test_the_bits_do_not_depend_on_threads():
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            weight, ids, grad = case(1, (700,), 4, 50, 64, torch.bfloat16)
            out = native.patch_embedding(weight, ids)
            out.backward(grad)
            results.append((out.detach(), weight.grad))
    finally:
        torch.set_num_threads(threads)
    for out, grad in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.parametrize("shards", [1, 2, 3, 4])
def test_shards_of_the_vocabulary_sum_to_the_whole(shards):
    weight, ids, grad = case(2, (9,), 5, 24, 8, torch.float32)
    whole = native.patch_embedding(weight, ids)
    whole.backward(grad)
    rows = 24 // shards
    parts = [weight.detach()[i * rows : (i + 1) * rows].clone().requires_grad_() for i in range(shards)]
    total = sum(native.patch_embedding(part, ids, vocab_start=i * rows) for i, part in enumerate(parts))
    total.backward(grad)
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(torch.cat([part.grad for part in parts]), weight.grad)


@pytest.mark.parametrize("bad", [-1, 24])
def test_ids_outside_the_vocabulary_are_named(bad):
    weight, ids, _ = case(3, (9,), 5, 24, 8, torch.float32)
    ids[4, 2] = bad
    with pytest.raises(ValueError, match=rf"token_ids.*{bad}.*0 to 23"):
        native.patch_embedding(weight, ids)


def test_passes_the_operator_checks_of_torch():
    weight, ids, _ = case(4, (3, 6), 4, 24, 8, torch.float32)
    torch.library.opcheck(torch.ops.megatron_patch.patch_embedding.default, (weight, ids, 0))
    torch.library.opcheck(torch.ops.megatron_patch.patch_embedding_backward.default, (torch.randn(3, 6, 8), ids, 24, 0))


def test_traces_without_a_graph_break():
    weight, ids, grad = case(5, (3, 6), 4, 24, 8, torch.float32)
    compiled = torch.compile(lambda w, i: native.patch_embedding(w, i) * 2, fullgraph=True, backend="aot_eager")
    compiled(weight, ids).backward(grad)
    traced = weight.grad.clone()
    weight.grad = None
    (native.patch_embedding(weight, ids) * 2).backward(grad)
    assert torch.equal(traced, weight.grad)


def test_wrong_types_are_refused():
    with pytest.raises(RuntimeError, match="int64"):
        torch.ops.megatron_patch.patch_embedding(torch.randn(4, 2), torch.zeros(3, 2, dtype=torch.int32), 0)
    with pytest.raises(RuntimeError, match="float32"):
        torch.ops.megatron_patch.patch_embedding(torch.zeros(4, 2, dtype=torch.int32), torch.zeros(3, 2, dtype=torch.int64), 0)


def test_the_plain_formula_agrees():
    weight, ids, _ = case(6, (3, 6), 4, 24, 8, torch.float32)
    torch.testing.assert_close(native.patch_embedding(weight, ids), plain.patch_embedding(weight, ids))
