"""The plain formulas, compared with loops in float64, with torch's functions at K = 1, and with derivatives computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.ops import plain
from megatron_patch.ops.plain import IGNORE_INDEX, patch_embedding

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def multi_token_loss(logits, labels, weights=None, z_loss=0.0):
    """The summed loss of given logits: a head that is the identity leaves them as they are, to the last bit."""
    return plain.linear_multi_token_loss(logits, torch.eye(logits.shape[1], dtype=logits.dtype), labels, weights, z_loss)


def logits_and_labels(rows, k, vocab, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (rows, k), generator=generator)
    labels = labels.masked_fill(torch.rand(rows, k, generator=generator) < 0.25, IGNORE_INDEX)
    return logits, labels


@given(
    rows=st.integers(1, 5),
    k=st.integers(1, 8),
    vocab=st.integers(1, 6),
    seed=st.integers(0, 99),
    weighted=st.booleans(),
    z_loss=st.sampled_from([0.0, 0.3]),
)
def test_the_loss_and_its_gradient_are_the_formula(rows, k, vocab, seed, weighted, z_loss):
    """d loss / d z[n, v] = (1 + 2 z lse) * (sum of weights of row n's labels) * p[n, v] - (weights of its labels that are v)."""
    logits, labels = logits_and_labels(rows, k, vocab, seed)
    weights = torch.linspace(0.5, 2.0, k, dtype=torch.float64) if weighted else None
    loss, weight = multi_token_loss(logits, labels, weights, z_loss)
    loss.backward()

    expected, expected_weight = 0.0, 0.0
    gradient = torch.zeros(rows, vocab, dtype=torch.float64)
    for n in range(rows):
        z = logits[n].tolist()
        total = sum(math.exp(x) for x in z)
        for j in range(k):
            y = int(labels[n, j])
            if y == IGNORE_INDEX:
                continue
            w = 1.0 if weights is None else float(weights[j])
            lse = math.log(total)
            expected += w * (lse - z[y] + z_loss * lse**2)
            expected_weight += w
            for v in range(vocab):
                gradient[n, v] += w * ((1 + 2 * z_loss * lse) * math.exp(z[v]) / total - (v == y))
    assert loss.dtype == weight.dtype == torch.float64
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert weight.item() == pytest.approx(expected_weight, rel=1e-12)
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_label_is_cross_entropy_to_the_last_bit(dtype):
    logits, labels = logits_and_labels(97, 1, 53, 0, dtype)
    other = logits.detach().clone().requires_grad_()
    loss, weight = multi_token_loss(logits, labels)
    wide = other if dtype == torch.float64 else other.float()
    expected = F.cross_entropy(wide, labels[:, 0], ignore_index=IGNORE_INDEX, reduction="none").sum()
    loss.backward()
    expected.backward()
    assert loss.dtype == expected.dtype and torch.equal(loss, expected)
    assert torch.equal(logits.grad, other.grad)
    assert weight == (labels != IGNORE_INDEX).sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_widened_before_the_softmax(dtype):
    """The loss of narrow logits is, to float32's rounding, that of the very same numbers in float64."""
    logits, labels = logits_and_labels(40, 4, 300, 1, dtype)
    exact, _ = multi_token_loss(logits.double(), labels)
    loss, _ = multi_token_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-6)
    narrow = -torch.log_softmax(logits, dim=-1).gather(-1, labels.clamp(min=0))[labels != IGNORE_INDEX].sum()
    assert abs(narrow.item() - exact.item()) > 10 * abs(loss.item() - exact.item()), "a softmax in the narrow type would be told apart"


def test_label_by_label_is_the_same_loss():
    logits, labels = logits_and_labels(9, 3, 7, 5)
    nll, lse = plain.multi_token_loss(logits, labels)
    torch.testing.assert_close(lse, torch.logsumexp(logits, dim=1), rtol=1e-14, atol=0.0)
    torch.testing.assert_close(nll.sum(), multi_token_loss(logits, labels)[0], rtol=1e-14, atol=0.0)
    assert nll.shape == (9, 3) and not nll[labels == IGNORE_INDEX].any()


def test_nothing_scored_is_zero_with_zero_gradient():
    logits = torch.randn(3, 5, requires_grad=True)
    loss, weight = multi_token_loss(logits, torch.full((3, 4), IGNORE_INDEX))
    loss.backward()
    assert loss == 0 and weight == 0 and not logits.grad.any()


def test_a_weight_of_zero_is_as_good_as_not_scored():
    logits, labels = logits_and_labels(6, 3, 7, 2)
    first = multi_token_loss(logits, labels, torch.tensor([1.0, 0.0, 0.0]))
    second = multi_token_loss(logits, labels[:, :1])
    torch.testing.assert_close(first, second, rtol=1e-14, atol=0.0)


@given(k=st.integers(1, 9), vocab=st.integers(1, 5), hidden=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_embedding_and_its_gradient_are_the_formula(k, vocab, hidden, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, vocab, (2, 3, k), generator=generator)
    upstream = torch.randn(2, 3, hidden, generator=generator, dtype=torch.float64)
    out = patch_embedding(weight, ids)
    out.backward(upstream)
    expected, gradient = torch.zeros_like(out), torch.zeros_like(weight)
    for b in range(2):
        for t in range(3):
            for j in range(k):
                expected[b, t] += weight[ids[b, t, j]].detach() / k
                gradient[ids[b, t, j]] += upstream[b, t] / k
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(weight.grad, gradient, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_is_an_ordinary_embedding_to_the_last_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 9, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    other = weight.detach().clone().requires_grad_()
    ids = torch.randint(0, 7, (4, 30, 1), generator=generator)
    upstream = torch.randn(4, 30, 9, generator=generator, dtype=torch.float64).to(dtype)
    mine, theirs = patch_embedding(weight, ids), F.embedding(ids[..., 0], other)
    mine.backward(upstream)
    theirs.backward(upstream)
    assert torch.equal(mine, theirs) and torch.equal(weight.grad, other.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_of_narrow_rows_is_rounded_once(dtype):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(50, 16, generator=generator).to(dtype)
    ids = torch.randint(0, 50, (8, 10, 8), generator=generator)
    expected = weight.float()[ids].mean(dim=-2).to(dtype)
    assert torch.equal(patch_embedding(weight, ids), expected)
    stepwise = weight[ids[..., 0]]
    for j in range(1, 8):
        stepwise = stepwise + weight[ids[..., j]]
    assert not torch.equal(stepwise / 8, expected), "an average in the narrow type would be told apart"
