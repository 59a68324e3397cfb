"""Attention: compared with its formula in loops, with and without repeated heads; what recomputation keeps in memory."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megatron_patch.model import attention as attention_module
from megatron_patch.model.attention import Attention, AttentionContext, repeat_groups, supports_grouped_queries
from megatron_patch.model.rotary import rotary_tables, rotate
from tests.model.shapes import LLAMA

SHAPE = dataclasses.replace(LLAMA, head_size=10)
T = 5


def hidden_states(dtype=torch.float64):
    return torch.randn(2, T, SHAPE.hidden_size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def make(dtype=torch.float64, **options):
    torch.manual_seed(1)
    return Attention(SHAPE, **options).to(dtype)


def by_loops(layer, hidden, sees):
    """softmax(q k / sqrt(d)) v for each position and head, without positions; query head h reads key-value head h // (heads/groups)."""
    out = torch.zeros(2, T, SHAPE.num_attention_heads * SHAPE.head_size, dtype=torch.float64)
    d, share = SHAPE.head_size, SHAPE.num_attention_heads // SHAPE.num_query_groups
    for b in range(2):
        q, k, v = (hidden[b] @ part.weight.T for part in (layer.query, layer.key, layer.value))
        for t in range(T):
            for h in range(SHAPE.num_attention_heads):
                mine, theirs = slice(h * d, h * d + d), slice(h // share * d, h // share * d + d)
                visible = [s for s in range(t + 1) if sees(t, s)]
                scores = [math.exp(float(q[t, mine] @ k[s, theirs]) / math.sqrt(d)) for s in visible]
                out[b, t, mine] = sum(x * v[s, theirs] for x, s in zip(scores, visible, strict=True)) / sum(scores)
    return out @ layer.output.weight.T


@pytest.mark.parametrize("repeated", [False, True])
def test_the_formula_with_grouped_heads(repeated, monkeypatch):
    if repeated:
        monkeypatch.setattr(attention_module, "supports_grouped_queries", lambda *args, **kwargs: False)
    layer, hidden = make(), hidden_states()
    with torch.no_grad():
        torch.testing.assert_close(layer(hidden, AttentionContext()), by_loops(layer, hidden, lambda t, s: True), rtol=1e-12, atol=1e-12)
        documents = torch.tensor([0, 0, 1, 1, 1])
        mask = ((documents[:, None] == documents[None]) & torch.ones(T, T, dtype=torch.bool).tril())[None, None]
        masked = by_loops(layer, hidden, lambda t, s: documents[t] == documents[s])
        torch.testing.assert_close(layer(hidden, AttentionContext(mask=mask)), masked, rtol=1e-12, atol=1e-12)


def test_repeating_groups_changes_no_gradient(monkeypatch):
    gradients = []
    for repeated in (False, True):
        if repeated:
            monkeypatch.setattr(attention_module, "supports_grouped_queries", lambda *args, **kwargs: False)
        layer = make()
        layer(hidden_states(), AttentionContext()).square().sum().backward()
        gradients.append([parameter.grad for parameter in layer.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)


def test_groups_are_repeated_side_by_side():
    groups = torch.arange(2 * 3).view(1, 2, 3, 1)
    assert repeat_groups(groups, 4)[0, :, :, 0].tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]


def test_grouped_heads_stay_grouped_only_where_a_fast_kernel_takes_them():
    assert supports_grouped_queries("cpu", torch.float32, 64, masked=True)
    assert supports_grouped_queries("cuda", torch.bfloat16, 128, masked=False)
    assert not supports_grouped_queries("cuda", torch.bfloat16, 128, masked=True)
    assert not supports_grouped_queries("cuda", torch.float32, 128, masked=False)
    assert not supports_grouped_queries("cuda", torch.bfloat16, 512, masked=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_no_scores_are_kept_on_a_gpu(dtype, masked):
    """Forward and backward at T = 4,096 stay far below one [B, heads, T, T] tensor."""
    length, shape = 4096, dataclasses.replace(SHAPE, hidden_size=512, num_attention_heads=8, num_query_groups=2, head_size=64)
    layer = Attention(shape).to("cuda", dtype)
    hidden = torch.randn(1, length, 512, device="cuda", dtype=dtype)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="cuda").tril() if masked else None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer(hidden, AttentionContext(mask=mask)).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 8 * length * length * dtype.itemsize


def test_rotation_turns_pairs_by_the_position_s_angle():
    """The pair (x_i, x_{i + d/2}) as a complex number, times exp(i * position * base^(-2i/d))."""
    d, positions = 6, torch.tensor([[0, 1, 7, 1000]])
    heads = torch.randn(1, 2, 4, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_tables(positions, dataclasses.replace(LLAMA, head_size=d, rotary_base=500.0), torch.float64)
    turned = rotate(heads, cos[:, None], sin[:, None])
    for t, position in enumerate(positions[0].tolist()):
        for i in range(d // 2):
            for h in range(2):
                pair = complex(heads[0, h, t, i], heads[0, h, t, i + d // 2])
                angle = position * 500.0 ** (-2 * i / d)
                expected = pair * complex(math.cos(angle), math.sin(angle))
                assert complex(turned[0, h, t, i], turned[0, h, t, i + d // 2]) == pytest.approx(expected, rel=1e-10)


def kept_bytes(layer, hidden):
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(hidden, AttentionContext())
    return sum(kept.values()), out


def test_selective_recomputation_keeps_no_product_of_attention():
    """With it, what the backward pass needs of the attention product is its inputs; its output and log-sums are not kept for it."""
    plain, plain_out = kept_bytes(make(torch.float32), hidden_states(torch.float32))
    frugal, frugal_out = kept_bytes(make(torch.float32, recompute=True), hidden_states(torch.float32))
    assert torch.equal(plain_out, frugal_out)
    assert frugal < plain
