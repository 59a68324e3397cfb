"""The source of the CUDA kernels, run on the CPU (tests/cuda_on_cpu) on the cases of the CPU kernels, under several orders of threads.

Mutants check that the tests notice errors: a missing barrier, a wrong stride, a skipped tail.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cuda_on_cpu import kernels
from tests.cuda_on_cpu.kernels import ORDERS, TYPES, CudaOnCpu, Trapped, compile_kernels, cuda_include
from tests.ops.cases import LOSS_CASES, NARROW, LossCase, assert_within, loss_case
from tests.ops.test_fused_embedding import gradient_of_rows, mean_of_rows

pytestmark = pytest.mark.skipif(cuda_include() is None or shutil.which("g++") is None, reason="CUDA's headers (nvcc) and g++ are needed")
# Bytes of shared memory, which hold nothing of a long row, a part of it in bfloat16, a part in float32, or all of it.
LIMITS = [12_288, 14_336, 20_480, 28_672, 73_728]
WAYS = st.builds(
    lambda order, seed, limit, shift, gap, clusters: (order, seed, limit, shift, gap, clusters),
    st.sampled_from(list(ORDERS)),
    st.integers(1, 99),
    st.sampled_from(LIMITS),
    st.integers(0, 1),
    st.sampled_from([0, 3]),
    st.booleans(),
)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("cuda_on_cpu") / "kernels.so"
    compile_kernels(kernels.SOURCES, path)
    return ctypes.CDLL(str(path))


def check_loss(machine: CudaOnCpu, case: LossCase) -> None:
    """Checks both operators for the loss and its gradient, unsharded and in shards, against float64."""
    dtype, rows = case.logits.dtype, len(case.logits)
    losses, gradient = machine.loss_and_gradient(case.logits, case.labels, case.label_weights, case.z_loss)
    exact = case.exact_row_losses()
    _, lse = case.exact()
    size = (lse.abs() + case.logits.double().amax(dim=1).abs()).square() if rows else lse
    assert_within(losses, exact, exact.abs() + (0.1 + case.z_loss * size) * case.weights.sum(dim=1), torch.float32)
    assert_within(gradient, *case.exact_gradient(), dtype)

    vocab = case.logits.shape[1]
    edges = sorted({0, vocab // 3, vocab})
    for first, last in pairwise(edges):
        part = case.logits[:, first:last].contiguous()
        stats = machine.statistics(part, case.labels, first)
        exact_part = part.double()
        largest = exact_part.amax(dim=1)
        sums = (exact_part - largest[:, None]).exp().sum(dim=1)
        assert torch.equal(stats[:, 0].double(), largest)
        assert_within(stats[:, 1], sums, sums, torch.float32)
        inside = (case.labels >= first) & (case.labels < last)
        picked = exact_part.gather(1, torch.where(inside, case.labels - first, 0))
        assert torch.equal(stats[:, 2:].double(), torch.where(inside, picked, 0.0))

    logits = case.logits.double()
    largest = logits.amax(dim=1) if rows else logits.sum(dim=1)
    normalizer = torch.stack((largest, (logits - largest[:, None]).exp().sum(dim=1)), dim=1).float()
    generator = torch.Generator().manual_seed(rows)
    grad_nll = torch.randn(case.labels.shape, generator=generator)
    grad_lse = torch.randn(rows, generator=generator)
    expected, size = case.exact_gradient(grad_nll, grad_lse)
    for in_place in (False, True):
        whole = machine.gradient(case.logits, case.labels, normalizer, grad_nll, grad_lse, None, in_place)
        assert_within(whole, expected, size, dtype)
    parts = [
        machine.gradient(case.logits[:, first:last].contiguous(), case.labels, normalizer, grad_nll, grad_lse, first)
        for first, last in pairwise(edges)
    ]
    assert_within(torch.cat(parts, dim=1), expected, size, dtype)


def check_embedding(machine: CudaOnCpu, seed: int, patches: int, k: int, vocab: int, hidden: int, dtype: torch.dtype, common: int) -> None:
    """Checks forward and backward pass, unsharded and in shards, against float64; `common` patches repeat one id."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, hidden, generator=generator).to(dtype)
    ids = torch.randint(0, vocab, (patches, k), generator=generator)
    ids[:common] = vocab // 2
    ids = ids[torch.randperm(patches, generator=generator)]
    grad = torch.randn(patches, hidden, generator=generator).to(dtype)
    out = machine.patch_embedding(weight, ids)
    assert_within(out, mean_of_rows(weight, ids), mean_of_rows(weight.abs(), ids), dtype)
    exact, size = gradient_of_rows(vocab, ids, grad)
    by_weight = machine.patch_embedding_backward(grad, ids, vocab)
    assert_within(by_weight, exact, size, dtype)
    half = vocab // 2
    parts = [machine.patch_embedding(weight[:half], ids, 0), machine.patch_embedding(weight[half:], ids, half)]
    magnitude = mean_of_rows(weight.abs(), ids)
    error = (parts[0].double() + parts[1].double() - mean_of_rows(weight, ids)).abs()
    assert bool((error <= (1e-6 + 2 * torch.finfo(dtype).eps) * magnitude + 1e-7).all())
    shards = [machine.patch_embedding_backward(grad, ids, half, 0), machine.patch_embedding_backward(grad, ids, vocab - half, half)]
    assert torch.equal(torch.cat(shards), by_weight), "an id's sum does not depend on the shard"


@settings(max_examples=120)
@given(LOSS_CASES, WAYS)
def test_the_loss_equals_the_formula_in_float64(library, case, way):
    check_loss(CudaOnCpu(library, *way), case)


@settings(max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(1, 70),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from([1, 3, 8, 16, 40, 257, 600]),
    st.sampled_from(NARROW),
    st.sampled_from([0.0, 0.5, 1.0]),
    WAYS,
)
def test_the_embedding_equals_the_formula_in_float64(library, seed, patches, k, vocab, hidden, dtype, common, way):
    check_embedding(CudaOnCpu(library, *way), seed, patches, k, vocab, hidden, dtype, int(common * patches))


@pytest.mark.parametrize("order", ORDERS)
def test_one_id_may_fill_many_tiles(library, order):
    check_embedding(CudaOnCpu(library, order), 1, 300, 4, 11, 24, torch.float32, 250)
    check_embedding(CudaOnCpu(library, order), 2, 64, 1, 3, 8, torch.bfloat16, 64)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("vocab", [32_000, 50_257])
def test_whole_vocabularies(library, dtype, vocab):
    for order in ORDERS:
        for clusters in (False, True):
            machine = CudaOnCpu(library, order, shared_limit=100_000, clusters=clusters)
            check_loss(machine, loss_case(5, 2, 4, vocab, dtype, weighted=True, z_loss=1e-3))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("labels", [1, 129, 300, 600])
def test_blocks_of_every_size(library, labels, order):
    """128, 256, 512 and 1,024 threads."""
    for dtype in NARROW:
        check_loss(CudaOnCpu(library, order, shared_limit=LIMITS[-1]), loss_case(2, 2, labels, 3000, dtype, spread=30.0))
    case = loss_case(2, 2, labels, 1500, torch.float64)
    losses, gradient = CudaOnCpu(library, order, shared_limit=LIMITS[-1]).loss_and_gradient(case.logits, case.labels, None, 0.0)
    assert_within(losses, case.exact_row_losses(), (1 + case.exact_row_losses().abs()) * case.weights.sum(dim=1), torch.float64)
    assert_within(gradient, *case.exact_gradient(), torch.float64)


def test_every_order_gives_the_same_bits(library):
    case = loss_case(3, 4, 5, 4100, torch.float32)
    ids = torch.randint(0, 9, (90, 3), generator=torch.Generator().manual_seed(0))
    grad = torch.randn(90, 40, generator=torch.Generator().manual_seed(1))
    results = []
    for order in ORDERS:
        for limit in LIMITS:
            machine = CudaOnCpu(library, order, 7, limit)
            losses, gradient = machine.loss_and_gradient(case.logits, case.labels, None, 0.0)
            results.append((losses, gradient, machine.patch_embedding_backward(grad, ids, 9)))
    for each in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(each, results[0], strict=True))
    for limit in LIMITS:
        clusters = [CudaOnCpu(library, order, 7, limit, clusters=True) for order in ORDERS]
        shared = [machine.loss_and_gradient(case.logits, case.labels, None, 0.0) for machine in clusters]
        assert all(torch.equal(a, b) for each in shared[1:] for a, b in zip(each, shared[0], strict=True))


@pytest.mark.parametrize("dtype", NARROW)
def test_extreme_logits_have_the_results_that_torch_gives(library, dtype):
    inf = float("inf")
    rows = torch.zeros(6, 300, dtype=dtype)
    rows[0, :280] = -inf
    rows[1, 5] = float("nan")
    rows[2, :2] = torch.finfo(dtype).max
    rows[3, 0] = -200.0
    rows[4] = -inf
    rows[5, 7] = inf
    labels = torch.tensor([[290], [1], [0], [3], [0], [1]])
    theirs = rows.double().requires_grad_()
    expected = F.cross_entropy(theirs, labels[:, 0], reduction="none")
    expected.sum().backward()
    losses, gradient = CudaOnCpu(library).loss_and_gradient(rows, labels, None, 0.0)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0, equal_nan=True)
    near = {"rtol": max(1e-6, torch.finfo(dtype).eps), "atol": max(1e-37, torch.finfo(dtype).smallest_normal)}
    torch.testing.assert_close(gradient.double(), theirs.grad, equal_nan=True, **near)


@pytest.mark.parametrize("bad", [-1, 24, -101, 2**40])
def test_what_is_out_of_range_ends_the_kernel_with_its_name(library, bad):
    machine = CudaOnCpu(library)
    case = loss_case(3, 9, 5, 24, torch.float32)
    case.labels[4, 2] = bad
    with pytest.raises(Trapped, match=rf"labels hold {bad} in row 4; allowed: 0 to 23, and -100"):
        machine.loss_and_gradient(case.logits, case.labels, None, 0.0)
    with pytest.raises(Trapped, match=rf"labels hold {bad} in row 4"):
        machine.statistics(case.logits, case.labels)
    machine.statistics(case.logits, case.labels, vocab_start=0)
    ids = torch.zeros(3, 2, dtype=torch.int64)
    ids[2, 1] = bad
    with pytest.raises(Trapped, match=rf"token_ids hold {bad} in patch 2; allowed: 0 to 23"):
        machine.patch_embedding(torch.randn(24, 8), ids)


@pytest.mark.parametrize("count", [2**31, 2**32 + 1])
def test_more_rows_than_a_grid_holds_are_refused(library, count):
    """Truncated to 32 bits, the last number would launch one block and leave all other rows unchanged."""
    library.cuda_on_cpu_prepare(0, 1, 65536, 0)
    none, number, size = ctypes.c_void_p(None), ctypes.c_int(TYPES[torch.float32]), ctypes.c_int64
    no, zero = ctypes.c_bool(False), size(0)
    assert library.mp_loss_statistics(number, none, size(8), none, size(count), size(1), zero, size(8), no, none, none) != 0
    assert (
        library.mp_loss_gradient(number, none, size(8), none, size(count), size(1), zero, size(8), none, none, none, none, size(8), none)
        != 0
    )
    assert (
        library.mp_loss_and_gradient(number, none, size(8), none, size(count), size(1), size(8), none, ctypes.c_double(0), none, none) != 0
    )
    assert library.mp_patch_embedding_forward(number, none, none, size(count), size(1), size(8), zero, size(8), no, none, none) != 0
    tiles = size(count * 64)
    assert library.mp_patch_embedding_backward(number, none, none, none, tiles, size(1), size(8), zero, size(8), none, none, none) != 0


@pytest.mark.parametrize(("labels", "vocab"), [(1, 2**31), (1025, 8)])
def test_longer_rows_and_more_labels_than_are_counted_are_refused(library, labels, vocab):
    library.cuda_on_cpu_prepare(0, 1, 65536, 0)
    none, number, size = ctypes.c_void_p(None), ctypes.c_int(TYPES[torch.float32]), ctypes.c_int64
    no, zero, one, k, v = ctypes.c_bool(False), size(0), size(1), size(labels), size(vocab)
    assert library.mp_loss_statistics(number, none, v, none, one, k, zero, v, no, none, none) != 0
    assert library.mp_loss_gradient(number, none, v, none, one, k, zero, v, none, none, none, none, v, none) != 0
    assert library.mp_loss_and_gradient(number, none, v, none, one, k, v, none, ctypes.c_double(0), none, none) != 0


# (file, text, its replacement): one barrier, stride, tail, tile or alignment at a time.
MUTANTS = {
    "no barrier before the threads' results are merged": (
        "running_softmax.cuh",
        "  const unsigned thread = threadIdx.x;\n  __syncthreads();",
        "  const unsigned thread = threadIdx.x;",
    ),
    "no barrier before the merging warps' results are merged": ("running_softmax.cuh", "    sync_first<kMergingThreads>();\n", ""),
    "the merging warps' barrier is of the first warp alone": ("running_softmax.cuh", "sync_first<kMergingThreads>", "sync_first<kWarp>"),
    "a wrong stride of results in a full block": ("running_softmax.cuh", "i / 2 * (2 * kMergingThreads)", "i / 2 * kMergingThreads"),
    "a wrong distance of neighbours' results": ("running_softmax.cuh", "+ 2 * thread + i % 2]", "+ thread + i % 2]"),
    "every other result is skipped": ("running_softmax.cuh", "+ 2 * thread + i % 2]", "+ 2 * thread]"),
    "a result too few in a full block": (
        "running_softmax.cuh",
        "return merge<T, share>(mine);",
        "mine[share - 1] = no_logits<A>();\nreturn merge<T, share>(mine);",
    ),
    "a wrong stride of results in a smaller block": (
        "running_softmax.cuh",
        "i < blockDim.x; i += kMergingThreads) {",
        "i < blockDim.x; i += 2 * kMergingThreads) {",
    ),
    "the last result of a smaller block is skipped": (
        "running_softmax.cuh",
        "i < blockDim.x; i += kMergingThreads) {",
        "i + kMergingThreads < blockDim.x; i += kMergingThreads) {",
    ),
    "a smaller block's results are read as a full one's": ("running_softmax.cuh", "if (blockDim.x == kMaxThreads) {", "{"),
    "a merging warp's result is skipped": (
        "running_softmax.cuh",
        "use(merge<T, kMergingWarps>(all));",
        "all[1] = no_logits<Number<T>>();\nuse(merge<T, kMergingWarps>(all));",
    ),
    "a result too few when the largest is found": ("running_softmax.cuh", "half = kCount / 2; half > 0;", "half = kCount / 2; half > 1;"),
    "no barrier before a row's factor is read": (
        "multi_token_loss.cu",
        "  __syncthreads();\n  if constexpr (kCluster) cluster_arrive();",
        "  if constexpr (kCluster) cluster_arrive();",
    ),
    "no barrier before logits are overwritten": (
        "multi_token_loss.cu",
        "  __syncthreads();  // the labels' logits must be read before any logit is overwritten\n",
        "",
    ),
    "no barrier before labels are corrected": (
        "multi_token_loss.cu",
        "cache, kept, largest, factor);\n  __syncthreads();\n  correct",
        "cache, kept, largest, factor);\n  correct",
    ),
    "no barrier before labels are corrected, where losses are label by label": (
        "multi_token_loss.cu",
        "nullptr, 0, largest, factor);\n  __syncthreads();",
        "nullptr, 0, largest, factor);",
    ),
    "no barrier before other blocks' sums are read": (
        "multi_token_loss.cu",
        "    cluster_arrive();\n    cluster_wait();  // every label",
        "    // every label",
    ),
    "a block leaves while others read its sum": (
        "multi_token_loss.cu",
        "  if constexpr (kCluster) cluster_wait();  // no block",
        "  // no block",
    ),
    "a block knows its own sum alone": ("multi_token_loss.cu", "*of_block(&scratch.part, k)", "*of_block(&scratch.part, rank)"),
    "a block's part ends after its row": (
        "multi_token_loss.cu",
        "width = vocab - begin < columns ? vocab - begin : columns;",
        "width = columns;",
    ),
    "labels of other blocks' columns": (
        "multi_token_loss.cu",
        "first && column >= begin && column < end ?",
        "first && column < end - begin ?",
    ),
    "no barrier behind the tile's ids": (
        "patch_embedding.cu",
        "sorted_ids[begin - 1] == sorted_ids[begin];\n  __syncthreads();",
        "sorted_ids[begin - 1] == sorted_ids[begin];",
    ),
    "a wrong stride of rows": (
        "multi_token_loss.cu",
        "const target = logits + row * stride;",
        "const target = logits + row * (stride - 1);",
    ),
    "a wrong stride of rows that lie apart": (
        "multi_token_loss.cu",
        "T* source = logits + row * stride;",
        "T* source = logits + row * vocab;",
    ),
    "a wrong stride of threads": (
        "multi_token_loss.cu",
        "i += kAhead<T> * step) read_vectors",
        "i += kAhead<T> * step + 1) read_vectors",
    ),
    "a wrong distance of vectors in flight": (
        "multi_token_loss.cu",
        "vectors[a] = load_vector<width>(source + static_cast<int64_t>(i + a * step) * width);\n  Number",
        "vectors[a] = load_vector<width>(source + static_cast<int64_t>(i + a) * width);\n  Number",
    ),
    "vectors in flight past the end": (
        "multi_token_loss.cu",
        "i + (kAhead<T> - 1) * step < last; i += kAhead<T> * step) read",
        "i < last; i += kAhead<T> * step) read",
    ),
    "vectors in flight past the end when writing": (
        "multi_token_loss.cu",
        "i + (kAhead<T> - 1) * step < last; i += kAhead<T> * step) {\n    write",
        "i < last; i += kAhead<T> * step) {\n    write",
    ),
    "no last vectors when reading": (
        "multi_token_loss.cu",
        "i < last; i += step) read_vectors<T, 1",
        "i < 0; i += step) read_vectors<T, 1",
    ),
    "no last vectors when writing": (
        "multi_token_loss.cu",
        "i < last; i += step) write_vectors<T, 1",
        "i < 0; i += step) write_vectors<T, 1",
    ),
    "what is not kept is not read": (
        "multi_token_loss.cu",
        "0, kept, cache);\n  read_range<T, false>",
        "0, kept, cache);\n  if (kept == 0) read_range<T, false>",
    ),
    "what is kept is written from the wrong place": ("multi_token_loss.cu", "kKept ? cache[i + a * step]", "kKept ? cache[i]"),
    "more is kept than there is room for": (
        "multi_token_loss.cu",
        "cache_vectors / turn * turn : cut.vectors",
        "cut.vectors : cut.vectors",
    ),
    "no tail": ("multi_token_loss.cu", "loose = columns - in_vectors;", "loose = cut.head;"),
    "no head": ("multi_token_loss.cu", "use(i < cut.head ? i : i + in_vectors)", "use(i < cut.head ? cut.head : i + in_vectors)"),
    "vectors off their alignment, in rows of logits": ("common.cuh", "offset == 0 ? 0 : (16 - offset)", "offset == 0 ? 0 : (0 * offset)"),
    "vectors off their alignment, in a result": ("multi_token_loss.cu", "% 16 != 0) cut = {vocab, 0};", "% 16 > 16) cut = {vocab, 0};"),
    "vectors off their alignment, in a table": (
        "patch_embedding.cu",
        "hidden % width == 0 && aligned(first) && aligned(second);",
        "hidden % width == 0 && (true || aligned(first) || aligned(second));",
    ),
    "vectors past the end of a row of the table": ("patch_embedding.cu", "return hidden % width == 0 &&", "return hidden > width &&"),
    "repeated labels count once": ("multi_token_loss.cu", "taken += weight(other);", "taken += other == k ? weight(other) : 0;"),
    "every occurrence is a run of its own": (
        "patch_embedding.cu",
        "const bool ends = ids[entry + 1] != ids[entry];",
        "const bool ends = true;",
    ),
    "runs end with their tile": (
        "patch_embedding.cu",
        "if (last >= count || sorted_ids[last] != id) break;",
        "if (last >= 0) break;",
    ),
    "a lane too few": (
        "running_softmax.cuh",
        "for (int offset = kWarp / 2; offset > 0; offset /= 2) value",
        "for (int offset = kWarp / 2; offset > 1; offset /= 2) value",
    ),
    "a lane too few for the largest": (
        "running_softmax.cuh",
        "for (int offset = kWarp / 2; offset > 0; offset /= 2) largest",
        "for (int offset = kWarp / 2; offset > 1; offset /= 2) largest",
    ),
}


def loss_checks(library: ctypes.CDLL) -> None:
    """The checks that every mutant of the loss must fail: some of the cases above, under every order, in blocks of 128 to 1,024 threads."""
    for order in ORDERS:
        for shift in (0, 1):
            for dtype, limit in ((torch.float32, 20_480), (torch.bfloat16, 14_336)):
                for clusters in (False, True):
                    machine = CudaOnCpu(library, order, 3, limit + 8192 * clusters, shift, gap=3 * shift, clusters=clusters)
                    check_loss(machine, loss_case(1, 3, 6, 4100, dtype, weighted=True, z_loss=0.01))
            for labels in (300, 600):
                check_loss(CudaOnCpu(library, order, 3, LIMITS[-1], shift), loss_case(1, 1, labels, 4100, torch.float32))


def embedding_checks(library: ctypes.CDLL) -> None:
    """The checks that every mutant of the embedding must fail."""
    for order in ORDERS:
        for shift in (0, 1):
            machine = CudaOnCpu(library, order, 3, LIMITS[0])
            check_embedding(dataclasses.replace(machine, shift=shift), 1, 100, 4, 11, 24, torch.float32, 70)
            check_embedding(machine, 1, 30, 3, 7, 600, torch.float32, 0)
            check_embedding(machine, 1, 9, 3, 7, 257, torch.bfloat16, 0)


def in_a_process_of_its_own(check: Callable[[ctypes.CDLL], None], library: Path) -> tuple[int, str]:
    """Runs a check in a forked process, because a mutant can write anywhere. Returns (exit code, negative for a signal; the exception)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            check(ctypes.CDLL(str(library)))
            os._exit(0)
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode()[:4096])
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


@pytest.fixture(scope="module")
def header(tmp_path_factory) -> Path:
    """A folder with cuda_on_cpu.h compiled once for all mutants."""
    folder = tmp_path_factory.mktemp("header")
    kernels.precompile_header(folder)
    return folder


@pytest.mark.parametrize(("file", "check"), [("multi_token_loss.cu", loss_checks), ("patch_embedding.cu", embedding_checks)])
def test_what_is_no_mutant_passes_the_checks_that_mutants_must_fail(tmp_path, header, file, check):
    library = kernels.compile_mutant(header, file, "namespace", "namespace", tmp_path / "cuda")
    assert in_a_process_of_its_own(check, library) == (0, "")


# Compiling one takes about ten seconds: every sixth is always tried, the others are slow tests.
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if n % 6 else []) for n, name in enumerate(MUTANTS)])
def test_a_mutant_is_noticed(tmp_path, header, name):
    file, text, replacement = MUTANTS[name]
    library = kernels.compile_mutant(header, file, text, replacement, tmp_path / "cuda")
    code, said = in_a_process_of_its_own(embedding_checks if file == "patch_embedding.cu" else loss_checks, library)
    assert code != 0, "nothing was noticed"
    assert code < 0 or said.startswith(("AssertionError", "Trapped")), said
