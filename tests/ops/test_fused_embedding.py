"""The compiled patch embedding: against the formula in float64, reproducible bits, errors, torch's operator checks, and the fallback."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_patch import ops
from megatron_patch.ops import fused_embedding, native
from tests.cuda_on_cpu import kernels as kernels_on_cpu

compiled = pytest.mark.skipif(native.load_error() is not None, reason=f"compiled operators: {native.load_error()}")
PACKAGE = Path(native.__file__).parent.parent

# Half a unit in the last place of the result's dtype, and float32's sum before it.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SUBNORMAL = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2**-25}


def case(seed, patches, k, vocab, hidden, dtype):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, hidden, generator=generator).to(dtype).requires_grad_()
    ids = torch.randint(0, vocab, (*patches, k), generator=generator)
    grad = torch.randn(*patches, hidden, generator=generator).to(dtype)
    return weight, ids, grad


def mean_of_rows(weight, ids):
    """The formula, in float64."""
    return F.embedding(ids, weight.double()).mean(dim=-2)


def gradient_of_rows(vocab, ids, grad):
    """Its derivative, term by term in float64; and the sum of the terms' magnitudes, by which a sum's error is measured."""
    k = ids.shape[-1]
    terms = (grad.double() / k).unsqueeze(-2).expand(*ids.shape, grad.shape[-1]).reshape(ids.numel(), grad.shape[-1])
    total = torch.zeros(vocab, grad.shape[-1], dtype=torch.float64, device=grad.device)
    return total.index_add(0, ids.reshape(-1), terms), total.index_add(0, ids.reshape(-1), terms.abs())


def assert_within(value, exact, magnitude, dtype):
    allowed = 1e-6 * magnitude + ROUNDING[dtype] * exact.abs() * (1 + 1e-6) + SUBNORMAL[dtype]
    assert value.dtype == dtype and value.shape == exact.shape
    assert bool(((value.double() - exact).abs() <= allowed).all())


@compiled
@settings(max_examples=80)
@given(
    st.integers(0, 10**6),
    st.lists(st.integers(0, 7), min_size=0, max_size=3),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(0, 33),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_equals_the_formula_in_float64(seed, patches, k, vocab, hidden, dtype):
    weight, ids, grad = case(seed, patches, k, vocab, hidden, dtype)
    out = fused_embedding.patch_embedding(weight, ids)
    out.backward(grad)
    exact = mean_of_rows(weight.detach(), ids)
    assert_within(out.detach(), exact, mean_of_rows(weight.detach().abs(), ids), dtype)
    exact_grad, magnitude = gradient_of_rows(vocab, ids, grad)
    assert_within(weight.grad, exact_grad, magnitude, dtype)


@compiled
@pytest.mark.parametrize(
    ("patches", "k", "vocab", "hidden"), [((700,), 4, 50, 64), ((3, 300), 2, 3, 257), ((2000,), 1, 5000, 8), ((64,), 16, 1, 1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_formula_where_many_threads_and_long_sums_work(patches, k, vocab, hidden, dtype):
    weight, ids, grad = case(7, patches, k, vocab, hidden, dtype)
    out = fused_embedding.patch_embedding(weight, ids)
    out.backward(grad)
    assert_within(out.detach(), mean_of_rows(weight.detach(), ids), mean_of_rows(weight.detach().abs(), ids), dtype)
    exact_grad, magnitude = gradient_of_rows(vocab, ids, grad)
    assert_within(weight.grad, exact_grad, magnitude, dtype)


@compiled
def test_derivatives_of_both_orders_agree_with_differences_in_float64():
    weight, ids, _ = case(8, (2, 3), 4, 5, 3, torch.float64)
    assert torch.autograd.gradcheck(fused_embedding.patch_embedding, (weight, ids))
    assert torch.autograd.gradgradcheck(fused_embedding.patch_embedding, (weight, ids))
    assert torch.autograd.gradcheck(fused_embedding.patch_embedding, (weight, ids, 2))


@compiled
@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(0, 60), st.integers(1, 30), st.integers(1, 40))
def test_one_token_a_patch_is_an_ordinary_embedding_to_the_last_bit(seed, patches, vocab, hidden):
    weight, ids, grad = case(seed, (patches,), 1, vocab, hidden, torch.float32)
    other = weight.detach().clone().requires_grad_()
    ours, theirs = fused_embedding.patch_embedding(weight, ids), F.embedding(ids.squeeze(-1), other)
    ours.backward(grad)
    theirs.backward(grad)
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
    assert torch.equal(weight.grad.view(torch.int32), other.grad.view(torch.int32))


@compiled
def test_zeros_keep_the_signs_that_an_ordinary_embedding_gives_them():
    weight = torch.tensor([[-0.0, 0.0], [1.0, -1.0]], requires_grad=True)
    ids = torch.tensor([[0], [1]])
    grad = torch.tensor([[-0.0, 1.0], [0.0, -0.0]])
    other = weight.detach().clone().requires_grad_()
    ours, theirs = fused_embedding.patch_embedding(weight, ids), F.embedding(ids.squeeze(-1), other)
    ours.backward(grad)
    theirs.backward(grad)
    assert torch.equal(ours.signbit(), theirs.signbit())
    assert torch.equal(weight.grad.signbit(), other.grad.signbit())


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 4])
def test_the_bits_do_not_depend_on_threads(dtype, k):
    weight, ids, grad = case(1, (3000,), k, 2000, 64, dtype)
    ids = torch.where(ids % 3 == 0, 7, ids)  # one token far more frequent than the rest
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            out = fused_embedding.patch_embedding(weight, ids)
            (gradient,) = torch.autograd.grad(out, weight, grad)
            results.append((out.detach(), gradient))
    finally:
        torch.set_num_threads(threads)
    for out, gradient in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(gradient, results[0][1])


@compiled
def test_a_gradient_of_many_pages_is_zero_where_no_id_points():
    weight, ids, grad = case(9, (5,), 3, 9000, 256, torch.float32)
    fused_embedding.patch_embedding(weight, ids).backward(grad)
    touched = torch.zeros(9000, dtype=torch.bool)
    touched[ids.flatten()] = True
    assert not weight.grad[~touched].any()
    torch.testing.assert_close(weight.grad.double(), gradient_of_rows(9000, ids, grad)[0])


@compiled
@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 6))
def test_shards_of_the_vocabulary_sum_to_the_whole(seed, shards, k):
    weight, ids, grad = case(seed, (9,), k, 24, 8, torch.float32)
    whole = fused_embedding.patch_embedding(weight, ids)
    whole.backward(grad)
    rows = 24 // shards
    parts = [weight.detach()[i * rows : (i + 1) * rows].clone().requires_grad_() for i in range(shards)]
    total = torch.stack([fused_embedding.patch_embedding(part, ids, vocab_start=i * rows) for i, part in enumerate(parts)]).sum(dim=0)
    total.backward(grad)
    torch.testing.assert_close(total, whole)
    assert torch.equal(torch.cat([part.grad for part in parts]), weight.grad)


@compiled
def test_a_shard_divides_by_all_of_the_patch():
    weight = torch.tensor([[8.0], [16.0]])
    ids = torch.tensor([[100, 5, 6, 7]])
    assert fused_embedding.patch_embedding(weight, ids, vocab_start=100).tolist() == [[2.0]]
    assert fused_embedding.patch_embedding(weight, ids, vocab_start=200).tolist() == [[0.0]]


@compiled
@pytest.mark.parametrize("bad", [-1, 24, 2**40])
@pytest.mark.parametrize("traced", [False, True])
def test_ids_outside_the_vocabulary_are_named(bad, traced):
    weight, ids, _ = case(3, (9,), 5, 24, 8, torch.float32)
    ids[4, 2] = bad
    function = (
        torch.compile(fused_embedding.patch_embedding, fullgraph=True, backend="aot_eager") if traced else fused_embedding.patch_embedding
    )
    with pytest.raises(ValueError, match=rf"token_ids range from .*{bad}.*allowed: 0 to 23"):
        function(weight, ids)


@compiled
def test_wrong_arguments_are_value_errors_that_name_them():
    weight, ids, _ = case(4, (3,), 2, 24, 8, torch.float32)
    for arguments, words in (
        ((weight, ids.float()), "token_ids has dtype Float; allowed: int64"),
        ((weight, torch.tensor(3)), "token_ids must be"),
        ((weight, ids[:, :0]), "token_ids must be .* not K = 0"),
        ((weight[0], ids), "weight must be"),
        ((weight.long(), ids), "weight is Long; allowed: float32"),
    ):
        with pytest.raises(ValueError, match=words):
            fused_embedding.patch_embedding(*arguments)
    with pytest.raises(ValueError, match="grad must have one row"):
        torch.ops.megatron_patch.patch_embedding_backward(torch.zeros(2, 8), ids, 24)


@compiled
def test_views_and_narrow_ids_give_what_copies_give():
    weight, ids, grad = case(5, (6, 4), 3, 24, 8, torch.float32)
    expected = fused_embedding.patch_embedding(weight, ids)
    (expected_grad,) = torch.autograd.grad(expected, weight, grad)
    turned = weight.detach().t().contiguous().t().requires_grad_()
    strided = torch.stack([ids, ids], dim=-1)[..., 0]
    for table, numbers in ((turned, ids), (weight, strided), (weight, ids.int())):
        out = fused_embedding.patch_embedding(table, numbers)
        (gradient,) = torch.autograd.grad(out, table, grad.transpose(0, 1).contiguous().transpose(0, 1))
        assert torch.equal(out, expected) and torch.equal(gradient, expected_grad)
    (gradient,) = torch.autograd.grad(fused_embedding.patch_embedding(weight, ids).sum(), weight)  # a gradient that is one number, expanded
    torch.testing.assert_close(gradient, gradient_of_rows(24, ids, torch.ones_like(grad))[0].float())


@compiled
@pytest.mark.parametrize(("patches", "k", "hidden"), [((2, 5), 3, 8), ((), 4, 8), ((0,), 2, 8), ((4,), 2, 0), ((0, 3), 1, 0)])
@pytest.mark.parametrize("number", [torch.int64, torch.int32])
@pytest.mark.parametrize("vocab_start", [None, 2])
def test_what_stands_before_the_gpu_s_kernel_hands_it_every_shape_sorted(monkeypatch, patches, k, hidden, number, vocab_start):
    """The kernels themselves are a row for each id and a sum over sorted rows, here the formulas'."""
    kernels, num_rows = torch.ops.megatron_patch, 3

    def rows_of(ids, rows, start):
        return (ids.flatten().long() - (start or 0)).clamp(-1, rows).int()

    def ids_of(grad, sorted_rows, order, patch_size):
        assert grad.dim() == 2 and patch_size == k and sorted_rows.dtype == torch.int32 and order.dtype == torch.int64
        assert bool((sorted_rows.diff() >= 0).all()) and bool((order.diff()[sorted_rows.diff() == 0] > 0).all())
        return torch.empty_like(order).scatter_(0, order, sorted_rows.long()).reshape(len(grad), k)

    def sums(grad, sorted_rows, order, patch_size, rows):
        return kernels.patch_embedding_backward(grad, ids_of(grad, sorted_rows, order, patch_size), rows, 0)

    def add_sums(accumulator, grad, sorted_rows, order, patch_size):
        kernels.patch_embedding_backward_add_(accumulator, grad, ids_of(grad, sorted_rows, order, patch_size), 0)

    monkeypatch.setattr(kernels, "patch_embedding_rows", rows_of, raising=False)
    monkeypatch.setattr(kernels, "patch_embedding_sorted_backward", sums, raising=False)
    monkeypatch.setattr(kernels, "patch_embedding_sorted_backward_add_", add_sums, raising=False)
    _, ids, grad = case(7, patches, k, 6, hidden, torch.float32)
    expected = kernels.patch_embedding_backward(grad, ids, num_rows, vocab_start or 0)
    assert torch.equal(fused_embedding._backward_on_cuda(grad, ids.to(number), num_rows, vocab_start), expected)
    accumulator = torch.ones(num_rows, hidden)
    fused_embedding._backward_add_on_cuda(accumulator, grad, ids.to(number), vocab_start)
    assert torch.equal(accumulator, expected + 1)


@pytest.fixture(scope="module")
def gpu_code(tmp_path_factory):
    """The GPU's kernels, on the CPU."""
    if kernels_on_cpu.cuda_include() is None or shutil.which("g++") is None:
        pytest.skip("CUDA's headers (nvcc) and g++ are needed")
    folder = tmp_path_factory.mktemp("embedding")
    for name in ("patch_embedding.cu", "common.cuh", "launch.h"):
        shutil.copy(kernels_on_cpu.SOURCES / name, folder)
    kernels_on_cpu.compile_kernels(folder, folder / "kernels.so")
    return kernels_on_cpu.CudaOnCpu(ctypes.CDLL(str(folder / "kernels.so")))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 6, 7, 8])
def test_the_gpu_s_kernels_give_the_cpu_s_bits(gpu_code, dtype, k):
    """Whether the mean is a product or a quotient, in one tile; with numbers too small to be normal, infinite ones and zeros of both signs."""
    weight, ids, grad = case(k, (8,), k, 12, 16, dtype)
    for table in (weight.data, grad):
        table[1] *= torch.finfo(dtype).tiny
        table[2] = -0.0
        table[3, ::2] = float("inf")
    kernels = torch.ops.megatron_patch
    for start, rows in ((None, 12), (0, 5), (5, 7)):
        shard = weight.data[start or 0 :][:rows].contiguous()
        ours, theirs = kernels.patch_embedding(shard, ids, start), gpu_code.patch_embedding(shard, ids, start)
        assert torch.equal(bits(ours), bits(theirs))
        ours, theirs = kernels.patch_embedding_backward(grad, ids, rows, start), gpu_code.patch_embedding_backward(grad, ids, rows, start)
        assert torch.equal(bits(ours), bits(theirs))
        accumulator = torch.randn(rows, 16, generator=torch.Generator().manual_seed(k)).to(ops.plain.accumulation_dtype(dtype))
        theirs = gpu_code.patch_embedding_backward(grad, ids, rows, start, accumulator)
        kernels.patch_embedding_backward_add_(accumulator, grad, ids, start)
        assert torch.equal(bits(accumulator), bits(theirs))


def bits(tensor):
    """The numbers' bits; all that are not a number are one."""
    numbers = tensor.detach().clone()
    numbers[numbers.isnan()] = float("nan")
    return numbers.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpu_s_kernels_add_runs_of_many_tiles_to_an_accumulator_and_leave_the_other_rows(gpu_code, dtype):
    _, ids, grad = case(3, (200,), 4, 30, 24, dtype)
    ids[20:150] = 17
    touched = torch.zeros(40, dtype=torch.bool)
    touched[ids.flatten()] = True
    exact, magnitude = gradient_of_rows(40, ids, grad)
    for order, shift in itertools.product(kernels_on_cpu.ORDERS, (0, 1)):
        machine = dataclasses.replace(gpu_code, order=order, shift=shift)
        whole = machine.patch_embedding_backward(grad, ids, 40, None, torch.where(touched, 3.0, float("nan"))[:, None].repeat(1, 24))
        assert bool(whole[~touched].isnan().all())
        assert_within(whole[touched], (exact + 3)[touched], (magnitude + 3)[touched], torch.float32)
        parts = [machine.patch_embedding_backward(grad, ids, 20, start, torch.full((20, 24), 3.0)) for start in (0, 20)]
        assert torch.equal(torch.cat(parts)[touched], whole[touched]), "an id's sum does not depend on the shard"


@compiled
@settings(max_examples=60)
@given(
    st.integers(0, 10**6),
    st.lists(st.integers(0, 7), min_size=0, max_size=3),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 33),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.booleans(),
)
def test_an_accumulator_takes_the_gradient_unrounded_and_the_weight_gets_none(seed, patches, k, vocab, hidden, dtype, fused):
    weight, ids, grad = case(seed, patches, k, vocab, hidden, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    start = torch.randn(vocab, hidden, generator=torch.Generator().manual_seed(seed)).to(wide)
    accumulator = start.clone()
    out = ops.patch_embedding(weight, ids, "fused" if fused else "plain", weight_grad_accumulator=accumulator)
    assert torch.equal(out, ops.patch_embedding(weight, ids, "fused" if fused else "plain"))
    out.backward(grad)
    exact, magnitude = gradient_of_rows(vocab, ids, grad)
    # The plain formula's gradient is rounded to the weight's dtype at each occurrence.
    error = 1e-6 if fused else 1e-6 + 9 * torch.finfo(dtype).eps
    assert weight.grad is None
    assert bool(((accumulator.double() - start - exact).abs() <= error * (magnitude + start.abs())).all())


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_an_accumulator_of_zeros_holds_what_the_gradient_is_rounded_from(dtype):
    weight, ids, grad = case(2, (300,), 3, 50, 24, dtype)
    accumulator = torch.zeros(50, 24, dtype=ops.plain.accumulation_dtype(dtype))
    fused_embedding.patch_embedding(weight, ids, None, accumulator).backward(grad)
    (gradient,) = torch.autograd.grad(fused_embedding.patch_embedding(weight, ids), weight, grad)
    assert torch.equal(accumulator.to(dtype), gradient)
    parts = [torch.zeros(rows, 24, dtype=accumulator.dtype) for rows in (20, 30)]
    for start, part in ((0, parts[0]), (20, parts[1])):
        shard = weight.detach()[start:][: len(part)].clone().requires_grad_()
        fused_embedding.patch_embedding(shard, ids, start, part).backward(grad)
    assert torch.equal(torch.cat(parts), accumulator)


@compiled
def test_an_accumulator_sums_several_backward_passes_and_its_other_rows_are_not_touched():
    weight, ids, grad = case(2, (30,), 4, 5000, 16, torch.bfloat16)
    touched = torch.zeros(5000, dtype=torch.bool)
    touched[ids.flatten()] = True
    accumulator = torch.where(touched, 0.0, float("nan"))[:, None].repeat(1, 16)
    first, second = (fused_embedding.patch_embedding(weight, each, None, accumulator) for each in (ids, ids.flip(0)))
    first.backward(grad)
    second.backward(grad.flip(0))
    exact, magnitude = gradient_of_rows(5000, ids, grad)
    assert bool(accumulator[~touched].isnan().all())
    assert_within(accumulator[touched], 2 * exact[touched], 2 * magnitude[touched], torch.float32)
    frozen = fused_embedding.patch_embedding(weight.detach(), ids, None, accumulator)
    assert not frozen.requires_grad


@pytest.mark.parametrize("operators", [pytest.param("fused", marks=compiled), "plain"])
def test_an_accumulator_that_does_not_fit_is_named(operators):
    weight, ids, grad = case(4, (3,), 2, 24, 8, torch.bfloat16)
    for accumulator in (
        torch.zeros(24, 9),
        torch.zeros(23, 8),
        torch.zeros(24, 8, dtype=torch.bfloat16),
        torch.zeros(8, 24).t(),
        torch.zeros(24, 8, device="meta"),
        torch.zeros(24, 8, requires_grad=True),
    ):
        with pytest.raises(ValueError, match=r"weight_grad_accumulator is .*; allowed: contiguous torch.float32 \[24, 8\] on cpu"):
            ops.patch_embedding(weight, ids, operators, weight_grad_accumulator=accumulator)
    if operators == "fused":
        add = torch.ops.megatron_patch.patch_embedding_backward_add_
        for arguments, words in (
            ((torch.zeros(24, 9), grad, ids), "accumulator must be .*H of grad"),
            ((torch.zeros(24, 8, dtype=torch.bfloat16), grad, ids), "accumulator is BFloat16; allowed: Float"),
            ((torch.zeros(24, 8), grad[:2], ids), "grad must have one row"),
            ((torch.zeros(24, 8), grad, ids.float()), "token_ids has dtype Float"),
        ):
            with pytest.raises(ValueError, match=words):
                add(*arguments)


@compiled
def test_passes_the_operator_checks_of_torch():
    for vocab_start in (None, 0, 5):
        weight, ids, grad = case(4, (3, 6), 4, 24, 8, torch.float32)
        torch.library.opcheck(torch.ops.megatron_patch.patch_embedding.default, (weight, ids, vocab_start))
        torch.library.opcheck(
            torch.ops.megatron_patch.patch_embedding_backward_add_.default, (torch.zeros(24, 8), grad.clone(), ids, vocab_start)
        )
        torch.library.opcheck(torch.ops.megatron_patch.patch_embedding_backward.default, (grad.requires_grad_(), ids, 24, vocab_start))


@compiled
@pytest.mark.parametrize("dynamic", [False, True])
def test_traces_without_a_graph_break(dynamic):
    traced = torch.compile(lambda w, i: ops.patch_embedding(w, i) * 2, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for patches, k in (((3, 6), 4), ((2, 5), 3)):
        weight, ids, grad = case(5, patches, k, 24, 8, torch.float32)
        (gradient,) = torch.autograd.grad(traced(weight, ids), weight, grad)
        (expected,) = torch.autograd.grad(ops.patch_embedding(weight, ids) * 2, weight, grad)
        assert torch.equal(gradient, expected)


@compiled
def test_traces_with_an_accumulator():
    traced = torch.compile(fused_embedding.patch_embedding, fullgraph=True, backend="aot_eager")
    sums = []
    for function in (traced, fused_embedding.patch_embedding):
        weight, ids, grad = case(5, (3, 6), 4, 24, 8, torch.float32)
        sums.append(torch.ones(24, 8))
        for _ in range(2):
            function(weight, ids, None, sums[-1]).backward(grad)
        assert weight.grad is None
    assert torch.equal(*sums) and not torch.equal(sums[0], torch.ones(24, 8))


@compiled
def test_the_model_uses_it_where_it_is_built():
    weight, ids, _ = case(6, (3, 6), 4, 24, 8, torch.float32)
    assert "patch_embedding" in ops.patch_embedding(weight, ids).grad_fn.name()
    assert native.supports(weight) and not native.supports(weight.to("meta"))


WITHOUT = """
    import sys, warnings
    from pathlib import Path
    import megatron_patch
    from megatron_patch.ops import native
    import torch
    import torch.nn.functional as F
    from megatron_patch import ops

    weight = torch.randn(5, 3, requires_grad=True)
    ids = torch.randint(0, 5, (2, 3, 4))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            out = ops.patch_embedding(weight, ids)
        out.sum().backward()
    torch.testing.assert_close(out, F.embedding(ids, weight).mean(dim=-2))
    assert native.load_error() and not native.available() and not native.supports(weight)
    ours = [str(warning.message) for warning in seen if "plain formulas" in str(warning.message)]
    assert len(ours) == 1, ours
    print(ours[0])
    from megatron_patch.ops.__main__ import report
    print("\\n".join(report()))
"""


@pytest.mark.parametrize(("content", "reason"), [(None, "not built at install"), (b"not a library", "does not load")])
def test_without_the_library_the_plain_formulas_serve_with_one_warning(tmp_path, content, reason):
    package = tmp_path / "megatron_patch"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "ops").symlink_to(PACKAGE / "ops")
    if content is not None:
        (package / "_C.so").write_bytes(content)
    # The copy's own __file__ decides where the library is looked for: the link is not followed.
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    warning, *lines = done.stdout.splitlines()
    assert reason in warning and "reinstall" in warning
    assert any("compiled for the CPU: none" in line and reason in line for line in lines)


@compiled
def test_the_report_names_what_is_built():
    done = subprocess.run([sys.executable, "-m", "megatron_patch.ops"], capture_output=True, text=True, check=True)
    assert f"torch {torch.__version__}" in done.stdout
    assert "linear_multi_token_loss (float32, bfloat16, float16, float64)" in done.stdout
