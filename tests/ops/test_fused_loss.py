"""The compiled multi-token loss against the formula in float64: losses, gradients, shards, bits, errors, tracing, memory."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from megatron_patch.ops import IGNORE_INDEX, fused_linear_loss, fused_loss, native, plain
from tests.ops.cases import LOSS_CASES, NARROW, assert_within, loss_case

pytestmark = pytest.mark.skipif(native.load_error() is not None, reason=f"compiled operators: {native.load_error()}")
kernels = torch.ops.megatron_patch


@settings(max_examples=150)
@given(LOSS_CASES, st.integers(0, 99))
def test_losses_and_their_gradient_equal_the_formula_in_float64(case, seed):
    logits = case.logits.clone().requires_grad_()
    nll, lse = fused_loss.multi_token_loss(logits, case.labels)
    exact_nll, exact_lse = case.exact()
    assert nll.dtype == lse.dtype == torch.float32
    assert_within(nll, exact_nll, exact_nll.abs() + 0.1, torch.float32)
    assert_within(lse, exact_lse, exact_lse.abs() + case.logits.double().amax(dim=1).abs(), torch.float32)
    generator = torch.Generator().manual_seed(seed)
    grad_nll, grad_lse = torch.randn(nll.shape, generator=generator), torch.randn(lse.shape, generator=generator)
    torch.autograd.backward((nll, lse), (grad_nll, grad_lse))
    assert_within(logits.grad, *case.exact_gradient(grad_nll, grad_lse), case.logits.dtype)


@settings(max_examples=100)
@given(LOSS_CASES)
def test_loss_and_gradient_in_one_go_equal_the_formula_in_float64(case):
    rows = case.logits.clone()
    losses = kernels.multi_token_loss_and_gradient_(rows, case.labels, case.label_weights, case.z_loss)
    exact = case.exact_row_losses()
    lse = case.exact()[1]
    magnitude = (
        exact.abs()
        + 0.1 * case.weights.sum(dim=1)
        + case.z_loss * (lse.abs() + case.logits.double().amax(dim=1).abs()).square() * case.weights.sum(dim=1)
    )
    assert_within(losses, exact, magnitude, torch.float32)
    assert_within(rows, *case.exact_gradient(), case.logits.dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("rows", "k", "vocab"), [(300, 4, 3000), (3, 16, 50_000), (64, 1, 4097), (1000, 2, 3)])
def test_many_threads_and_long_rows(rows, k, vocab, dtype):
    case = loss_case(3, rows, k, vocab, dtype, weighted=True, z_loss=1e-3)
    in_place = case.logits.clone()
    losses = kernels.multi_token_loss_and_gradient_(in_place, case.labels, case.label_weights, case.z_loss)
    assert_within(losses, case.exact_row_losses(), 2 * case.exact_row_losses() + 0.1 * case.weights.sum(dim=1), torch.float32)
    assert_within(in_place, *case.exact_gradient(), dtype)


def test_derivatives_agree_with_differences_in_float64():
    case = loss_case(8, 4, 3, 7, torch.float64, weighted=True)
    assert torch.autograd.gradcheck(lambda z: fused_loss.multi_token_loss(z, case.labels), case.logits.clone().requires_grad_())
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    labels = loss_case(1, 5, 3, 7, torch.float64).labels

    def linear(h, w):
        return fused_linear_loss.linear_multi_token_loss(h, w, labels, case.label_weights, 0.1, chunk_rows=2)[0]

    assert torch.autograd.gradcheck(linear, (hidden, weight))
    assert torch.autograd.gradcheck(linear, (hidden.detach(), weight))
    assert torch.autograd.gradcheck(linear, (hidden, weight.detach()))


@settings(max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(0, 23),
    st.integers(1, 5),
    st.integers(1, 300),
    st.integers(1, 33),
    st.integers(1, 30),
    st.booleans(),
    st.sampled_from([0.0, 0.01]),
)
def test_the_chunked_head_equals_the_plain_formula_in_float64(seed, rows, k, vocab, width, chunk_rows, weighted, z_loss):
    case = loss_case(seed, rows, k, vocab, torch.float32, weighted, z_loss)
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(rows, width, generator=generator), torch.randn(vocab, width, generator=generator)
    results = []
    for function, dtype in ((fused_linear_loss.linear_multi_token_loss, torch.float32), (plain.linear_multi_token_loss, torch.float64)):
        h, w = hidden.to(dtype, copy=True).requires_grad_(), weight.to(dtype, copy=True).requires_grad_()
        extra = {"chunk_rows": chunk_rows} if dtype == torch.float32 else {}
        loss, count = function(h, w, case.labels, case.label_weights, z_loss, **extra)
        (loss * 0.7).backward()
        results.append((loss, count, h.grad, w.grad))
    (loss, count, by_hidden, by_weight), (exact, exact_count, exact_by_hidden, exact_by_weight) = results
    assert loss.item() == pytest.approx(exact.item(), rel=2e-6, abs=1e-6) and count.item() == pytest.approx(exact_count.item())
    for value, expected in ((by_hidden, exact_by_hidden), (by_weight, exact_by_weight)):
        assert (value.double() - expected).norm() <= 3e-6 * (expected.norm() + rows * (1 + z_loss))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_get_gradients_that_were_summed_in_float32(dtype):
    """Many chunks, so that a sum in the narrow dtype would be rounded at each."""
    generator = torch.Generator().manual_seed(1)
    hidden = (1 + torch.randn(512, 16, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(40, 16, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, 40, (512, 4), generator=generator)
    fused_linear_loss.linear_multi_token_loss(hidden, weight, labels, chunk_rows=4)[0].backward()
    assert weight.grad.dtype == hidden.grad.dtype == dtype
    # What the very same logits and their rounded gradients sum to.
    logits = F.linear(hidden.detach(), weight.detach())
    kernels.multi_token_loss_and_gradient_(logits, labels)
    for value, first, second in ((weight.grad, logits.t(), hidden.detach()), (hidden.grad, logits, weight.detach())):
        assert_within(value, first.double() @ second.double(), first.double().abs() @ second.double().abs(), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1 / 3, 1e5])
def test_narrow_gradients_are_scaled_in_float32_and_rounded_once(dtype, factor):
    """Rounded first, the factor would put every element off by as much; and 1e5 is past float16's range, where its products are not."""
    case = loss_case(6, 64, 3, 40, dtype)
    hidden = (1e-2 * torch.randn(64, 16, generator=torch.Generator().manual_seed(1))).to(dtype).requires_grad_()
    weight = (1e-2 * torch.randn(40, 16, generator=torch.Generator().manual_seed(2))).to(dtype).requires_grad_()
    loss, _ = fused_linear_loss.linear_multi_token_loss(hidden, weight, case.labels)
    unscaled = kernels.linear_multi_token_loss(hidden.detach(), weight.detach(), case.labels, None, 0.0, None, None, 4096, True)[1:]
    scaled = torch.autograd.grad(loss * factor, (hidden, weight))
    for value, exact in zip(scaled, unscaled, strict=True):
        assert value.dtype == dtype and torch.equal(value, (exact.float() * torch.tensor(factor)).to(dtype))


@settings(max_examples=40)
@given(LOSS_CASES, st.integers(1, 4))
def test_shards_of_the_vocabulary_give_what_the_whole_gives(case, shards):
    """Combines the statistics of all shards by hand, as `losses_from_statistics` does after its gather."""
    rows, vocab = case.logits.shape
    edges = [vocab * i // shards for i in range(shards + 1)]
    edges = sorted({*edges, vocab})
    parts = [case.logits[:, first:last] for first, last in pairwise(edges)]
    stats = [kernels.multi_token_loss_statistics(part, case.labels, first) for part, first in zip(parts, edges, strict=False)]
    assert all(each.shape == (rows, 2 + case.labels.shape[1]) for each in stats)
    stacked = torch.stack(stats)
    largest = stacked[..., 0].amax(dim=0)
    whole = torch.cat(
        (largest[:, None], (stacked[..., 1] * (stacked[..., 0] - largest).exp()).sum(0)[:, None], stacked[..., 2:].sum(0)), dim=1
    )
    normalizer, nll, lse = fused_loss.losses_from_statistics(whole, case.labels, None)
    exact_nll, exact_lse = case.exact()
    assert_within(nll, exact_nll, exact_nll.abs() + 0.1, torch.float32)
    grad_nll = torch.ones_like(nll)
    grads = [
        kernels.multi_token_loss_gradient(part, case.labels, normalizer, grad_nll, lse, first)
        for part, first in zip(parts, edges, strict=False)
    ]
    assert_within(torch.cat(grads, dim=1), *case.exact_gradient(grad_nll, lse), case.logits.dtype)


@pytest.mark.parametrize("dtype", NARROW)
def test_the_bits_do_not_depend_on_threads_or_on_the_way(dtype):
    case = loss_case(1, 700, 3, 900, dtype)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            rows = case.logits.clone()
            losses = kernels.multi_token_loss_and_gradient_(rows, case.labels)
            logits = case.logits.clone().requires_grad_()
            nll, lse = fused_loss.multi_token_loss(logits, case.labels)
            nll.sum().backward()
            results.append((losses, rows, nll.detach(), lse.detach(), logits.grad))
    finally:
        torch.set_num_threads(threads)
    for each in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(each, results[0], strict=True))
    assert torch.equal(results[0][1], results[0][4]), "in one go or in two, the gradient is the same"


@pytest.mark.parametrize("traced", [False, True])
def test_the_gradient_may_overwrite_the_logits(traced):
    case = loss_case(2, 9, 3, 70, torch.float32)

    def loss(hidden, in_place):
        logits = hidden * 2.0
        nll, lse = fused_loss.multi_token_loss(logits, case.labels, in_place=in_place)
        return nll.sum() + lse.sum(), logits

    torch._dynamo.reset()
    function = torch.compile(loss, fullgraph=True, backend="aot_eager") if traced else loss
    hidden = case.logits.clone().requires_grad_()
    total, logits = function(hidden, True)
    (mine,) = torch.autograd.grad(total, hidden)
    (expected,) = torch.autograd.grad(loss(hidden, False)[0], hidden)
    assert torch.equal(mine, expected)
    if not traced:
        assert torch.equal(logits.detach() * 2, expected)
    with pytest.raises(ValueError, match="contiguous to be overwritten"):
        fused_loss.multi_token_loss(case.logits.t().contiguous().t(), case.labels, in_place=True)


def test_extreme_logits_have_the_results_that_torch_gives():
    rows = torch.tensor(
        [
            [0.0, float("-inf"), 1.0, 2.0],
            [float("nan"), 0.0, 0.0, 0.0],
            [3e38, 3e38, -3e38, 0.0],
            [-200.0, 0.0, 0.0, -80.0],
            [float("-inf")] * 4,
            [float("inf"), 0.0, 0.0, 0.0],
        ]
    )
    labels = torch.tensor([[2], [1], [0], [3], [0], [1]])
    ours, theirs = rows.clone().requires_grad_(), rows.double().requires_grad_()
    nll, _ = fused_loss.multi_token_loss(ours, labels)
    expected = F.cross_entropy(theirs, labels[:, 0], reduction="none")
    nll.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(nll[:, 0].double(), expected, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-6, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("bad", [-1, 24, -101, 2**40])
def test_labels_outside_the_vocabulary_are_named(bad):
    case = loss_case(3, 9, 5, 24, torch.float32)
    case.labels[4, 2] = bad
    with pytest.raises(ValueError, match=rf"labels range from .*{bad}.*allowed: 0 to 23.*-100"):
        fused_loss.multi_token_loss(case.logits, case.labels)
    with pytest.raises(ValueError, match="labels range from"):
        fused_linear_loss.linear_multi_token_loss(torch.randn(9, 2), torch.randn(24, 2), case.labels)


def test_wrong_arguments_are_value_errors_that_name_them():
    case = loss_case(4, 3, 2, 24, torch.float32)
    for arguments, words in (
        ((case.logits, case.labels.float()), "labels has dtype Float; allowed: int64"),
        ((case.logits, case.labels[:2]), "labels must be .* the N of logits, 3"),
        ((case.logits, case.labels[:, 0]), "labels must be"),
        ((case.logits, case.labels[:, :0]), "labels must be .* not K = 0"),
        ((case.logits[0], case.labels), "logits must be .N, V., not of 1"),
        ((case.logits[:, :0], case.labels), "V >= 1"),
        ((case.logits.long(), case.labels), "logits is Long; allowed: float32"),
    ):
        with pytest.raises(ValueError, match=words):
            fused_loss.multi_token_loss(*arguments)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.multi_token_loss_and_gradient_(case.logits.t().contiguous().t(), case.labels)
    with pytest.raises(ValueError, match=r"label_weights must be \[2\]"):
        kernels.multi_token_loss_and_gradient_(case.logits, case.labels, torch.ones(3))
    with pytest.raises(ValueError, match="grad_lse must be"):
        kernels.multi_token_loss_gradient(case.logits, case.labels, torch.ones(3, 2), torch.ones(3, 2), torch.ones(4))
    with pytest.raises(ValueError, match=r"hidden is .* weight .* of one dtype"):
        fused_linear_loss.linear_multi_token_loss(torch.randn(3, 2), torch.randn(24, 3), case.labels)
    with pytest.raises(ValueError, match="chunk_rows is 0"):
        fused_linear_loss.linear_multi_token_loss(torch.randn(3, 2), torch.randn(24, 2), case.labels, chunk_rows=0)


def test_views_give_what_copies_give():
    case = loss_case(5, 6, 3, 24, torch.float32)
    expected, _ = fused_loss.multi_token_loss(case.logits, case.labels)
    wide = torch.cat((case.logits, case.logits), dim=1)
    for logits, labels in (
        (case.logits.t().contiguous().t(), case.labels),
        (wide[:, :24], case.labels),
        (case.logits, case.labels.t().contiguous().t()),
        (case.logits, case.labels.int()),
    ):
        logits = logits.detach().requires_grad_()
        nll, _ = fused_loss.multi_token_loss(logits, labels)
        assert torch.equal(nll, expected)
        nll.sum().backward()
        assert_within(logits.grad, *case.exact_gradient(), torch.float32)


def test_passes_the_operator_checks_of_torch():
    case = loss_case(4, 5, 3, 24, torch.float32)
    ones, sums = torch.ones(5), torch.ones(5, 2)
    check = torch.library.opcheck
    for start in (None, 5):
        check(kernels.multi_token_loss.default, (case.logits.clone().requires_grad_(), case.labels, start))
        check(kernels.multi_token_loss_statistics.default, (case.logits, case.labels, start))
        check(kernels.multi_token_loss_gradient.default, (case.logits, case.labels, sums, torch.ones(5, 3), ones, start))
        check(kernels.multi_token_loss_gradient_.default, (case.logits.clone(), case.labels, sums, torch.ones(5, 3), ones, start))
    check(kernels.multi_token_loss_and_gradient_.default, (case.logits.clone(), case.labels, torch.ones(3), 0.1))
    for differentiable in (True, False):
        hidden, weight = torch.randn(5, 4, requires_grad=differentiable), torch.randn(24, 4, requires_grad=differentiable)
        check(kernels.linear_multi_token_loss.default, (hidden, weight, case.labels, torch.ones(3), 0.1, None, None, 2, differentiable))


@pytest.mark.parametrize("dynamic", [False, True])
def test_traces_without_a_graph_break(dynamic):
    def both(hidden, weight, labels):
        nll, lse = fused_loss.multi_token_loss(hidden @ weight.t(), labels)
        loss, count = fused_linear_loss.linear_multi_token_loss(hidden, weight, labels, z_loss=0.1)
        return nll.sum() + lse.sum() + loss / count

    torch._dynamo.reset()
    traced = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows, k in ((6, 4), (5, 3)):
        labels = loss_case(1, rows, k, 24, torch.float32).labels
        hidden, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(24, 8, requires_grad=True)
        mine = torch.autograd.grad(traced(hidden, weight, labels), (hidden, weight))
        expected = torch.autograd.grad(both(hidden, weight, labels), (hidden, weight))
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


def peak_bytes(work) -> int:
    """The most that torch's CPU allocator held above what it held before."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_the_peak_memory_of_the_chunked_head_grows_with_the_vocabulary_by_one_chunk_and_the_weight_alone():
    rows, width, chunk_rows, k = 2048, 16, 64, 4

    def peak(vocab, function, **options):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(rows, width, generator=generator, requires_grad=True)
        weight = torch.randn(vocab, width, generator=generator, requires_grad=True)
        labels = torch.randint(0, vocab, (rows, k), generator=generator)
        return peak_bytes(lambda: torch.autograd.grad(function(hidden, weight, labels, **options)[0], (hidden, weight)))

    small, large = 1000, 5000
    grown = peak(large, fused_linear_loss.linear_multi_token_loss, chunk_rows=chunk_rows) - peak(
        small, fused_linear_loss.linear_multi_token_loss, chunk_rows=chunk_rows
    )
    # One chunk of logits, the gradient of the weight, and its scaled copy in the backward pass.
    assert grown <= (large - small) * 4 * (chunk_rows + 2 * width) * 1.02
    assert peak(large, plain.linear_multi_token_loss) >= 2 * rows * large * 4, "the measure sees the logits of the plain formula"


def test_nothing_scored_and_nothing_at_all():
    logits = torch.randn(3, 5)
    labels = torch.full((3, 4), IGNORE_INDEX)
    assert not kernels.multi_token_loss_and_gradient_(logits, labels).any() and not logits.any()
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    loss, count = fused_linear_loss.linear_multi_token_loss(hidden, weight, labels[:0])
    loss.backward()
    assert loss == 0 and count == 0 and hidden.grad.shape == (0, 8) and not weight.grad.any()


def test_evaluation_makes_no_gradients():
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    labels = torch.randint(0, 5, (6, 2))
    with torch.no_grad():
        loss, _ = fused_linear_loss.linear_multi_token_loss(hidden, weight, labels)
    expected, _ = fused_linear_loss.linear_multi_token_loss(hidden, weight, labels)
    assert not loss.requires_grad and expected.requires_grad and loss.item() == pytest.approx(expected.item(), rel=1e-6)
    _, by_hidden, by_weight = kernels.linear_multi_token_loss(hidden.detach(), weight.detach(), labels, None, 0.0, None, None, 4, False)
    assert by_hidden.numel() == by_weight.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["plain", "fused", "accumulator", "unit gradient"])
def test_capped_logits_give_the_loss_and_the_gradients_of_the_formula(way, dtype):
    """In chunks of rows, and with logits on both sides of the cap."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in ((9, 6), (24, 6)))
    labels = torch.randint(0, 24, (9, 3), generator=generator)
    labels[2, 1] = IGNORE_INDEX
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    logits = 1.5 * torch.tanh(wide[0] @ wide[1].t() / 1.5)
    assert float(logits.abs().max()) > 1.4
    scored = [logits[row].log_softmax(-1)[label] for row in range(9) for label in labels[row].tolist() if label != IGNORE_INDEX]
    expected = -torch.stack(scored).sum()
    expected.backward()

    more = {}
    if way in ("accumulator", "unit gradient"):
        more["weight_grad_accumulator"] = torch.zeros(24, 6, dtype=torch.promote_types(dtype, torch.float32))
        more["unit_gradient"] = way == "unit gradient"
    if way == "plain":
        loss, _ = plain.linear_multi_token_loss(hidden, weight, labels, logit_softcap=1.5)
    else:
        loss, _ = fused_linear_loss.linear_multi_token_loss(hidden, weight, labels, chunk_rows=4, logit_softcap=1.5, **more)
    loss.backward()
    by_weight = more.get("weight_grad_accumulator", weight.grad)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 0.02}[dtype]
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for mine, theirs in ((hidden.grad, wide[0].grad), (by_weight, wide[1].grad)):
        assert (mine - theirs).norm() <= tolerance * theirs.norm()
