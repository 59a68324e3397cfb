"""Models with documents: loss and gradients are those of a dense mask of T x T, from the tokens on; compiled blocks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from megatron_patch.data.collate import DocumentMasking, make_batch
from megatron_patch.model.attention import AttentionContext
from megatron_patch.model.gpt import GPTModel
from megatron_patch.model.init import initialize
from megatron_patch.ops import attention_kernels
from megatron_patch.ops import documents_attention as operator
from tests.model.shapes import BIASED, GPT2, LLAMA, QWEN3
from tests.ops.documents import dense_mask, documents_of, flash_on_cpu

EOD = 0
SHAPES = {
    "2 groups": LLAMA,
    "4 groups": dataclasses.replace(LLAMA, num_query_groups=4),
    "1 group": BIASED,
    "normalized heads": QWEN3,
    "learned positions": GPT2,
}
LENGTHS = {"one token": (1, 32), "constant positions": (4, 32), "constant tokens": (4, 8)}
"""K and T: of a token stage, and of a patch stage whose samples have as many positions, or as many tokens."""


class DenseMaskModel(GPTModel):
    """Attends by the mask of the documents in `ids`, [B, T]."""

    ids: torch.Tensor

    def _context(self, hidden, length, position_ids, documents, *rest):
        context = super()._context(hidden, length, position_ids, None, *rest)
        return AttentionContext(context.rotary, dense_mask(self.ids))


def make(shape, kind=GPTModel, dtype=torch.float32, **options):
    model = kind(shape, **options)
    initialize(model, shape, seed=1)
    return model.to(dtype)


def sample_tokens(samples, length, k):
    """Documents of 2 to 30 patches, most of which end inside of a patch; the first sample is one document."""
    draw = np.random.default_rng(k)
    tokens = draw.integers(1, 53, (samples, length))
    for row in tokens[1:]:
        ends = np.cumsum(draw.integers(2 * k, 30 * k if length > 30 * k else 4 * k, length))
        row[ends[ends < length]] = EOD
    return tokens


def document_ids(tokens, positions, k):
    """The document of each patch by the rule, token by token: that of its last token."""
    ids = torch.zeros(len(tokens), positions, dtype=torch.int64)
    for b, row in enumerate(tokens):
        current = 0
        for i, token in enumerate(row[: positions * k]):
            current += int(i > 0 and row[i - 1] == EOD and token != EOD)
            if i % k == k - 1:
                ids[b, i // k] = current
    return ids


def gradients(model, batch):
    """Loss, and the gradient of each parameter."""
    weights = None if batch.labels.shape[-1] == 1 else torch.tensor([1.6, 1.2, 0.8, 0.4])
    total, count = model(batch.input_ids, batch.labels, weights, batch.position_ids, batch.documents)
    (total / count).backward()
    return (total / count).detach(), [parameter.grad for parameter in model.parameters()]


def norm(gradient):
    return torch.cat([part.double().flatten() for part in gradient]).norm()


def check_against_the_dense_mask(name, length, reset, recompute):
    k, positions = LENGTHS[length]
    tokens = sample_tokens(3, (positions + 1) * k, k)
    masking = DocumentMasking(EOD, reset_attention_mask=True, reset_position_ids=reset, eod_mask_loss=True)
    batch = make_batch(tokens, "both", positions, k, masking, scored_rows=2)
    model, other = make(SHAPES[name], recompute=recompute), make(SHAPES[name], DenseMaskModel)
    other.ids = document_ids(tokens, positions, k)
    assert len(batch.documents.bounds) > 5 and int(other.ids.max()) > 0
    loss, found = gradients(model, batch)
    expected_loss, expected = gradients(other, batch)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=2e-7)
    assert norm([mine - theirs for mine, theirs in zip(found, expected, strict=True)]) <= 1e-6 * norm(expected)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("reset", [False, True], ids=["", "reset positions"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", SHAPES)
def test_loss_and_gradients_are_those_of_the_dense_mask(name, length, reset, recompute):
    check_against_the_dense_mask(name, length, reset, recompute)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_branch_of_cuda_too(name, recompute, monkeypatch):
    """With stand-ins on the CPU for the two operators of torch that it calls."""
    monkeypatch.setattr(operator, "kernel_for", lambda queries: attention_kernels.FlashKernel())
    with flash_on_cpu() as seen:
        check_against_the_dense_mask(name, "constant positions", True, recompute)
    names = [name for name, _, _ in seen.calls]
    assert names.count("backward") == 2 and names.count("forward") == (2 if recompute == "none" else 4)


def test_the_logits_are_those_of_the_dense_mask():
    tokens = sample_tokens(3, 33, 1)
    batch = make_batch(tokens, "both", 32, 1, DocumentMasking(EOD, reset_attention_mask=True))
    model, other = make(LLAMA, dtype=torch.float64), make(LLAMA, DenseMaskModel, torch.float64)
    other.ids = document_ids(tokens, 32, 1)
    found = model.logits(batch.input_ids, documents=batch.documents)
    torch.testing.assert_close(found, other.logits(batch.input_ids), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, model.logits(batch.input_ids))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_compiled_blocks_are_compiled_once_for_all_numbers_of_documents(backend, recompute):
    """Once for each mode; samples of one document each have a graph of their own."""
    torch._dynamo.reset()
    counters.clear()
    shape = dataclasses.replace(LLAMA, num_layers=3)
    model, other = make(shape, recompute=recompute), make(shape)
    model.compile_blocks(backend=backend)
    inputs = torch.randint(0, 53, (2, 16, 2), generator=torch.Generator().manual_seed(0))
    for rows in ([[5, 11], [16]], [[1] * 16, [16]], [[2, 2, 12], [3, 3, 10]], [[15, 1], [1, 15]]):
        documents = documents_of(rows)
        losses = [each(inputs, inputs, documents=documents)[0] for each in (model, other)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0.0)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    model(inputs, inputs)
    assert counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()
