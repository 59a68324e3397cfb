"""The CUDA kernels' own source, run on the CPU (tests/cuda_on_cpu), over the cases of the CPU's kernels and under several thread orders.

Mutants show that the comparison sees what it should: a barrier that is missing, a wrong stride, a tail that is skipped.
"""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import subprocess
import sys
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
WAYS = st.builds(
    lambda order, seed, limit, shift, gap: (order, seed, limit, shift, gap),
    st.sampled_from(list(ORDERS)),
    st.integers(1, 99),
    st.sampled_from([4096, 65536]),
    st.integers(0, 1),
    st.sampled_from([0, 3]),
)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("cuda_on_cpu") / "kernels.so"
    compile_kernels(kernels.SOURCES, path)
    return ctypes.CDLL(str(path))


def check_loss(machine: CudaOnCpu, case: LossCase) -> None:
    """Both ways to the loss and its gradient, whole and in shards, against float64."""
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
    """Forward and backward, whole and in shards, against float64; `common` of the patches hold one id alone."""
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
        check_loss(CudaOnCpu(library, order, shared_limit=100_000), loss_case(5, 2, 4, vocab, dtype, weighted=True, z_loss=1e-3))


def test_every_order_gives_the_same_bits(library):
    case = loss_case(3, 4, 5, 4100, torch.float32)
    ids = torch.randint(0, 9, (90, 3), generator=torch.Generator().manual_seed(0))
    grad = torch.randn(90, 40, generator=torch.Generator().manual_seed(1))
    results = []
    for order in ORDERS:
        for limit in (4096, 65536):
            machine = CudaOnCpu(library, order, 7, limit)
            losses, gradient = machine.loss_and_gradient(case.logits, case.labels, None, 0.0)
            results.append((losses, gradient, machine.patch_embedding_backward(grad, ids, 9)))
    for each in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(each, results[0], strict=True))


def test_extreme_logits_have_the_results_that_torch_gives(library):
    inf = float("inf")
    rows = torch.zeros(6, 300)
    rows[0, :280] = -inf
    rows[1, 5] = float("nan")
    rows[2, :2] = 3e38
    rows[3, 0] = -200.0
    rows[4] = -inf
    rows[5, 7] = inf
    labels = torch.tensor([[290], [1], [0], [3], [0], [1]])
    theirs = rows.double().requires_grad_()
    expected = F.cross_entropy(theirs, labels[:, 0], reduction="none")
    expected.sum().backward()
    losses, gradient = CudaOnCpu(library).loss_and_gradient(rows, labels, None, 0.0)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(gradient.double(), theirs.grad, rtol=1e-6, atol=1e-37, equal_nan=True)


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
    """Cut to 32 bits, the last would launch one block and leave all other rows as they were."""
    library.cuda_on_cpu_prepare(0, 1, 65536)
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


# (file, text, its replacement): one barrier, stride, tail, tile or alignment at a time.
MUTANTS = {
    "no barrier before the block's parts are added": (
        "common.cuh",
        "if (lane == 0) scratch[warp] = value;\n  __syncthreads();",
        "if (lane == 0) scratch[warp] = value;",
    ),
    "no barrier before the block's scratch serves again": (
        "common.cuh",
        "total += scratch[other];\n  __syncthreads();",
        "total += scratch[other];",
    ),
    "no barrier before the block's maxima are merged": (
        "multi_token_loss.cu",
        "if (lane == 0) scratch[warp] = mine;\n  __syncthreads();",
        "if (lane == 0) scratch[warp] = mine;",
    ),
    "no barrier before logits are overwritten": (
        "multi_token_loss.cu",
        "  __syncthreads();  // labels' logits are read before anything is overwritten\n",
        "",
    ),
    "no barrier before labels are corrected": (
        "multi_token_loss.cu",
        "cache, kept, whole.largest, factor);\n  __syncthreads();",
        "cache, kept, whole.largest, factor);",
    ),
    "no barrier before labels are corrected, where losses are label by label": (
        "multi_token_loss.cu",
        "nullptr, 0, largest, factor);\n  __syncthreads();",
        "nullptr, 0, largest, factor);",
    ),
    "no barrier behind the tile's ids": (
        "patch_embedding.cu",
        "sorted_ids[begin - 1] == sorted_ids[begin];\n  __syncthreads();",
        "sorted_ids[begin - 1] == sorted_ids[begin];",
    ),
    "a wrong stride of rows": ("multi_token_loss.cu", "T* target = logits + row * stride;", "T* target = logits + row * (stride - 1);"),
    "a wrong stride of rows that lie apart": ("multi_token_loss.cu", "source = logits + row * stride;", "source = logits + row * vocab;"),
    "a wrong stride of threads": (
        "multi_token_loss.cu",
        "for (int64_t i = thread; i < cut.vectors; i += threads) {\n    const Wide<T> vector",
        "for (int64_t i = thread; i < cut.vectors; i += threads + 1) {\n    const Wide<T> vector",
    ),
    "no tail when reading": ("multi_token_loss.cu", "v < vocab; v += threads) take<T, 1>", "v < 0; v += threads) take<T, 1>"),
    "no tail when writing": ("multi_token_loss.cu", "v < vocab; v += threads) out[v]", "v < 0; v += threads) out[v]"),
    "no head when reading": ("multi_token_loss.cu", "v < cut.head; v += threads) take<T, 1>", "v < 0; v += threads) take<T, 1>"),
    "vectors off their alignment, in rows of logits": ("common.cuh", "offset == 0 ? 0 : (16 - offset)", "offset == 0 ? 0 : (0 * offset)"),
    "vectors off their alignment, in a result": ("multi_token_loss.cu", "% 16 != 0) cut = {vocab, 0};", "% 16 > 16) cut = {vocab, 0};"),
    "vectors off their alignment, in a table": (
        "patch_embedding.cu",
        "hidden % width == 0 && aligned(first) && aligned(second);",
        "hidden % width == 0 && (true || aligned(first) || aligned(second));",
    ),
    "vectors past the end of a row of the table": ("patch_embedding.cu", "return hidden % width == 0 &&", "return hidden > width &&"),
    "repeated labels count once": ("multi_token_loss.cu", "taken += weight(other);", "if (other == k) taken += weight(other);"),
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
    "a lane too few": ("common.cuh", "for (int offset = kWarp / 2; offset > 0;", "for (int offset = kWarp / 2; offset > 1;"),
}


def checks(library: ctypes.CDLL) -> None:
    """What every mutant must fail at: a few of the cases above, under every order."""
    for order in ORDERS:
        for shift in (0, 1):
            machine = CudaOnCpu(library, order, 3, 4096, shift, gap=3 * shift)
            for dtype in (torch.float32, torch.bfloat16):
                check_loss(machine, loss_case(1, 3, 6, 4100, dtype, weighted=True, z_loss=0.01))
            check_embedding(machine, 1, 100, 4, 11, 24, torch.float32, 70)
            check_embedding(dataclasses.replace(machine, shift=0), 1, 30, 3, 7, 600, torch.float32, 0)
            check_embedding(dataclasses.replace(machine, shift=0), 1, 9, 3, 7, 257, torch.bfloat16, 0)


def test_the_checks_that_mutants_must_fail_pass_without_them(library):
    checks(library)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(tmp_path, name):
    file, text, replacement = MUTANTS[name]
    folder = tmp_path / "cuda"
    shutil.copytree(kernels.SOURCES, folder)
    source = (folder / file).read_text()
    assert source.count(text) >= 1, "the mutant's place is gone: name it anew"
    (folder / file).write_text(source.replace(text, replacement))
    compile_kernels(folder, tmp_path / "mutant.so", "-Wno-error")
    # In a process of its own, as a mutant may write anywhere.
    script = f"import ctypes; from tests.ops.test_cuda_on_cpu import checks; checks(ctypes.CDLL({str(tmp_path / 'mutant.so')!r}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent.parent, capture_output=True, text=True)
    assert done.returncode != 0, "nothing was noticed"
    assert done.returncode < 0 or any(word in done.stderr for word in ("AssertionError", "Trapped")), done.stderr
