"""The CUDA operators on a GPU: the cases of the CPU against float64, reproducible bits, memory, tracing, streams, and errors.

Large cases are drawn and judged on the GPU, by torch's own float64; what ends a process' CUDA work runs in processes that start first.
"""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_patch import ops
from megatron_patch.ops import fused_embedding, fused_linear_loss, fused_loss, native, plain
from tests.ops.cases import LOSS_CASES, NARROW, assert_within, loss_case
from tests.ops.test_fused_embedding import gradient_of_rows, mean_of_rows

pytestmark = pytest.mark.gpu
kernels = torch.ops.megatron_patch

OUT_OF_RANGE = [
    ("fused_loss.multi_token_loss(torch.zeros(3, 9).cuda(), torch.tensor([[1], [9], [2]]).cuda())", "labels hold 9 in row 1"),
    ("fused_embedding.patch_embedding(torch.zeros(5, 8).cuda(), torch.tensor([[1, 2], [-3, 0]]).cuda())", "token_ids hold -3 in patch 1"),
]
"""A call, and the words that its process must end with."""


@pytest.fixture(scope="module", autouse=True)
def ended_processes():
    """One process for each call of OUT_OF_RANGE: its CUDA context does not survive it. They work while the other tests do."""
    root, processes = Path(__file__).parent.parent.parent, []
    if torch.cuda.is_available():
        for call, _ in OUT_OF_RANGE:
            script = f"import torch\nfrom megatron_patch.ops import fused_embedding, fused_loss\n{call}\ntorch.cuda.synchronize()"
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            processes.append(subprocess.Popen([sys.executable, "-c", script], cwd=root, **pipes))
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_the_operators_are_built():
    assert native.load_error("cuda") is None


def on_gpu(tensor):
    return None if tensor is None else tensor.cuda()


@settings(max_examples=100)
@given(LOSS_CASES, st.integers(0, 99))
def test_losses_and_their_gradient_equal_the_formula_in_float64(case, seed):
    logits = case.logits.cuda().requires_grad_()
    nll, lse = fused_loss.multi_token_loss(logits, case.labels.cuda())
    exact_nll, exact_lse = case.exact()
    assert_within(nll, exact_nll, exact_nll.abs() + 0.1, torch.float32)
    assert_within(lse, exact_lse, exact_lse.abs() + case.logits.double().amax(dim=1).abs(), torch.float32)
    generator = torch.Generator().manual_seed(seed)
    grad_nll, grad_lse = torch.randn(nll.shape, generator=generator), torch.randn(lse.shape, generator=generator)
    torch.autograd.backward((nll, lse), (grad_nll.cuda(), grad_lse.cuda()))
    assert_within(logits.grad, *case.exact_gradient(grad_nll, grad_lse), case.logits.dtype)


def check_one_go(case):
    rows = case.logits.cuda().clone()
    losses = kernels.multi_token_loss_and_gradient_(rows, case.labels.cuda(), on_gpu(case.label_weights), case.z_loss)
    exact, lse = case.exact_row_losses(), case.exact()[1]
    size = (lse.abs() + case.logits.double().amax(dim=1).abs()).square() if len(lse) else lse
    assert_within(losses, exact, exact.abs() + (0.1 + case.z_loss * size) * case.weights.sum(dim=1), torch.float32)
    assert_within(rows, *case.exact_gradient(), case.logits.dtype)


@settings(max_examples=100)
@given(LOSS_CASES)
def test_loss_and_gradient_in_one_go_equal_the_formula_in_float64(case):
    check_one_go(case)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("rows", "k", "vocab"), [(2048, 4, 32_000), (300, 8, 128_256), (513, 1, 50_257), (4000, 2, 3)])
def test_whole_vocabularies(rows, k, vocab, dtype):
    check_one_go(loss_case(3, rows, k, vocab, dtype, weighted=True, z_loss=1e-3, device="cuda"))


@settings(max_examples=60)
@given(
    st.integers(0, 10**6),
    st.lists(st.integers(0, 9), min_size=0, max_size=3),
    st.integers(1, 9),
    st.integers(1, 60),
    st.sampled_from([1, 2, 7, 8, 64, 257, 600]),
    st.sampled_from(NARROW),
)
def test_the_embedding_equals_the_formula_in_float64(seed, patches, k, vocab, hidden, dtype):
    check_embedding(seed, patches, k, vocab, hidden, dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("patches", "k", "vocab", "hidden"), [((4, 2048), 4, 32_000, 1024), ((9000,), 2, 3, 64), ((64,), 16, 1, 8)])
def test_large_embeddings_and_ids_that_fill_many_tiles(patches, k, vocab, hidden, dtype):
    check_embedding(7, patches, k, vocab, hidden, dtype)


def check_embedding(seed, patches, k, vocab, hidden, dtype):
    """The default gradient, and one that is added to an accumulator."""
    draw = {"generator": torch.Generator("cuda").manual_seed(seed), "device": "cuda"}
    weight = torch.randn(vocab, hidden, **draw).to(dtype).requires_grad_()
    ids = torch.randint(0, vocab, (*patches, k), **draw)
    grad = torch.randn(*patches, hidden, **draw).to(dtype)
    out = fused_embedding.patch_embedding(weight, ids)
    out.backward(grad)
    table = weight.detach()
    assert_within(out, mean_of_rows(table, ids), mean_of_rows(table.abs(), ids), dtype)
    exact, magnitude = gradient_of_rows(vocab, ids, grad)
    assert_within(weight.grad, exact, magnitude, dtype)
    accumulator, gradient = torch.ones(vocab, hidden, device="cuda"), weight.grad
    weight.grad = None
    fused_embedding.patch_embedding(weight, ids, None, accumulator).backward(grad)
    assert weight.grad is None
    assert_within(accumulator, exact + 1, magnitude + 1, torch.float32)
    zeros = torch.zeros(vocab, hidden, device="cuda")
    kernels.patch_embedding_backward_add_(zeros, grad, ids)
    assert torch.equal(zeros.to(dtype), gradient), "the default is its rounding"


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("k", [3, 4])
def test_the_same_bits_on_every_run_and_as_the_cpu_s_embedding(dtype, k):
    case = loss_case(1, 700, 3, 9000, dtype)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(500, 256, generator=generator).to(dtype)
    ids = torch.randint(0, 500, (3000, k), generator=generator)
    results = []
    for _ in range(3):
        rows = case.logits.cuda()
        losses = kernels.multi_token_loss_and_gradient_(rows, case.labels.cuda())
        table = weight.cuda().requires_grad_()
        out = fused_embedding.patch_embedding(table, ids.cuda())
        out.sum().backward()
        results.append((losses, rows, out.detach(), table.grad))
    for each in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(each, results[0], strict=True))
    assert torch.equal(results[0][2].cpu(), fused_embedding.patch_embedding(weight, ids))
    grad = torch.randn(3000, 256, generator=generator).to(dtype).cuda()
    whole = kernels.patch_embedding_backward(grad, ids.cuda(), 500)
    parts = [kernels.patch_embedding_backward(grad, ids.cuda(), rows, start) for start, rows in ((0, 120), (120, 380))]
    assert torch.equal(torch.cat(parts), whole), "an id's sum does not depend on the shard"
    # One tile of occurrences: the order of the sum is the CPU's.
    few, grad = ids[:16], grad[:16]
    assert torch.equal(
        kernels.patch_embedding_backward(grad, few.cuda(), 500).cpu(), kernels.patch_embedding_backward(grad.cpu(), few, 500)
    )


@settings(max_examples=30)
@given(LOSS_CASES, st.integers(1, 4), st.booleans())
def test_shards_of_the_vocabulary_give_what_the_whole_gives(case, shards, copied):
    """Combines the shards by hand, like the CPU's test of this name. A slice of columns has rows with gaps."""
    vocab, logits, labels = case.logits.shape[1], case.logits.cuda(), case.labels.cuda()
    edges = sorted({*(vocab * i // shards for i in range(shards)), vocab})
    parts = [(first, logits[:, first:last].clone() if copied else logits[:, first:last]) for first, last in pairwise(edges)]
    stacked = torch.stack([kernels.multi_token_loss_statistics(part, labels, first) for first, part in parts])
    largest = stacked[..., 0].amax(dim=0)
    sums = (stacked[..., 1] * (stacked[..., 0] - largest).exp()).sum(dim=0)
    normalizer, nll, lse = fused_loss.losses_from_statistics(
        torch.cat((largest[:, None], sums[:, None], stacked[..., 2:].sum(0)), dim=1), labels, None
    )
    exact_nll, _ = case.exact()
    assert_within(nll, exact_nll, exact_nll.abs() + 0.1, torch.float32)
    ones = torch.ones_like(nll)
    grads = [kernels.multi_token_loss_gradient(part, labels, normalizer, ones, lse, first) for first, part in parts]
    assert_within(torch.cat(grads, dim=1), *case.exact_gradient(ones.cpu(), lse.cpu()), case.logits.dtype)


def test_a_group_of_one_gpu_gives_what_none_gives():
    case = loss_case(2, 13, 3, 50, torch.float32)
    labels, generator = case.labels.cuda(), torch.Generator().manual_seed(0)
    inputs = [torch.randn(count, 8, generator=generator).cuda().requires_grad_() for count in (13, 50)]
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for chunk_rows in (5, 4096):
            whole, sharded = (
                fused_linear_loss.linear_multi_token_loss(*inputs, labels, None, 0.1, start, group, chunk_rows)[0]
                for start, group in ((None, None), (0, dist.group.WORLD))
            )
            torch.testing.assert_close(sharded, whole)
            torch.testing.assert_close(torch.autograd.grad(sharded, inputs), torch.autograd.grad(whole, inputs))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("chunk_rows", [100, 4096])
def test_the_chunked_head_follows_the_formula(dtype, tolerance, chunk_rows):
    case = loss_case(5, 900, 4, 3000, torch.float32, weighted=True, z_loss=1e-3)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(900, 64, generator=generator).to(dtype)
    weight = (torch.randn(3000, 64, generator=generator) * 0.2).to(dtype)
    ours = [tensor.cuda().requires_grad_() for tensor in (hidden, weight)]
    loss, count = fused_linear_loss.linear_multi_token_loss(
        *ours, case.labels.cuda(), on_gpu(case.label_weights), case.z_loss, chunk_rows=chunk_rows
    )
    mine = torch.autograd.grad(loss / count, ours)
    wide = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    exact, exact_count = plain.linear_multi_token_loss(*wide, case.labels, case.label_weights, case.z_loss)
    expected = torch.autograd.grad(exact / exact_count, wide)
    assert loss.item() == pytest.approx(exact.item(), rel=tolerance) and count.item() == pytest.approx(exact_count.item())
    for value, other in zip(mine, expected, strict=True):
        assert value.dtype == dtype and (value.cpu().double() - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("chunk_rows", [100, 4096])
def test_the_head_s_gradient_is_added_to_an_accumulator(dtype, chunk_rows):
    case = loss_case(5, 900, 4, 3000, torch.float32, weighted=True, z_loss=1e-3, device="cuda")
    draw = {"generator": torch.Generator("cuda").manual_seed(1), "device": "cuda"}
    hidden = torch.randn(900, 64, **draw).to(dtype).requires_grad_()
    weight = (torch.randn(3000, 64, **draw) * 0.2).to(dtype).requires_grad_()
    arguments = (hidden, weight, case.labels, case.label_weights, case.z_loss, None, None, chunk_rows)
    loss, _ = fused_linear_loss.linear_multi_token_loss(*arguments)
    by_hidden, by_weight = torch.autograd.grad(loss, (hidden, weight))
    for unit_gradient in (False, True):
        accumulator, hidden.grad = torch.ones(3000, 64, device="cuda"), None
        mine, _ = fused_linear_loss.linear_multi_token_loss(*arguments, accumulator, unit_gradient)
        mine.backward()
        assert torch.equal(mine, loss) and torch.equal(hidden.grad, by_hidden) and weight.grad is None
        difference = (accumulator.double() - 1 - by_weight.double()).norm()
        assert difference <= (1e-5 + torch.finfo(dtype).eps) * by_weight.double().norm()


def test_a_unit_gradient_saves_both_tables_of_the_weight_s_size():
    rows, width, vocab = 32, 512, 32_000
    hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, vocab, (rows, 4), device="cuda")
    accumulator = torch.zeros(vocab, width, device="cuda")

    def peak(**options):
        weight.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        ops.linear_multi_token_loss(hidden, weight, labels, **options)[0].backward()
        return torch.cuda.max_memory_allocated() - before

    peak()
    default, backward = peak(), peak(weight_grad_accumulator=accumulator)
    forward = peak(weight_grad_accumulator=accumulator, unit_gradient=True)
    # 16 bits and 32 bits an element of the weight.
    assert default >= backward + 1.7 * vocab * width and backward >= forward + 3.7 * vocab * width


def test_peak_memory_of_the_chunked_head_is_a_chunk_and_the_gradients():
    rows, width, vocab, chunk = 8192, 64, 32_000, 512
    hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, vocab, (rows, 4), device="cuda")

    def work():
        loss, _ = fused_linear_loss.linear_multi_token_loss(hidden, weight, labels, chunk_rows=chunk)
        return torch.autograd.grad(loss, (hidden, weight))

    work()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    peak = torch.cuda.max_memory_allocated() - before
    logits, gradients = chunk * vocab * 2, vocab * width * (4 + 4 + 2) + rows * width * 4
    assert peak <= 1.2 * (logits + gradients) < 0.3 * rows * vocab * 2


def test_gradcheck_opcheck_and_tracing():
    case = loss_case(8, 4, 3, 7, torch.float64)
    labels = case.labels.cuda()
    assert torch.autograd.gradcheck(lambda z: fused_loss.multi_token_loss(z, labels), case.logits.cuda().requires_grad_())
    weight = torch.randn(7, 4, dtype=torch.float64, device="cuda", requires_grad=True)
    ids = torch.randint(0, 7, (5, 3), device="cuda")
    assert torch.autograd.gradcheck(fused_embedding.patch_embedding, (weight, ids))
    torch.library.opcheck(kernels.patch_embedding.default, (weight, ids, None))
    torch.library.opcheck(kernels.multi_token_loss.default, (case.logits.cuda().requires_grad_(), labels))
    torch.library.opcheck(kernels.multi_token_loss_and_gradient_.default, (case.logits.cuda(), labels))

    def model(table, head):
        hidden = fused_embedding.patch_embedding(table, ids)
        return fused_linear_loss.linear_multi_token_loss(hidden, head, ids)[0]

    table, head = torch.randn(7, 8, device="cuda", requires_grad=True), torch.randn(7, 8, device="cuda", requires_grad=True)
    traced = torch.compile(model, fullgraph=True, backend="aot_eager")  # a run with --compile has inductor
    mine = torch.autograd.grad(traced(table, head), (table, head))
    torch.testing.assert_close(mine, torch.autograd.grad(model(table, head), (table, head)))


def test_nothing_waits_for_the_gpu():
    """Under torch's synchronization check, every hidden wait is an error."""
    weight = torch.randn(100, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(0, 100, (50, 4), device="cuda")
    weights = torch.ones(4, device="cuda")
    accumulator = torch.zeros(100, 64, device="cuda")

    def work():
        hidden = fused_embedding.patch_embedding(weight, ids)
        loss, count = fused_linear_loss.linear_multi_token_loss(hidden, weight, ids, weights, chunk_rows=16)
        (loss / count).backward()
        for unit_gradient in (False, True):
            hidden = ops.patch_embedding(weight, ids, weight_grad_accumulator=accumulator)
            options = {"weight_grad_accumulator": accumulator, "unit_gradient": unit_gradient}
            ops.linear_multi_token_loss(hidden, weight, ids, weights, **options)[0].backward()

    work()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_other_streams_and_cuda_graphs():
    case = loss_case(4, 64, 4, 5000, torch.bfloat16)
    logits, labels = case.logits.cuda(), case.labels.cuda()
    kernels.multi_token_loss_and_gradient_(logits.clone(), labels)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    captured = logits.clone()
    with torch.cuda.graph(graph):
        losses = kernels.multi_token_loss_and_gradient_(captured, labels)
    captured.copy_(logits)
    graph.replay()
    torch.cuda.synchronize()
    assert_within(losses, case.exact_row_losses(), 2 * case.exact_row_losses() + 0.5, torch.float32)
    assert_within(captured, *case.exact_gradient(), torch.bfloat16)


def test_arguments_left_on_the_cpu_are_named():
    logits, labels = torch.zeros(3, 9), torch.zeros(3, 2, dtype=torch.int64)
    for one, other, name in ((logits.cuda(), labels, "labels"), (logits, labels.cuda(), "logits")):
        with pytest.raises(ValueError, match=f"{name} must be on the same GPU"):
            fused_loss.multi_token_loss(one, other)
        with pytest.raises(ValueError, match=f"{name} must be on the same GPU"):
            kernels.multi_token_loss_and_gradient_(one.clone(), other)
    for weight, ids, name in ((logits.cuda(), labels, "token_ids"), (logits, labels.cuda(), "weight")):
        with pytest.raises(ValueError, match=f"{name} must be on the same GPU"):
            fused_embedding.patch_embedding(weight, ids)
    weight, ids, accumulator = logits.cuda().requires_grad_(), labels.cuda(), torch.zeros(3, 9)
    with pytest.raises(ValueError, match="weight_grad_accumulator is .* on cpu; allowed: .* on cuda:0"):
        ops.patch_embedding(weight, ids, weight_grad_accumulator=accumulator)
    with pytest.raises(ValueError, match="accumulator must be on the same GPU"):
        kernels.patch_embedding_backward_add_(accumulator, torch.zeros(3, 9, device="cuda"), ids)


@pytest.mark.parametrize("dtype", NARROW)
def test_shapes_without_elements(dtype):
    for patches, k, hidden in (((0,), 2, 8), ((4,), 2, 0), ((0, 3), 1, 0)):
        check_embedding(1, patches, k, 6, hidden, dtype)
    check_one_go(loss_case(1, 0, 3, 24, dtype))


def test_what_is_out_of_range_ends_the_work_and_is_named(ended_processes):
    for process, (_, words) in zip(ended_processes, OUT_OF_RANGE, strict=True):
        output, _ = process.communicate(timeout=120)
        assert process.returncode != 0 and words in output
