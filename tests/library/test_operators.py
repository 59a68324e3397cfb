"""The operators against float64 formulas, through what other trainers wrap around them, and with wrong arguments."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_patch.errors import ConfigError
from megatron_patch.library import Stage, linear_multi_token_loss, multi_token_loss, patch_embedding, switch_optimizer
from tests.distributed.ranks import run_ranks

B, T, K, H, V = 2, 6, 4, 16, 40
KINDS = ("fused", "plain")


def draw(dtype=torch.float32, seed=0):
    """Table, token ids, head, labels (some not scored) and label weights."""
    torch.manual_seed(seed)
    table, head = torch.randn(V, H, dtype=dtype), torch.randn(V, H, dtype=dtype)
    ids, labels = torch.randint(V, (B, T, K)), torch.randint(V, (B, T, K))
    labels[0, 0, 1] = labels[1, 3] = -100
    return table.requires_grad_(), ids, head.requires_grad_(), labels, torch.tensor([2.0, 1.0, 0.5, 0.5])


def formula(table, ids, head, labels, weights, softcap=None):
    """The loss in float64, position by position and label by label."""
    total, scored = torch.zeros((), dtype=torch.float64), 0.0
    for b in range(B):
        for t in range(T):
            mean = sum(table.double()[i] for i in ids[b, t].tolist()) / K
            logits = head.double() @ torch.tanh(mean)
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            log_p = logits - torch.logsumexp(logits, 0)
            for k, label in enumerate(labels[b, t].tolist()):
                if label != -100:
                    total, scored = total - weights[k].double() * log_p[label], scored + float(weights[k])
    return total, scored


def ours(table, ids, head, labels, weights, operators="fused", softcap=None):
    hidden = torch.tanh(patch_embedding(table, ids, operators=operators))
    return linear_multi_token_loss(hidden, head, labels, weights, operators=operators, logit_softcap=softcap)


@pytest.mark.parametrize("operators", KINDS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_loss_and_gradients_are_those_of_the_formula(operators, softcap):
    table, ids, head, labels, weights = draw()
    total, weight = ours(table, ids, head, labels, weights, operators, softcap)
    found = torch.autograd.grad(total, (table, head))
    expected, scored = formula(table, ids, head, labels, weights, softcap)
    gradients = torch.autograd.grad(expected, (table, head))
    assert total.item() == pytest.approx(expected.item(), rel=1e-6) and weight.item() == pytest.approx(scored)
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("operators", KINDS)
def test_the_loss_of_logits_is_that_of_hidden_states(operators):
    table, ids, head, labels, weights = draw()
    total, weight = multi_token_loss(torch.tanh(patch_embedding(table, ids)) @ head.T, labels, weights, operators=operators)
    expected, scored = ours(table, ids, head, labels, weights)
    torch.testing.assert_close(total, expected)
    assert weight == scored
    for one, other in zip(torch.autograd.grad(total, (table, head)), torch.autograd.grad(expected, (table, head)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_at_k_1_they_are_embedding_and_cross_entropy():
    table, ids, head, labels, _ = draw()
    first, target = ids[..., :1], labels[..., :1]
    assert torch.equal(patch_embedding(table, first, operators="plain"), torch.nn.functional.embedding(ids[..., 0], table))
    logits = torch.tanh(table[ids[..., 0]]) @ head.T
    total, weight = multi_token_loss(logits, target, operators="plain")
    expected = torch.nn.functional.cross_entropy(logits.view(-1, V), target.reshape(-1), reduction="sum")
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-5)
    assert weight == (target != -100).sum()


@pytest.mark.parametrize("operators", KINDS)
def test_they_compile_as_one_graph(operators):
    def step(table, ids, head, labels, weights):
        total, weight = ours(table, ids, head, labels, weights, operators)
        return total / weight

    torch._dynamo.reset()
    table, ids, head, labels, weights = draw()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(table, ids, head, labels, weights), (table, head))
    expected = torch.autograd.grad(step(table, ids, head, labels, weights), (table, head))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_they_compile_with_inductor():
    torch._dynamo.reset()
    table, ids, head, labels, weights = draw()
    total, weight = torch.compile(ours, fullgraph=True)(table, ids, head, labels, weights)
    expected, scored = ours(table, ids, head, labels, weights)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(torch.autograd.grad(total, head), torch.autograd.grad(expected, head))
    assert weight == scored


@pytest.mark.parametrize("operators", KINDS)
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_computes_in_its_dtype_and_gives_float32_gradients(operators, compiled):
    def loss(table, ids, head, labels, weights):
        with torch.autocast("cpu", torch.bfloat16):
            total, weight = ours(table, ids, head, labels, weights, operators)
        return total / weight

    torch._dynamo.reset()
    inputs = draw()
    mean = (torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss)(*inputs)
    expected, scored = formula(*inputs)
    assert mean.dtype == torch.float32
    assert mean.item() == pytest.approx(expected.item() / scored, rel=2e-2)
    assert mean.item() != pytest.approx(expected.item() / scored, rel=1e-7)  # it did compute in bfloat16
    for gradient in torch.autograd.grad(mean, (inputs[0], inputs[2])):
        assert gradient.dtype == torch.float32 and gradient.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    inputs = draw()
    total, _ = checkpoint(ours, *inputs, use_reentrant=reentrant)
    expected, _ = ours(*inputs)
    total.backward()
    found = [inputs[0].grad.clone(), inputs[2].grad.clone()]
    for one, other in zip(found, torch.autograd.grad(expected, (inputs[0], inputs[2])), strict=True):
        assert torch.equal(one, other)


class TwoLayers(torch.nn.Module):
    """Embedding, layer, head: the smallest model that DDP and FSDP2 can wrap."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table, self.layer, self.head = torch.nn.Embedding(V, H), torch.nn.Linear(H, H), torch.nn.Linear(H, V, bias=False)

    def forward(self, ids, labels, weights, checkpointed=False):
        hidden = patch_embedding(self.table.weight, ids)
        hidden = checkpoint(self.layer, hidden, use_reentrant=False) if checkpointed else self.layer(hidden)
        return linear_multi_token_loss(torch.tanh(hidden), self.head.weight, labels, weights)


def check_the_switch(model):
    """With gradients, the switch is refused; without, it works on a state whose tensors may be sharded."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    stages = {rule: Stage("token", 1, T, 1, 1, 1, optimizer=rule) for rule in ("reset_moments", "reset")}
    with pytest.raises(ConfigError, match="middle of an accumulation"):
        switch_optimizer(optimizer, stages["reset"])
    optimizer.step()
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    optimizer.zero_grad()
    switch_optimizer(optimizer, stages["reset_moments"])
    for state in optimizer.state.values():
        moments = [state[name].full_tensor() if hasattr(state[name], "full_tensor") else state[name] for name in ("exp_avg", "exp_avg_sq")]
        assert float(state["step"]) == 1 and all(float(moment.abs().max()) == 0 for moment in moments)
    switch_optimizer(optimizer, stages["reset"])
    assert not optimizer.state
    for parameter, gradient in kept:
        parameter.grad = gradient


def gradients_on_a_rank(wrapper: str):
    """Returns the gradients of two wrapped ranks, each with one of the two samples, and a gradient of both samples on one rank."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model, alone = TwoLayers(), TwoLayers()
    _, ids, _, labels, weights = draw()
    if wrapper == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model.layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
        with pytest.raises(ValueError, match="DTensor.*inside the forward pass"):
            patch_embedding(model.table.weight, ids)
    total, _ = wrapped(ids[rank : rank + 1], labels[rank : rank + 1], weights, checkpointed=wrapper == "fsdp2")
    _, scored = alone(ids, labels, weights)
    (total * 2 / scored).backward()  # the wrappers take the mean over two ranks
    expected, _ = alone(ids, labels, weights)
    (expected / scored).backward()
    check_the_switch(model)
    full = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    return [(one - p.grad).abs().max().item() / p.grad.abs().max().item() for one, p in zip(full, alone.parameters(), strict=True)]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_two_wrapped_ranks_have_the_gradients_of_one(tmp_path, wrapper):
    for differences in run_ranks(gradients_on_a_rank, 2, tmp_path, wrapper):
        assert len(differences) == 4 and max(differences) < 1e-5, differences


def losses_of_shards():
    import torch.distributed as dist

    dist.init_process_group("gloo")
    table, ids, head, labels, weights = draw()
    rank, found = dist.get_rank(), {}
    start = (V // 2) * rank
    for operators in KINDS:
        rows = patch_embedding(table.detach()[start : start + V // 2], ids, vocab_start=start, operators=operators)
        dist.all_reduce(rows)
        hidden = torch.tanh(rows).requires_grad_()
        shard = head.detach()[start : start + V // 2]
        where = {"vocab_start": start, "group": dist.group.WORLD, "operators": operators}
        total, scored = linear_multi_token_loss(hidden, shard, labels, weights, **where)
        of_logits, _ = multi_token_loss(hidden.detach() @ shard.T, labels, weights, **where)
        (part,) = torch.autograd.grad(total, hidden)
        dist.all_reduce(part)
        found[operators] = (total.item(), of_logits.item(), scored.item(), part.norm().item())
    return found


def test_two_vocabulary_shards_have_the_loss_of_the_full_vocabulary(tmp_path):
    table, ids, head, labels, weights = draw()
    hidden = torch.tanh(patch_embedding(table, ids)).detach().requires_grad_()
    total, scored = linear_multi_token_loss(hidden, head, labels, weights)
    (gradient,) = torch.autograd.grad(total, hidden)
    expected = (total.item(), total.item(), scored.item(), gradient.norm().item())
    for found in run_ranks(losses_of_shards, 2, tmp_path):
        for operators in KINDS:
            assert found[operators] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t, i, h, y, w: patch_embedding(t, i.float()), "token_ids are torch.float32.*unflatten"),
        (lambda t, i, h, y, w: patch_embedding(t, i.view(-1)), r"token_ids are torch.int64 \[48\].*also at K = 1"),
        (lambda t, i, h, y, w: patch_embedding(i[0], i), r"weight is torch.int64 \[6, 4\]; allowed: floating point"),
        (lambda t, i, h, y, w: linear_multi_token_loss(t[:12], h, y, w), r"labels are torch.int64 \[2, 6, 4\] for hidden of shape \[12, 16\]"),
        (lambda t, i, h, y, w: multi_token_loss(t @ h.T, y[0], w), r"labels .*\[6, 4\] for logits of shape \[40, 40\].*PatchCollator"),
        (lambda t, i, h, y, w: multi_token_loss(torch.randn(2, 6, V), y, w[:3]), r"label_weights .*\[3\] for 4 labels.*weights_at"),
        (lambda t, i, h, y, w: linear_multi_token_loss(t[:6].bfloat16(), h, y[0], w), "hidden is torch.bfloat16.*of one dtype.*autocast"),
        (lambda t, i, h, y, w: multi_token_loss(torch.randn(2, 6, V), y, w, group=object()), "group without vocab_start"),
        (lambda t, i, h, y, w: multi_token_loss(y, y), "logits are torch.int64"),
        (lambda t, i, h, y, w: patch_embedding(t, torch.full((1, 1, 2), V)), "token_ids range from 40 to 40; allowed: 0 to 39|index out of range"),
    ],
)  # fmt: skip
def test_wrong_arguments_get_a_sentence(call, words):
    with pytest.raises((ValueError, IndexError), match=words):
        call(*draw())


def test_a_batch_without_scored_labels_has_no_loss():
    total, weight = multi_token_loss(torch.randn(1, 2, V), torch.full((1, 2, K), -100))
    assert (total.item(), weight.item()) == (0.0, 0.0) and not math.isnan(total.item())
