"""The model: K = 1 to the last bit, averages in float32, documents, recomputation, compiling, initial weights, counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_patch.errors import ConfigError
from megatron_patch.model.attention import AttentionContext
from megatron_patch.model.flops import forward_flops_per_position, parameter_count, peak_flops, training_flops_per_position
from megatron_patch.model.generate import generate
from megatron_patch.model.gpt import GPTModel
from megatron_patch.model.init import initial_value, initialize, parameter_groups
from megatron_patch.model.rotary import rotary_tables
from megatron_patch.model.shape import check_shape
from megatron_patch.ops import IGNORE_INDEX, plain
from tests.model.shapes import FAMILIES, GPT2, LLAMA, QWEN3


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


@pytest.mark.parametrize("shape", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_a_patch_is_the_ordinary_language_model_to_the_last_bit(shape, dtype):
    """The ordinary model is written with F.embedding and F.cross_entropy around the same blocks."""
    model, other = make(shape, dtype), make(shape, dtype)
    inputs, labels = batch(1)
    total, count = model(inputs, labels)
    (total / count).backward()

    hidden = F.embedding(inputs.squeeze(-1), other.embedding.word.weight)
    positions = torch.arange(inputs.shape[1])
    context = AttentionContext()
    if shape.position_embedding == "learned":
        hidden = hidden + F.embedding(positions, other.embedding.position.weight)
    else:
        cos, sin = rotary_tables(positions[None], shape.head_size, shape.rotary_base, dtype)
        context = AttentionContext((cos[:, None], sin[:, None]))
    for block in other.blocks:
        hidden = block(hidden, context)
    weight = other.embedding.word.weight if shape.tie_embeddings else other.head.weight
    logits = F.linear(other.final_norm(hidden), weight[: shape.vocab_size]).float()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    expected = losses.sum() / (labels != IGNORE_INDEX).sum()
    expected.backward()

    assert torch.equal(total / count, expected)
    for (name, mine), (_, theirs) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), name


def test_averages_are_taken_in_float32():
    """1, 1/256 three times: each sum in bfloat16 drops the small terms, so an average in bfloat16 would be 1/4 exactly."""
    weight = torch.tensor([[1.0], [2**-8]], dtype=torch.bfloat16)
    ids = torch.tensor([[[0, 1, 1, 1]]])
    expected = torch.tensor((1 + 3 * 2**-8) / 4, dtype=torch.float32).bfloat16()
    assert F.embedding(ids, weight).sum(-2).bfloat16().item() != (1 + 3 * 2**-8)
    for embed in (plain.patch_embedding, make(LLAMA).embedding.forward.__globals__["ops"].patch_embedding):
        assert embed(weight, ids).item() == expected.item() != 0.25


def test_multi_token_loss_is_the_formula_in_float64():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 11, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 11, (7, 3), generator=generator)
    labels[2] = labels[2, 0]
    labels[4, 1] = IGNORE_INDEX
    weights = torch.tensor([1.5, 1.0, 0.5], dtype=torch.float64)
    total, count = plain.multi_token_loss(logits, labels, weights)
    expected = expected_count = 0.0
    for n in range(7):
        for k in range(3):
            if labels[n, k] != IGNORE_INDEX:
                p = torch.exp(logits[n, labels[n, k]]) / torch.exp(logits[n]).sum()
                expected -= float(weights[k] * torch.log(p))
                expected_count += float(weights[k])
    assert total.item() == pytest.approx(expected, rel=1e-12) and count.item() == pytest.approx(expected_count)


def test_nothing_leaks_across_documents():
    model = make(LLAMA)
    inputs, _ = batch(3, t=8)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]] * 2)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]] * 2)
    changed = inputs.clone()
    changed[:, 1] = (changed[:, 1] + 1) % 53
    first, second = (model.logits(ids, positions, documents) for ids in (inputs, changed))
    assert torch.equal(first[:, 3:], second[:, 3:])
    assert not torch.equal(first[:, 1:3], second[:, 1:3])
    alone = model.logits(inputs[:, 3:])
    torch.testing.assert_close(first[:, 3:], alone, rtol=1e-5, atol=1e-5)
    assert not torch.equal(model.logits(inputs)[:, 3:], model.logits(changed)[:, 3:]), "without documents everything is seen"


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


@pytest.mark.parametrize("k", [1, 4])
def test_traces_without_a_graph_break(k):
    model = make(LLAMA)
    inputs, labels = batch(k)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs, labels), model(inputs, labels))


def test_initial_weights_depend_on_seed_and_name_alone():
    wide = dataclasses.replace(LLAMA, ffn_hidden_size=80, num_layers=2)
    first, second = dict(make(LLAMA).named_parameters()), dict(make(wide).named_parameters())
    same = [name for name in first if first[name].shape == second[name].shape]
    assert len(same) > 10 and all(torch.equal(first[name], second[name]) for name in same)
    assert not torch.equal(initial_value("a.weight", (4, 4), LLAMA, 1), initial_value("a.weight", (4, 4), LLAMA, 2))
    assert not torch.equal(initial_value("a.weight", (4, 4), LLAMA, 1), initial_value("b.weight", (4, 4), LLAMA, 1))
    std = initial_value("blocks.0.feed_forward.down.weight", (400, 400), LLAMA, 1).std()
    assert std == pytest.approx(LLAMA.init_std / 2, rel=0.02), "1/sqrt(2 * 2 layers)"


def test_weight_decay_leaves_norms_and_biases_alone():
    model = make(GPT2)
    decayed, undecayed = parameter_groups(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in undecayed)
    assert all(names[id(p)].endswith("weight") and "norm" not in names[id(p)] for p in decayed)
    assert len(decayed) + len(undecayed) == len(names)


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


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("k", [1, 4])
def test_flops_equal_the_counter_of_torch(name, k):
    shape = FAMILIES[name]
    model = make(shape)
    inputs, labels = batch(k, t=8)
    # Attention as plain products, which torch counts without the causal mask.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(inputs, labels)
    assert counter.get_total_flops() == 2 * 8 * forward_flops_per_position(shape, 8, causal=False)


def test_the_cache_gives_what_reading_everything_again_gives():
    model = make(QWEN3)
    prompt = torch.tensor([[3, 8, 1]])
    ids = prompt
    for _ in range(8):
        ids = torch.cat((ids, model.logits(ids[..., None])[:, -1].argmax(-1)[:, None]), dim=1)
    assert torch.equal(generate(model, prompt, 8), ids)


def test_sampling_is_seeded_and_stops_at_the_end():
    model = make(LLAMA)
    prompt = torch.tensor([[3, 8, 1], [2, 2, 2]])
    first = generate(model, prompt, 20, temperature=1.0, top_p=0.9, seed=1)
    assert torch.equal(first, generate(model, prompt, 20, temperature=1.0, top_p=0.9, seed=1))
    assert not torch.equal(first, generate(model, prompt, 20, temperature=1.0, top_p=0.9, seed=2))
    eod = int(first[0, 5])
    stopped = generate(model, prompt, 20, temperature=1.0, top_p=0.9, seed=1, eod_id=eod)
    assert (stopped[0, 5:] == eod).all()
    with pytest.raises(ConfigError, match="empty prompt"):
        generate(model, torch.zeros(1, 0, dtype=torch.int64), 1)


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


def test_peaks_are_found_by_the_names_that_drivers_give():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H200") == 989.4e12
    assert peak_flops("cpu") is None
