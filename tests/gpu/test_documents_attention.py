"""Attention inside documents on a GPU: against the formula in float64, without waiting for the device, and by the flash kernel."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile

from megatron_patch.ops.attention_kernels import has_flash_kernel
from megatron_patch.ops.documents_attention import Documents, documents_attention, documents_of_samples
from tests.ops.documents import by_formula, by_parts, documents_of, ids_of, inputs_of

pytestmark = pytest.mark.gpu
ROWS = [[5, 1, 250, 44, 212], [512], [1, 130, 129, 252]]


def on_gpu(rows):
    return documents_of(rows).pin_memory().to(torch.device("cuda"))


def attend(rows, groups, dtype, head_size=64, function=documents_attention, window=None):
    """Output and gradients, and what the formula gives in float64 on the GPU."""
    ids = ids_of(rows)
    inputs, grad = inputs_of(ids, 8, groups, head_size, dtype, "cuda")
    out = function(*inputs, on_gpu(rows)) if window is None else function(*inputs, on_gpu(rows), window)
    exact = by_formula(*inputs, ids.cuda(), window)
    expected = torch.autograd.grad(exact, inputs, grad.double())
    return [out, *torch.autograd.grad(out, inputs, grad)], [exact, *expected]


def largest_error(found, expected):
    return max(float(((mine.double() - other).norm() / other.norm()).detach()) for mine, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("groups", [8, 2, 1])
@pytest.mark.parametrize("head_size", [64, 128, 256, 100, 320])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 5e-3)])
def test_documents_give_what_the_dense_mask_gives(groups, head_size, dtype, tolerance):
    """Also heads that the flash kernel does not take: of 100 and of 320 numbers, and those in float32."""
    assert largest_error(*attend(ROWS, groups, dtype, head_size)) < tolerance


@pytest.mark.parametrize("window", [1, 64, 200, 511, 600])
@pytest.mark.parametrize("head_size", [64, 256, 320])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 5e-3)])
def test_windows_give_what_the_dense_band_gives(window, head_size, dtype, tolerance):
    """By the flash kernel; heads of 320 numbers and those in float32 by blocks of queries."""
    assert largest_error(*attend(ROWS, 2, dtype, head_size, window=window)) < tolerance


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("parts", [2, 8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float32, 5e-3)])
def test_parts_of_the_queries_give_what_all_of_them_give(window, parts, dtype, tolerance):
    """Context-parallel ranks that gather keys: by the flash kernel with other lengths of keys than of queries, and by blocks of queries."""
    assert largest_error(*attend(ROWS, 2, dtype, function=by_parts(parts, ROWS), window=window)) < tolerance


def test_samples_of_one_document_in_a_window_without_waiting_for_the_device():
    inputs, grad = inputs_of(ids_of([[512], [512]]), 8, 2, 64, torch.bfloat16, "cuda")
    expected = by_formula(*inputs, ids_of([[512], [512]]).cuda(), 100)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        documents = documents_of_samples(2, 512, torch.device("cuda"))
        found = documents_attention(*inputs, documents, 100)
        found.backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert largest_error([found], [expected]) < 1e-2


def test_thousands_of_short_documents():
    rows = [[3, 1, 4] * 512, [2] * 2048]
    assert largest_error(*attend(rows, 2, torch.bfloat16)) < 1e-2


def test_the_host_does_not_wait_for_the_device():
    """Bounds come with the batch in page-locked memory; the next batch is copied while the device computes."""
    inputs, grad = inputs_of(ids_of(ROWS), 8, 2, 64, torch.bfloat16, "cuda")
    pinned = documents_of(ROWS).pin_memory()
    documents_attention(*inputs, pinned.to(torch.device("cuda"))).backward(grad)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        documents_attention(*inputs, pinned.to(torch.device("cuda"))).backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_flash_kernel_runs_once_each_way_for_all_documents():
    inputs, grad = inputs_of(ids_of(ROWS), 8, 2, 64, torch.bfloat16, "cuda")
    documents = on_gpu(ROWS)
    if not has_flash_kernel(inputs[0]):
        assert torch.cuda.get_device_capability() < (8, 0)
        return
    documents_attention(*inputs, documents).backward(grad)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        documents_attention(*inputs, documents).backward(grad)
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events() if "flash" in event.name.lower()]
    assert any("fwd" in name for name in names) and any("bwd" in name for name in names)
    assert len(names) <= 8, f"a few kernels for 10 documents: {names}"
    assert not [event.name for event in profiler.events() if "HtoD" in event.name or "DtoH" in event.name]


def test_memory_does_not_grow_with_the_square_of_the_length():
    length = 16_384
    rows = [[1000] * 16 + [384]]
    inputs, grad = inputs_of(ids_of(rows), 4, 2, 64, torch.bfloat16, "cuda")
    documents = on_gpu(rows)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    documents_attention(*inputs, documents).backward(grad)
    assert torch.cuda.max_memory_allocated() - before < length * length / 2, "half of a mask of one byte each"


def test_one_compilation_for_all_numbers_of_documents():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(documents_attention, fullgraph=True, dynamic=False, backend=counter)

    def marked(queries, keys, values, documents: Documents):
        documents.mark_dynamic()
        return compiled(queries, keys, values, documents)

    for rows in ([[5, 251], [256]], [[64] * 4, [1] * 256], [[255, 1], [2, 254]]):
        assert largest_error(*attend(rows, 2, torch.bfloat16, function=marked)) < 1e-2
    assert counter.frame_count == 1
    torch._dynamo.reset()
