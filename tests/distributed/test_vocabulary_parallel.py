"""Vocabulary shards on real ranks: embedding, loss and chunked head equal the unsharded ones, with one exchange of 2 + K floats per row."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from megatron_patch.ops import fused_embedding, fused_linear_loss, fused_loss, native
from tests.distributed.ranks import run_ranks
from tests.ops.cases import loss_case

pytestmark = pytest.mark.skipif(native.load_error() is not None, reason=f"compiled operators: {native.load_error()}")
ROWS, K, VOCAB, WIDTH = 13, 3, 50, 8


def inputs():
    generator = torch.Generator().manual_seed(0)
    case = loss_case(2, ROWS, K, VOCAB, torch.float32, weighted=True, z_loss=0.02)
    ids = torch.randint(0, VOCAB, (ROWS, K), generator=generator)
    return case, ids, torch.randn(ROWS, WIDTH, generator=generator), torch.randn(VOCAB, WIDTH, generator=generator)


def operators(first, last, group, chunk_rows=5):
    """Returns results and gradients of embedding, loss and chunked head on rows [first, last) of the vocabulary."""
    case, ids, hidden, weight = inputs()
    start = None if group is None else first
    shard = weight[first:last].clone().requires_grad_()
    embedded = fused_embedding.patch_embedding(shard, ids, start)
    (by_shard,) = torch.autograd.grad(embedded.square().sum() if group is None else embedded, shard, None if group is None else 2 * whole())
    logits = case.logits[:, first:last].clone().requires_grad_()
    nll, lse = fused_loss.multi_token_loss(logits, case.labels, start, group)
    (by_logits,) = torch.autograd.grad((nll * torch.tensor([1.0, 2.0, 3.0])).sum() + lse.sum(), logits)
    hidden.requires_grad_()
    loss, count = fused_linear_loss.linear_multi_token_loss(
        hidden, shard, case.labels, case.label_weights, case.z_loss, start, group, chunk_rows
    )
    by_hidden, by_head = torch.autograd.grad(loss, (hidden, shard))
    tensors = (embedded, by_shard, nll, lse, by_logits, loss, count, by_hidden, by_head)
    return [tensor.detach().numpy() for tensor in tensors]


def whole():
    _, ids, _, weight = inputs()
    return fused_embedding.patch_embedding(weight, ids)


def on_a_rank():
    """Returns this rank's results, and what it sent: [(collective, shape)]."""
    dist.init_process_group("gloo")
    size, rank = dist.get_world_size(), dist.get_rank()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        results = operators(VOCAB * rank // size, VOCAB * (rank + 1) // size, dist.group.WORLD)
    calls = [event for event in profiler.events() if event.name.startswith("gloo:")]
    return results, [(event.name, event.input_shapes[0]) for event in sorted(calls, key=lambda event: event.time_range.start)]


def traced_on_a_rank():
    """Returns whether the three operators have the same gradients in one traced graph as without tracing."""
    dist.init_process_group("gloo")
    size, rank = dist.get_world_size(), dist.get_rank()
    first, last = VOCAB * rank // size, VOCAB * (rank + 1) // size
    case, ids, hidden, weight = inputs()
    shard, group = weight[first:last].clone().requires_grad_(), dist.group.WORLD

    def model(states, table):
        states = states + fused_embedding.patch_embedding(table, ids, first)
        nll, lse = fused_loss.multi_token_loss(states @ table.t(), case.labels, first, group)
        loss, count = fused_linear_loss.linear_multi_token_loss(states, table, case.labels, None, 0.1, first, group, 5)
        return nll.sum() + lse.sum() + loss / count

    hidden.requires_grad_()
    traced = torch.compile(model, fullgraph=True, backend="aot_eager")
    pairs = zip(*(torch.autograd.grad(each(hidden, shard), (hidden, shard)) for each in (traced, model)), strict=True)
    return [torch.equal(one, other) for one, other in pairs]


def test_shards_trace_without_a_graph_break(tmp_path):
    assert run_ranks(traced_on_a_rank, 2, tmp_path) == [[True, True]] * 2


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_shards_on_ranks_equal_the_whole_with_one_exchange(tmp_path, ranks):
    expected = operators(0, VOCAB, None)
    outcomes = run_ranks(on_a_rank, ranks, tmp_path)
    parts = [results for results, _ in outcomes]
    for index, axis in ((0, "sum"), (1, 0), (2, None), (3, None), (4, 1), (5, None), (6, None), (7, "sum"), (8, 0)):
        arrays = [torch.from_numpy(part[index]) for part in parts]
        if axis == "sum":
            value = torch.stack(arrays).sum(dim=0)
        elif axis is None:
            value = arrays[0]
            assert all(torch.equal(array, value) for array in arrays), "every rank has the same loss"
        else:
            value = torch.cat(arrays, dim=axis)
        torch.testing.assert_close(value, torch.from_numpy(expected[index]), rtol=2e-6, atol=2e-6)
    # One exchange for the loss of 13 rows and one for each chunk of the head, and no other.
    for _, sent in outcomes:
        assert sent == [("gloo:all_gather", [rows, 2 + K]) for rows in (ROWS, 5, 5, 3)]
