"""Models with windows: loss and gradients are those of a dense band of T x T; generation with its cache; blocks with and without a window."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._dynamo.utils import counters

from megatron_patch.data.collate import DocumentMasking, make_batch
from megatron_patch.model.attention import AttentionContext, KeyValueCache, ModelCache
from megatron_patch.model.generate import Sampling, generate, generate_without_cache
from megatron_patch.model.gpt import GPTModel
from megatron_patch.ops import attention_kernels
from megatron_patch.ops import documents_attention as operator
from tests.model.shapes import GEMMA2, GEMMA3, GPT2, LLAMA, QWEN3
from tests.model.test_documents import EOD, LENGTHS, document_ids, gradients, make, norm, sample_tokens
from tests.ops.documents import dense_mask, flash_on_cpu

WINDOW = dataclasses.replace(LLAMA, window=5)
SHAPES = {
    "every block": WINDOW,
    "one block": dataclasses.replace(LLAMA, num_layers=3, window=3, full_layers=(0, 2)),
    "normalized heads": dataclasses.replace(QWEN3, window=2),
    "learned positions": dataclasses.replace(GPT2, window=7),
    "one position": dataclasses.replace(LLAMA, window=1),
    "capped scores": dataclasses.replace(GEMMA2, window=3, full_layers=(1,)),
    "two rotary bases": dataclasses.replace(GEMMA3, window=3, full_layers=(0,), windowed_rotary_base=300.0),
    "longer than the sample": dataclasses.replace(LLAMA, window=40),
}


class DenseBandModel(GPTModel):
    """Attends by a mask of T x T, of the documents in `ids`, [B, T], and in blocks with a window by a band of it."""

    ids: torch.Tensor

    def _context(self, hidden, length, position_ids, documents, *rest):
        context = super()._context(hidden, length, position_ids, None, *rest)
        masks = {"mask": dense_mask(self.ids), "windowed_mask": dense_mask(self.ids, self.shape.window)}
        return AttentionContext(context.rotary, windowed_rotary=context.windowed_rotary, **masks)


def check_against_the_dense_band(shape, length, separate, recompute="none"):
    k, positions = LENGTHS[length]
    tokens = sample_tokens(3, (positions + 1) * k, k)
    masking = (
        DocumentMasking(EOD, reset_attention_mask=True, reset_position_ids=True, eod_mask_loss=True) if separate else DocumentMasking()
    )
    batch = make_batch(tokens, "both", positions, k, masking, scored_rows=2)
    model, other = make(shape, recompute=recompute), make(shape, DenseBandModel)
    other.ids = document_ids(tokens, positions, k) if separate else torch.zeros(3, positions, dtype=torch.int64)
    loss, found = gradients(model, batch)
    expected_loss, expected = gradients(other, batch)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=3e-7)
    assert norm([mine - theirs for mine, theirs in zip(found, expected, strict=True)]) <= 1e-6 * norm(expected)
    return loss.item(), batch, bool((dense_mask(other.ids, shape.window) != dense_mask(other.ids)).any())


@pytest.mark.parametrize("separate", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", SHAPES)
def test_loss_and_gradients_are_those_of_the_dense_band(name, length, separate):
    loss, batch, effect = check_against_the_dense_band(SHAPES[name], length, separate)
    plain = dataclasses.replace(SHAPES[name], window=None, full_layers=(), windowed_rotary_base=None)
    other, _ = gradients(make(plain), batch)
    assert (loss == pytest.approx(other.item(), rel=1e-5)) != effect


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("separate", [False, True], ids=["", "documents"])
def test_with_recomputation(recompute, separate):
    check_against_the_dense_band(SHAPES["one block"], "constant positions", separate, recompute)


@pytest.mark.parametrize("separate", [False, True], ids=["", "documents"])
def test_the_branch_of_cuda_too(separate, monkeypatch):
    """Only blocks with a window, and those with documents, reach the operator."""
    monkeypatch.setattr(operator, "kernel_for", lambda queries: attention_kernels.FlashKernel())
    with flash_on_cpu() as seen:
        check_against_the_dense_band(SHAPES["one block"], "constant positions", separate)
    assert sorted(seen.windows, key=str) == [2, 2, *([None] * 4 if separate else [])]


def test_compiled_blocks_are_compiled_once_for_each_window():
    torch._dynamo.reset()
    counters.clear()
    shape = dataclasses.replace(LLAMA, num_layers=6, window=5, full_layers=(2, 5))
    model, other = make(shape), make(shape)
    model.compile_blocks(backend="aot_eager")
    inputs = torch.randint(0, 53, (2, 16, 2), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        losses = [each(inputs, inputs)[0] for each in (model, other)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0.0)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["every block", "one block", "learned positions", "one position", "capped scores", "two rotary bases"])
def test_the_cache_gives_the_logits_of_the_full_sequence(name):
    """Read at once, one by one, and in parts, with earlier positions both inside and outside of the window."""
    model = make(SHAPES[name], dtype=torch.float64).eval()
    ids = torch.randint(0, 53, (2, 24, 1), generator=torch.Generator().manual_seed(0))
    other = make(SHAPES[name], DenseBandModel, torch.float64).eval()
    other.ids = torch.zeros(2, 24, dtype=torch.int64)
    expected = other.logits(ids)
    torch.testing.assert_close(model.logits(ids), expected, rtol=1e-12, atol=1e-12)
    for parts in ([24], [1] * 24, [2, 10, 1, 1, 7, 3], [12, 12]):
        cache = ModelCache()
        found = torch.cat([model.logits(part, cache=cache) for part in ids.split(parts, dim=1)], dim=1)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_prompts_of_several_lengths_continue_as_each_alone():
    """Shorter prompts are padded at the start: the window counts their own positions."""
    model = make(SHAPES["one block"], dtype=torch.float64).eval()
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [7], [20, 21, 22, 23]]
    together = generate(model, prompts, 12)
    assert together == [generate(model, [prompt], 12)[0] for prompt in prompts]
    without = generate_without_cache(lambda ids: model.logits(ids[..., None]), prompts, 12, Sampling(), None, torch.device("cpu"))
    assert together == without and len({tuple(row) for row in together}) == 3


def cached_bytes(cache):
    """Returns the bytes that the caches of each block hold, whatever part of them is used."""
    return [block.keys.untyped_storage().nbytes() + block.values.untyped_storage().nbytes() for block in cache.blocks]


@pytest.mark.parametrize("name", ["one block", "capped scores", "two rotary bases", "one position"])
@pytest.mark.parametrize("padding", [None, [0, 5]], ids=["", "padded"])
def test_a_block_with_a_window_caches_no_more_than_the_window(name, padding):
    """Prompts of 9 tokens, then 40 one by one: logits are those of a cache of all positions, and memory does not grow."""
    model = make(SHAPES[name], dtype=torch.float64).eval()
    shape = model.shape
    ids = torch.randint(0, 53, (2, 49, 1), generator=torch.Generator().manual_seed(0))
    rows = None if padding is None else torch.tensor(padding)
    trimmed, whole = ModelCache(padding=rows), ModelCache([KeyValueCache() for _ in range(shape.num_layers)], padding=rows)
    each = 2 * 2 * shape.num_query_groups * shape.head_size * 8  # keys and values of two rows
    for part in ids.split([9] + [1] * 40, dim=1):
        with torch.no_grad():
            torch.testing.assert_close(model.logits(part, cache=trimmed), model.logits(part, cache=whole), rtol=1e-12, atol=1e-12)
        for layer, found in enumerate(cached_bytes(trimmed)):
            window = shape.window_of(layer)
            assert found == each * min(window, trimmed.length) if window is not None else found >= each * trimmed.length
    assert min(cached_bytes(whole)) >= each * 49 == each * trimmed.length
