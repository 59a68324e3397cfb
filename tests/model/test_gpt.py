"""The model: bit-identical at K = 1, averages in float32, documents, recomputation, compilation, initial weights, parameter counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_patch.errors import ConfigError
from megatron_patch.model.attention import AttentionContext, ModelCache
from megatron_patch.model.flops import (
    attended_positions,
    forward_flops_per_position,
    parameter_count,
    peak_flops,
    training_flops_per_position,
)
from megatron_patch.model.generate import generate
from megatron_patch.model.gpt import GPTModel
from megatron_patch.model.init import InitialWeights, initial_span, initialize
from megatron_patch.model.rotary import rotary_tables
from megatron_patch.model.shape import check_shape
from megatron_patch.model.sharding import Shard
from megatron_patch.ops import IGNORE_INDEX, native, plain
from tests.model.shapes import FAMILIES, GEMMA2, GEMMA3, GPT2, LLAMA, QWEN3
from tests.ops.documents import documents_of


@pytest.fixture(autouse=True)
def _nothing_traced_before():
    """torch.compile gives up on a function after a number of traces, which the tests must not share."""
    torch._dynamo.reset()
    counters.clear()


def make(shape, dtype=torch.float32, **options):
    model = GPTModel(shape, **options)
    initialize(model, shape, seed=1)
    return model.to(dtype)


def batch(k, seed=0, b=2, t=6, vocab=53):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(0, vocab, (b, t, k), generator=generator)
    labels = torch.randint(0, vocab, (b, t, k), generator=generator)
    labels[0, 1, 0] = IGNORE_INDEX
    return inputs, labels


def ordinary_loss(model, word, tokens, labels):
    """An ordinary language model around the same blocks: F.embedding of `word` [V, H], one label a token, F.cross_entropy."""
    shape, dtype = model.shape, word.dtype
    hidden, context = F.embedding(tokens, word), AttentionContext()
    positions = torch.arange(tokens.shape[1])
    causal = positions[:, None] >= positions
    if shape.scaled_embeddings:
        hidden = hidden * torch.tensor(shape.hidden_size**0.5, dtype=dtype)
    if shape.position_embedding == "learned":
        hidden = hidden + F.embedding(positions, model.embedding.position.weight)
    else:
        cos, sin = rotary_tables(positions[None], shape, dtype)
        mask = causal[None, None] if shape.attention_softcap else None
        context = AttentionContext((cos[:, None], sin[:, None]), mask)
    for block in model.blocks.values():
        hidden = block(hidden, context)
    weight = model.embedding.word.weight if shape.tie_embeddings else model.head.weight
    logits = F.linear(model.final_norm(hidden), weight[: shape.vocab_size])
    if shape.logit_softcap:
        logits = torch.tanh(logits / shape.logit_softcap) * shape.logit_softcap
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return losses.sum() / (labels != IGNORE_INDEX).sum()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_token_a_patch_is_the_ordinary_language_model_to_the_last_bit(name, dtype):
    """With the plain operators: the loss and every gradient, for samples with repeated tokens."""
    model, other = make(FAMILIES[name], dtype, operators="plain"), make(FAMILIES[name], dtype)
    inputs, labels = batch(1, t=16, vocab=5)
    total, count = model(inputs, labels)
    (total / count).backward()
    word = other.embedding.word.weight.detach().clone().requires_grad_()
    expected = ordinary_loss(other, word, inputs[..., 0], labels[..., 0])
    expected.backward()

    assert torch.equal(total / count, expected)
    for (part, mine), (_, theirs) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        if part != "embedding.word.weight":
            assert torch.equal(mine.grad, theirs.grad), part
    if FAMILIES[name].tie_embeddings:
        word.grad = word.grad + other.embedding.word.weight.grad
    assert torch.equal(model.embedding.word.weight.grad, word.grad)


@pytest.mark.skipif(native.load_error() is not None, reason=f"compiled operators: {native.load_error()}")
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.05)])
def test_the_fused_operators_give_what_the_plain_formulas_give(name, k, dtype, tolerance):
    model, other = make(FAMILIES[name], dtype), make(FAMILIES[name], dtype, operators="plain")
    inputs, labels = batch(k, t=16, vocab=5)
    weights = None if k == 1 else torch.tensor([1.5, 1.0, 0.5])
    losses = []
    for each in (model, other):
        total, count = each(inputs, labels, weights)
        (total / count).backward()
        losses.append(total / count)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=tolerance)
    for (part, mine), (_, theirs) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        # The key's bias has no effect: its gradient is rounding alone.
        size = max(theirs.grad.norm(), 0.01 * other.embedding.word.weight.grad.norm())
        assert (mine.grad - theirs.grad).norm() <= tolerance * size, part


@pytest.mark.parametrize("k", [1, 4])
def test_the_mean_of_scaled_embeddings_is_the_scaled_mean(k):
    """The factor is rounded to the dtype of the weights, as Gemma does: √24 is 4.90625 in bfloat16."""
    ids = batch(k)[0]
    for dtype, factor in ((torch.float64, 24**0.5), (torch.bfloat16, 4.90625)):
        embedding = make(GEMMA3, dtype).embedding
        expected = (embedding.word.weight.double() * factor)[ids].mean(dim=2)
        torch.testing.assert_close(embedding(ids).double(), expected, rtol=1e-15 if dtype == torch.float64 else 2**-7, atol=1e-15)


def test_averages_are_taken_in_float32():
    """1, 1/256 three times: each sum in bfloat16 drops the small terms, so an average in bfloat16 would be 1/4 exactly."""
    weight = torch.tensor([[1.0], [2**-8]], dtype=torch.bfloat16)
    ids = torch.tensor([[[0, 1, 1, 1]]])
    expected = torch.tensor((1 + 3 * 2**-8) / 4, dtype=torch.float32).bfloat16()
    assert F.embedding(ids, weight).sum(-2).bfloat16().item() != (1 + 3 * 2**-8)
    for embed in (plain.patch_embedding, make(LLAMA).embedding.forward.__globals__["ops"].patch_embedding):
        assert embed(weight, ids).item() == expected.item() != 0.25


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_leaks_across_documents(name):
    model = make(FAMILIES[name])
    inputs, _ = batch(3, t=8)
    documents = documents_of([[3, 5]] * 2)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]] * 2)
    changed = inputs.clone()
    changed[:, 1] = (changed[:, 1] + 1) % 53
    first, second = (model.logits(ids, positions, documents) for ids in (inputs, changed))
    assert torch.equal(first[:, 3:], second[:, 3:])
    assert not torch.equal(first[:, 1:3], second[:, 1:3])
    alone = model.logits(inputs[:, 3:])
    torch.testing.assert_close(first[:, 3:], alone, rtol=1e-5, atol=1e-5)
    assert not torch.equal(model.logits(inputs)[:, 3:], model.logits(changed)[:, 3:]), "without documents everything is seen"


def test_a_document_of_its_own_is_trained_as_if_it_were_alone():
    """The loss of one document in the middle of a sample, and every gradient, are those of a sample that holds nothing else."""
    model, other = make(GPT2), make(GPT2)
    inputs, labels = batch(2, t=8)
    documents = documents_of([[2, 4, 2]] * 2)
    positions = torch.tensor([[0, 1, 0, 1, 2, 3, 0, 1]] * 2)
    outside = torch.tensor([True, True, False, False, False, False, True, True])[:, None]
    total, _ = model(inputs, labels.masked_fill(outside, IGNORE_INDEX), None, positions, documents)
    expected, _ = other(inputs[:, 2:6], labels[:, 2:6])
    total.backward()
    expected.backward()
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0.0)
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5 * max(scale, 0.1), msg=name)


@pytest.mark.parametrize("side", ["input", "output"])
def test_one_side_may_be_patched_alone(side):
    """K tokens in and one label out, or one token in and K labels out: each label by its own loop over the logits."""
    model = make(LLAMA, torch.float64)
    inputs, labels = batch(3)
    inputs, labels = (inputs, labels[..., :1]) if side == "input" else (inputs[..., :1], labels)
    total, count = model(inputs, labels)
    p = model.logits(inputs).detach().softmax(-1)
    scored = [(b, t, int(y)) for b in range(2) for t in range(6) for y in labels[b, t] if y != IGNORE_INDEX]
    assert count == len(scored) == labels.numel() - 1
    assert total.item() == pytest.approx(-sum(float(p[place].log()) for place in scored), rel=1e-12)


def test_no_position_sees_a_later_one():
    model = make(QWEN3)
    inputs, _ = batch(2, t=8)
    changed = inputs.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 53
    assert torch.equal(model.logits(inputs)[:, :5], model.logits(changed)[:, :5])


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_gives_the_same_gradients(recompute):
    inputs, labels = batch(4)
    models = [make(LLAMA), make(LLAMA, recompute=recompute)]
    for model in models:
        model(inputs, labels)[0].backward()
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("shape", [LLAMA, GPT2, GEMMA2], ids=["llama", "gpt2", "gemma2"])
def test_traces_without_a_graph_break(shape, k, backend):
    """Loss and gradients of the traced model are the untraced one's, with position weights and documents."""
    model, other = make(shape), make(shape)
    inputs, labels = batch(k)
    documents = documents_of([[2, 3, 1]] * 2)
    weights = None if k == 1 else torch.tensor([1.6, 1.2, 0.8, 0.4])
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    total, count = compiled(inputs, labels, weights, documents=documents)
    total.backward()
    expected, expected_count = other(inputs, labels, weights, documents=documents)
    expected.backward()
    torch.testing.assert_close((total, count), (expected, expected_count), rtol=1e-6, atol=0.0)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_blocks_are_compiled_once_for_each_length_and_mode():
    model, other = make(dataclasses.replace(LLAMA, num_layers=6)), make(dataclasses.replace(LLAMA, num_layers=6))
    model.compile_blocks(backend="eager")
    graphs = counters["stats"]
    for length, expected in ((4, 2), (6, 4), (4, 4)):
        inputs, labels = batch(2, t=length)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert torch.equal(model(inputs, labels)[0], other(inputs, labels)[0])
        assert graphs["unique_graphs"] == expected


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_traces_too(recompute):
    model, other = make(LLAMA, recompute=recompute), make(LLAMA)
    inputs, labels = batch(2)
    torch.compile(model, fullgraph=True, backend="aot_eager")(inputs, labels)[0].backward()
    other(inputs, labels)[0].backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_initial_weights_depend_on_seed_and_name_alone():
    wide = dataclasses.replace(LLAMA, ffn_hidden_size=80, num_layers=2)
    first, second = dict(make(LLAMA).named_parameters()), dict(make(wide).named_parameters())
    same = [name for name in first if first[name].shape == second[name].shape]
    assert len(same) > 10 and all(torch.equal(first[name], second[name]) for name in same)
    assert not torch.equal(initial_span("a.weight", (4, 4), LLAMA, 1), initial_span("a.weight", (4, 4), LLAMA, 2))
    assert not torch.equal(initial_span("a.weight", (4, 4), LLAMA, 1), initial_span("b.weight", (4, 4), LLAMA, 1))
    std = initial_span("blocks.0.feed_forward.down.weight", (400, 400), LLAMA, 1).std()
    assert std == pytest.approx(LLAMA.init_std / 2, rel=0.02), "1/sqrt(2 * 2 layers)"


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_counted_right(name):
    shape = FAMILIES[name]
    model = make(shape)
    padding = (shape.padded_vocab_size - shape.vocab_size) * shape.hidden_size * (1 if shape.tie_embeddings else 2)
    assert parameter_count(shape).total == sum(p.numel() for p in model.parameters()) - padding


def test_counts_by_hand():
    """Llama 7B: 4096 wide, 32 layers, 11,008 inner, 32,000 ids: 6,738,415,616 parameters, as published."""
    llama = dataclasses.replace(
        LLAMA, num_layers=32, hidden_size=4096, num_attention_heads=32, num_query_groups=32, head_size=128, ffn_hidden_size=11008,
        vocab_size=32000, padded_vocab_size=32000,
    )  # fmt: skip
    assert parameter_count(llama).total == 6_738_415_616
    # 2 FLOPs for each weight of the blocks and the head, and 4 * 4096 * (2048 + 1)/2 for attention in each layer.
    blocks = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    by_hand = 2 * (blocks + 4096 * 32000) + 32 * 4 * 4096 * 2049 / 2
    assert forward_flops_per_position(llama, 2048) == by_hand
    assert training_flops_per_position(llama, 2048) == 3 * by_hand


@pytest.mark.parametrize("window", [1, 3, 7, 8, 9, None])
def test_attended_positions_are_the_mean_of_a_band(window):
    band = torch.ones(8, 8).tril()
    band = band if window is None else band.triu(1 - window)
    assert attended_positions(8, window) == band.sum() / 8


def test_flops_of_windows_are_those_of_the_band():
    shape = dataclasses.replace(LLAMA, num_layers=3, window=5, full_layers=(1,))
    bands = [sum(min(t + 1, 5) for t in range(32)), sum(range(1, 33)), sum(min(t + 1, 5) for t in range(32))]
    products = 4 * shape.num_attention_heads * shape.head_size * sum(bands) / 32
    matrices = forward_flops_per_position(shape, 32, causal=False) - 3 * 4 * shape.num_attention_heads * shape.head_size * 32
    assert forward_flops_per_position(shape, 32) == matrices + products
    full = dataclasses.replace(shape, window=None, full_layers=())
    assert forward_flops_per_position(shape, 32) < forward_flops_per_position(full, 32)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("k", [1, 4])
def test_flops_equal_the_counter_of_torch(name, k):
    shape = FAMILIES[name]
    inputs, labels = batch(k, t=8)
    for operators in ("plain", "fused"):
        model = make(shape, operators=operators)
        # Attention as plain products, which torch counts without the causal mask.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            with torch.no_grad():
                model(inputs, labels)
            forward = counter.get_total_flops()
            model(inputs, labels)[0].backward()
        assert forward == 2 * 8 * forward_flops_per_position(shape, 8, causal=False)
        assert counter.get_total_flops() - forward == 3 * forward, "the backward pass costs two forward passes"


def test_the_cache_gives_what_reading_everything_again_gives():
    model = make(QWEN3)
    prompt = torch.tensor([[3, 8, 1]])
    ids = prompt
    for _ in range(8):
        ids = torch.cat((ids, model.logits(ids[..., None])[:, -1].argmax(-1)[:, None]), dim=1)
    assert generate(model, prompt.tolist(), 8) == [ids[0, 3:].tolist()]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_cache_may_be_filled_in_pieces(name):
    model = make(FAMILIES[name], torch.float64)
    ids = batch(1, t=9)[0]
    cache = ModelCache()
    pieces = [model.logits(ids[:, start:stop], cache=cache) for start, stop in ((0, 3), (3, 7), (7, 8), (8, 9))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model.logits(ids), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_query_groups": 3}, "query groups"),
        ({"head_size": 5}, "even"),
        ({"padded_vocab_size": 10}, "rows"),
        ({"num_layers": 0}, "num_layers"),
        ({"norm_epsilon": 0.0}, "epsilon"),
    ],
)
def test_impossible_shapes_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        check_shape(dataclasses.replace(LLAMA, **change))


def test_more_positions_than_were_learned_are_refused():
    model = make(GPT2)
    inputs, labels = batch(1, t=GPT2.max_positions + 1)
    with pytest.raises(ConfigError, match="33 positions, but the model has 32"):
        model(inputs, labels)
    assert torch.isfinite(make(LLAMA)(inputs, labels)[0])


def test_peaks_are_found_by_the_names_that_drivers_give():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H200") == 989.4e12
    assert peak_flops("NVIDIA H200 NVL") == 835e12
    assert peak_flops("NVIDIA GH200 480GB") == 989.4e12
    assert peak_flops("NVIDIA GB300") == 2500e12 and peak_flops("NVIDIA B300 SXM6 AC") == 2250e12
    assert peak_flops("cpu") is None
    assert peak_flops("NVIDIA RTX A4000") is None, "no A40"


def test_initial_values_of_a_part_are_those_of_the_whole():
    """For every kind of part: spans across the blocks of a draw, rows, columns."""
    full_shape = (3000, 1100)
    whole = initial_span("x.weight", full_shape, LLAMA, 3)
    assert whole.numel() == 3_300_000 and abs(whole.std() / LLAMA.init_std - 1) < 0.01
    blocks = whole[: 3 << 20].view(3, -1)
    assert (torch.corrcoef(blocks).fill_diagonal_(0).abs() < 0.01).all(), "no block repeats another"
    for start, numel in ((0, 10), ((1 << 20) - 5, 10), (2_000_000, 1_300_000), (5, 0)):
        assert torch.equal(
            initial_span("x.weight", full_shape, LLAMA, 3, start, numel, threads=1 + start % 3), whole[start : start + numel]
        )
    read = InitialWeights(LLAMA, 3).read
    for shard in (Shard(0, 1, 3), Shard(1, 1, 2)):
        part = whole.view(full_shape).chunk(shard.count, dim=shard.dim)[shard.index].flatten()
        assert torch.equal(read("x.weight", full_shape, shard, 999_999, 77), part[999_999:][:77])
