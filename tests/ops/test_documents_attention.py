"""Attention inside documents, by each of its kernels: against the formula with a dense mask in float64; tracing; memory."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_patch.ops import attention_kernels as kernels
from megatron_patch.ops import documents_attention as operator
from megatron_patch.ops.attention_kernels import has_flash_kernel
from megatron_patch.ops.documents_attention import (
    Documents,
    documents_attention,
    documents_from_ids,
    documents_of_samples,
    slice_documents,
)
from tests.ops.documents import by_formula, by_parts, documents_of, flash_on_cpu, ids_of, inputs_of

KERNELS = {"cpu": kernels.CpuKernel, "scaled dot product": kernels.ScaledDotProductKernel, "flash": kernels.FlashKernel}
LAYOUTS = [
    [[5, 1, 18], [24], [1, 19, 4]],
    [[1] * 7],
    [[3, 4], [4, 3]],
    [[40, 2, 70, 16]],
]
"""Lengths of the documents of each sample: samples of one document, documents of one position, equal and unequal ones."""


@st.composite
def layouts(draw):
    """Samples of one length, each cut into documents at random, in at least one place."""
    length = draw(st.integers(2, 40))
    samples = draw(st.lists(st.sets(st.integers(1, length - 1), max_size=6), min_size=1, max_size=3).filter(any))
    return [np.diff([0, *sorted(cuts), length]).tolist() for cuts in samples]


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    """Each kernel on the CPU; that of CUDA by stand-ins for the two operators of torch that it calls."""
    monkeypatch.setattr(operator, "kernel_for", lambda queries: KERNELS[request.param]())
    if request.param != "flash":
        yield request.param
        return
    with flash_on_cpu() as seen:
        yield request.param
        assert seen.calls


def relative_errors(rows, groups, dtype, attend=documents_attention, window=None, **options):
    """Differences of output and gradients from the formula, over the norms of the latter; a document of one position has gradients of 0."""
    ids = ids_of(rows)
    inputs, grad = inputs_of(ids, 4, groups, 8, dtype, **options)
    one_each = all(len(row) == 1 for row in rows)
    documents = documents_of_samples(*ids.shape, torch.device("cpu")) if one_each else documents_of(rows)
    out = attend(*inputs, documents) if window is None else attend(*inputs, documents, window)
    found = [out, *torch.autograd.grad(out, inputs, grad)]
    exact = by_formula(*inputs, ids, window)
    expected = [exact, *torch.autograd.grad(exact, inputs, grad.double())]
    assert all(mine.dtype == dtype and mine.shape == other.shape for mine, other in zip(found, expected, strict=True))
    least = 0.1 * grad.double().norm()
    return [
        float(((mine.double() - other).norm() / other.norm().clamp(min=least)).detach())
        for mine, other in zip(found, expected, strict=True)
    ]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("rows", LAYOUTS, ids=str)
def test_every_kernel_gives_what_the_dense_mask_gives(kernel, rows, groups, dtype, tolerance):
    """CUDA's kernel keeps its sums in float32."""
    errors = relative_errors(rows, groups, dtype)
    assert max(errors) < max(tolerance, 1e-6 if kernel == "flash" else 0.0), errors


WINDOWED = [
    *((rows, window) for rows in (LAYOUTS[0], [[24], [24]]) for window in (1, 2, 7, 23, 24, 30)),
    ([[700, 68], [768]], 1),
    ([[1000]], 200),
    ([[130, 870]], 600),
]
"""Layouts and windows: shorter and longer than the documents, than the blocks of the kernels, and than 512 keys."""


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("rows", "window"), WINDOWED, ids=str)
def test_every_kernel_gives_what_the_dense_band_gives(kernel, rows, window, dtype, tolerance):
    errors = relative_errors(rows, 2, dtype, window=window)
    assert max(errors) < max(tolerance, 1e-6 if kernel == "flash" else 0.0), errors


@settings(max_examples=60)
@given(layouts(), st.integers(1, 45), st.sampled_from([4, 1]), st.integers(1, 9))
def test_any_window_and_any_blocks_give_what_the_dense_band_gives(rows, window, groups, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_BLOCK_ROWS", (block, block))
        assert max(relative_errors(rows, groups, torch.float64, window=window)) < 1e-14


def test_the_flash_kernel_gets_the_positions_before_a_position(monkeypatch):
    """It counts without the position itself, and reads no window where all of the document is seen."""
    monkeypatch.setattr(operator, "kernel_for", lambda queries: kernels.FlashKernel())
    (queries, keys, values), grad = inputs_of(ids_of(LAYOUTS[0]), 4, 2, 8, torch.float32)
    with flash_on_cpu() as seen:
        documents_attention(queries, keys, values, documents_of(LAYOUTS[0]), 5).backward(grad)
        documents_attention(queries, keys, values, documents_of(LAYOUTS[0])).backward(grad)
    assert seen.windows == [4, 4, None, None]


@pytest.mark.parametrize(("window", "rows"), [(16, 64), (100, 100), (4096, 128)])
def test_the_scores_that_are_computed_grow_with_length_times_window(window, rows):
    """Each query's block has fewer keys than window + rows, whatever the length; all queries and the keys that they see are covered once."""
    length = 10_000
    blocks = list(kernels.blocks(length, length, window))
    assert [block.queries.start for block in blocks] == list(range(0, length, rows)) and blocks[-1].queries.stop == length
    for block in blocks:
        assert block.keys == slice(max(0, block.queries.start - window + 1), block.queries.stop) and not block.whole
    scores = sum((block.queries.stop - block.queries.start) * (block.keys.stop - block.keys.start) for block in blocks)
    assert scores < length * (window + rows)


def test_samples_as_documents():
    documents = documents_of_samples(3, 5, torch.device("cpu"))
    assert documents.bounds.tolist() == documents.host_bounds.tolist() == [0, 5, 10, 15] and documents.bounds.dtype == torch.int32
    assert int(documents.longest) == 5 and documents.longest.device.type == "cpu"


@settings(max_examples=60)
@given(layouts(), st.sampled_from([4, 2, 1]), st.booleans())
def test_any_documents_give_what_the_dense_mask_gives(rows, groups, stored_by_head):
    assert max(relative_errors(rows, groups, torch.float64, stored_by_head=stored_by_head)) < 1e-14


def test_gradients_of_any_strides_are_read(kernel):
    """That of a sum is one number for all positions, with strides of 0; that of a transpose has its last dimension apart."""
    rows, dtype = LAYOUTS[0], torch.float32
    (queries, keys, values), _ = inputs_of(ids_of(rows), 4, 2, 8, dtype)
    for change in (lambda out: out.sum(), lambda out: (out.transpose(-1, -2).contiguous() ** 2).sum()):
        found = torch.autograd.grad(change(documents_attention(queries, keys, values, documents_of(rows))), (queries, keys, values))
        expected = torch.autograd.grad(change(by_formula(queries, keys, values, ids_of(rows))), (queries, keys, values))
        for mine, other in zip(found, expected, strict=True):
            assert (mine - other).norm() <= 1e-5 * other.norm() + 1e-5


def test_the_flash_kernel_gets_bounds_of_the_device_and_the_longest_length(monkeypatch):
    """The bounds are on the device, where the host cannot read them without waiting; the length comes from host memory."""
    monkeypatch.setattr(operator, "kernel_for", lambda queries: kernels.FlashKernel())
    documents = documents_of(LAYOUTS[0])
    on_device = Documents(documents.bounds.clone(), documents.host_bounds, documents.longest)
    (queries, keys, values), grad = inputs_of(ids_of(LAYOUTS[0]), 4, 2, 8, torch.float32)
    with flash_on_cpu() as seen:
        documents_attention(queries, keys, values, on_device).backward(grad)
    assert [name for name, _, _ in seen.calls] == ["forward", "backward"]
    for _, bounds, longest in seen.calls:
        assert bounds.data_ptr() == on_device.bounds.data_ptr() and longest == 24


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("stored_by_head", [False, True])
def test_opcheck(stored_by_head, window):
    documents = documents_of(LAYOUTS[0])
    inputs, grad = inputs_of(ids_of(LAYOUTS[0]), 4, 2, 8, torch.float32, stored_by_head=stored_by_head)
    packed = [tensor.detach().transpose(1, 2).flatten(0, 1).requires_grad_() for tensor in inputs]
    bounds = (documents.bounds.clone(), documents.host_bounds, documents.longest)
    torch.library.opcheck(torch.ops.megatron_patch.documents_attention.default, (*packed, *bounds, window))
    with torch.no_grad():
        out = torch.ops.megatron_patch.documents_attention(*packed, *bounds, window)
        arguments = (grad.transpose(1, 2).flatten(0, 1), *packed, *out, *bounds)
    detached = [*(tensor.detach() for tensor in arguments), window]
    torch.library.opcheck(torch.ops.megatron_patch.documents_attention_backward.default, detached)


@pytest.mark.parametrize("window", [None, 3])
def test_gradcheck(window):
    documents = documents_of([[3, 1, 4], [8]])
    inputs, _ = inputs_of(ids_of([[3, 1, 4], [8]]), 2, 1, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda q, k, v: documents_attention(q, k, v, documents, window), inputs)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_one_compilation_for_all_numbers_of_documents(backend, window):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(documents_attention, fullgraph=True, dynamic=False, backend=counter)

    def attend(queries, keys, values, documents, window=None):
        documents.mark_dynamic()
        return compiled(queries, keys, values, documents, window)

    for rows in ([[5, 11], [16]], [[1] * 16, [16]], [[2, 2, 12], [3, 3, 10]], [[15, 1], [1, 15]], [[4] * 4, [8] * 2]):
        assert max(relative_errors(rows, 2, torch.float32, attend, window)) < 1e-6
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_shapes_of_the_cuda_operator_without_a_device():
    with FakeTensorMode(allow_non_fake_inputs=True):
        queries, keys, values = (torch.empty(2, n, 6, 16, device="cuda", dtype=torch.bfloat16) for n in (4, 2, 2))
        bounds = torch.empty(4, device="cuda", dtype=torch.int32)
        out = documents_attention(queries, keys, values, Documents(bounds, torch.empty(4, dtype=torch.int32), torch.tensor(4)))
    assert out.shape == (2, 4, 6, 16) and out.device.type == "cuda" and out.dtype == torch.bfloat16
    assert out.transpose(1, 2).is_contiguous()


def saved_bytes(attend, inputs):
    """Bytes that autograd keeps for the backward pass."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = attend(*inputs)
    return sum(kept.values()), out


def test_what_is_kept_is_that_of_plain_causal_attention_and_the_bounds():
    rows = [[100, 28, 128], [256]]
    inputs, _ = inputs_of(ids_of(rows), 4, 2, 8, torch.float32)
    documents = documents_of(rows)
    found, _ = saved_bytes(lambda q, k, v: documents_attention(q, k, v, documents), inputs)
    plain, _ = saved_bytes(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), inputs)
    assert found == plain + documents.bounds.nbytes + documents.longest.nbytes


def test_a_window_of_no_position_is_refused():
    (queries, keys, values), _ = inputs_of(ids_of([[3, 4]]), 4, 2, 8, torch.float32)
    with pytest.raises(ValueError, match="a window of 0 positions; allowed: from 1"):
        documents_attention(queries, keys, values, documents_of([[3, 4]]), 0)


def test_bounds_of_other_positions_are_refused():
    (queries, keys, values), _ = inputs_of(ids_of([[3, 4]]), 4, 2, 8, torch.float32)
    with pytest.raises(ValueError, match="from position 0 to 8; allowed: from 0 to B·T = 7"):
        documents_attention(queries, keys, values, documents_of([[3, 5]]))


@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4))
def test_bounds_are_where_the_document_changes(changes):
    ids = np.cumsum(np.array(changes), axis=1)
    expected = [b * 9 + t for b in range(len(ids)) for t in range(9) if t == 0 or ids[b, t] != ids[b, t - 1]] + [ids.size]
    documents = documents_from_ids(ids)
    if len(expected) == len(ids) + 1:
        assert documents is None
        return
    assert documents.bounds.tolist() == documents.host_bounds.tolist() == expected and documents.bounds.dtype == torch.int32
    assert documents.longest.shape == () and int(documents.longest) == max(b - a for a, b in pairwise(expected))


@pytest.mark.parametrize(
    ("dtype", "head_size", "capability", "taken"),
    [
        (torch.bfloat16, 128, (9, 0), True),
        (torch.float16, 256, (8, 0), True),
        (torch.float32, 128, (9, 0), False),
        (torch.bfloat16, 264, (9, 0), False),
        (torch.bfloat16, 100, (9, 0), False),
        (torch.float16, 64, (7, 5), False),
    ],
)
def test_which_heads_the_flash_kernel_takes(dtype, head_size, capability, taken, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        on_gpu = torch.empty(1, 1, head_size, dtype=dtype, device="cuda")
    assert has_flash_kernel(on_gpu) == taken
    assert type(operator.kernel_for(on_gpu)) is (kernels.FlashKernel if taken else kernels.ScaledDotProductKernel)
    assert type(operator.kernel_for(torch.empty(1, 1, head_size, dtype=dtype))) is kernels.CpuKernel


PARTED = [[[5, 1, 18], [24], [1, 19, 4]], [[3, 5], [4, 4]], [[300, 2, 70, 140]]]


@pytest.mark.parametrize("rows", PARTED, ids=str)
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 3, 90])
def test_parts_of_the_queries_give_what_all_of_them_give(kernel, rows, parts, window):
    errors = relative_errors(rows, 2, torch.float32, by_parts(parts, rows), window)
    assert max(errors) < 1e-6


@settings(max_examples=60)
@given(layouts(), st.sampled_from([None, 1, 2, 5, 30]), st.integers(1, 9), st.data())
def test_any_parts_of_any_documents_give_what_the_dense_mask_gives(rows, window, block, data):
    length = sum(rows[0])
    parts = data.draw(st.sampled_from([parts for parts in range(1, length + 1) if length % parts == 0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_BLOCK_ROWS", (block, block))
        assert max(relative_errors(rows, 2, torch.float64, by_parts(parts, rows), window)) < 1e-14


def test_a_part_s_documents_begin_before_it():
    """Samples of 8 positions in two parts: the second has the ends of documents whose keys begin in the first."""
    slices = slice_documents(documents_of([[2, 4, 2], [8]]), 8, 1, 2)
    assert slices.queries.bounds.tolist() == [0, 2, 4, 8] and slices.host_spans.tolist() == [[2, 6], [6, 8], [8, 16]]
    assert slices.key_bounds.tolist() == [0, 4, 6, 14] and (int(slices.queries.longest), int(slices.longest_span)) == (4, 8)
    assert {tensor.dtype for tensor in (slices.queries.bounds, slices.key_bounds, slices.host_spans)} == {torch.int32}


@pytest.mark.parametrize("window", [None, 3])
def test_opcheck_of_parts(window):
    slices = slice_documents(documents_of(LAYOUTS[0]), 24, 1, 2)
    inputs, grad = inputs_of(ids_of(LAYOUTS[0]), 4, 2, 8, torch.float32)
    inputs[0], grad = inputs[0].detach()[:, :, 12:].requires_grad_(), grad[:, :, 12:]
    packed = [tensor.detach().transpose(1, 2).flatten(0, 1).requires_grad_() for tensor in inputs]
    bounds = (slices.queries.bounds.clone(), slices.queries.host_bounds, slices.queries.longest)
    bounds += (slices.key_bounds, slices.host_spans, slices.longest_span)
    torch.library.opcheck(torch.ops.megatron_patch.sliced_attention.default, (*packed, *bounds, window))
    with torch.no_grad():
        out = torch.ops.megatron_patch.sliced_attention(*packed, *bounds, window)
        arguments = (grad.transpose(1, 2).flatten(0, 1), *packed, *out, *bounds)
    detached = [*(tensor.detach() for tensor in arguments), window]
    torch.library.opcheck(torch.ops.megatron_patch.sliced_attention_backward.default, detached)


def test_documents_are_no_tuple():
    """DeepSpeed casts the arguments of its engine in fp16 and rebuilds tuples, which a NamedTuple does not survive."""
    assert not isinstance(documents_of([[1, 2]]), tuple)
