"""A mixture of experts against its formula, position by position; what counts for the balance; parameters and FLOPs of published models."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from megatron_patch.errors import ConfigError
from megatron_patch.model.expert_balance import RouterBalance
from megatron_patch.model.expert_shape import ExpertShape
from megatron_patch.model.experts import MixtureOfExperts
from megatron_patch.model.flops import forward_flops_per_position, parameter_count
from megatron_patch.model.gpt import GPTModel
from megatron_patch.model.init import initialize
from megatron_patch.model.parameters import parameters_of_layers
from megatron_patch.model.shape import ModelShape, check_shape
from tests.model.shapes import FAMILIES

HIDDEN = FAMILIES["llama"].hidden_size
KINDS = {
    "softmax": ExpertShape(6, 2, 24),
    "pre-softmax": ExpertShape(6, 3, 24, renormalized=False),
    "one expert": ExpertShape(5, 1, 24, renormalized=False, scaling=2.0),
    "sigmoid": ExpertShape(6, 3, 24, shared_ffn_hidden_size=40, score="sigmoid", scaling=1.5, bias=True),
    "all experts": ExpertShape(4, 4, 24, score="sigmoid", renormalized=False),
}


def shape_with(experts: ExpertShape, **changes) -> ModelShape:
    return dataclasses.replace(FAMILIES["llama"], experts=experts, **changes)


def make_layer(kind: str, dtype: torch.dtype = torch.float64, **changes) -> MixtureOfExperts:
    torch.manual_seed(0)
    shape = shape_with(KINDS[kind], **changes)
    layer = MixtureOfExperts(shape, shape.experts).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if (bias := layer.router.balance.bias) is not None:
        bias.copy_(torch.linspace(-0.3, 0.3, len(bias)))
    return layer.to(dtype)


def formula(layer: MixtureOfExperts, experts: ExpertShape, hidden: torch.Tensor, activation=F.silu) -> torch.Tensor:
    """Returns what the layer computes: every position by itself, every one of its experts by itself."""
    rows = []
    for position in hidden.flatten(0, 1):
        logits = layer.router.weight @ position
        scores = logits.softmax(0) if experts.score == "softmax" else 1 / (1 + (-logits).exp())
        bias = layer.router.balance.bias
        order = sorted(range(experts.count), key=lambda e: -float(scores[e].detach() + (0 if bias is None else bias[e])))
        chosen = order[: experts.top_k]
        weights = {e: scores[e] for e in chosen}
        if experts.renormalized:
            total = sum(weights.values())
            weights = {e: weight / total for e, weight in weights.items()}
        result = torch.zeros_like(position)
        for e in chosen:
            gate, up, down = (getattr(layer.experts, part).weight[e] for part in ("gate", "up", "down"))
            result = result + experts.scaling * weights[e] * (down @ (activation(gate @ position) * (up @ position)))
        if layer.shared is not None:
            shared = layer.shared
            result = result + shared.down.weight @ (activation(shared.gate.weight @ position) * (shared.up.weight @ position))
        rows.append(result)
    return torch.stack(rows).view_as(hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_is_its_formula(kind):
    layer, hidden = make_layer(kind), torch.randn(2, 5, HIDDEN, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(hidden)
    computed = torch.autograd.grad(layer(hidden), [hidden, *layer.parameters()], grad)
    expected_output = formula(layer, KINDS[kind], hidden)
    expected = torch.autograd.grad(expected_output, [hidden, *layer.parameters()], grad)
    torch.testing.assert_close(layer(hidden), expected_output, rtol=0, atol=1e-12)
    for ours, theirs in zip(computed, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_experts_with_geglu():
    layer, hidden = make_layer("softmax", activation="geglu"), torch.randn(1, 4, HIDDEN, dtype=torch.float64)
    expected = formula(layer, KINDS["softmax"], hidden, lambda gate: F.gelu(gate, approximate="tanh"))
    torch.testing.assert_close(layer(hidden), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_grouped_products_give_what_float64_gives(kind, dtype, tolerance):
    exact, hidden = make_layer(kind), torch.randn(4, 16, HIDDEN, dtype=torch.float64)
    layer = make_layer(kind, dtype)
    exact.load_state_dict(layer.state_dict())  # the same rounded weights, so that nearly all choices are the same
    rounded = hidden.to(dtype)
    chosen, _ = layer.router(rounded.flatten(0, 1), 0)
    same = (chosen == exact.router(rounded.double().flatten(0, 1), 0)[0]).all(1).view(4, 16)
    assert same.float().mean() > 0.95
    difference = (layer(rounded).double() - exact(rounded.double()))[same]
    assert difference.norm() < tolerance * exact(rounded.double()).norm()


def test_experts_without_a_position_get_no_gradient():
    layer = make_layer("softmax", torch.float32)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[1] += 1.0
        layer.router.weight[4] += 0.5
    hidden = torch.rand(2, 8, HIDDEN) + 0.1
    layer(hidden).sum().backward()
    used = layer.experts.down.weight.grad.flatten(1).norm(dim=1) > 0
    assert used.tolist() == [False, True, False, False, True, False]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_balance_adds_the_gradient_of_its_formula(score):
    experts = ExpertShape(5, 2, 8, score=score)
    shape = shape_with(experts)
    layer = MixtureOfExperts(shape, experts).double()
    balance = layer.router.balance
    torch.nn.init.normal_(layer.router.weight)
    balance.load.copy_(torch.tensor([0.5, 0.2, 0.2, 0.05, 0.05]))
    alpha, beta, positions = 0.3, 0.02, 7
    balance.adds_gradient = True
    balance.factors.copy_(torch.tensor([alpha * experts.count, beta]) / 11)  # a global batch of 11 positions, of which 7 are here
    rows = torch.randn(9, HIDDEN, dtype=torch.float64)  # two more are padding
    _, weights = layer.router(rows, positions)
    (ours,) = torch.autograd.grad((weights * 0).sum(), [layer.router.weight])
    logits = rows[:positions] @ layer.router.weight.T
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    p = scores / scores.sum(-1, keepdim=True)
    auxiliary = alpha * experts.count * (balance.load.double() * p.sum(0)).sum() / 11
    z = beta * logits.exp().sum(-1).log().square().sum() / 11
    (expected,) = torch.autograd.grad(auxiliary + z, [layer.router.weight])
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)
    entropy = -(p * p.log()).sum()
    assert balance.entropy.tolist() == pytest.approx([float(entropy), positions])
    counted = torch.bincount(layer.router(rows, 0)[0][:positions].flatten(), minlength=5)
    assert balance.counts.tolist() == counted.tolist()


def test_nothing_is_counted_in_evaluation():
    layer = make_layer("softmax", torch.float32).eval()
    layer(torch.randn(1, 4, HIDDEN))
    assert layer.router.balance.counts.sum() == 0 and layer.router.balance.entropy.sum() == 0


def test_the_state_of_the_balance_is_never_rounded():
    shape = shape_with(KINDS["sigmoid"])
    model = GPTModel(shape)
    balances = [module for module in model.modules() if isinstance(module, RouterBalance)]
    for balance in balances:
        balance.load.fill_(1 / 3)
        balance.counts.fill_((1 << 40) + 1)
    model.bfloat16().to(torch.float16)
    assert all(float(balance.load[0]) == pytest.approx(1 / 3, rel=1e-7) for balance in balances)
    assert all(int(balance.counts[0]) == (1 << 40) + 1 for balance in balances)
    with torch.device("meta"):
        model = GPTModel(shape)
    model.bfloat16().to_empty(device="cpu")
    for balance in (module for module in model.modules() if isinstance(module, RouterBalance)):
        assert balance.load.dtype == torch.float32 and balance.load.tolist() == pytest.approx([1 / 6] * 6)
        assert balance.bias.tolist() == [0.0] * 6 and balance.counts.tolist() == [0] * 6


def test_compiled_blocks_are_one_graph_and_count_as_others_do():
    experts = dataclasses.replace(KINDS["sigmoid"], dense_layers=(0,))
    shape = shape_with(experts)
    model = GPTModel(shape)
    initialize(model, shape, seed=1)
    model = model.bfloat16()
    ids = torch.randint(0, shape.vocab_size, (2, 8, 4))
    results = []
    for compiled in (False, True):
        if compiled:
            for block in model.blocks.values():
                block.compile(dynamic=False, backend="aot_eager", fullgraph=True)
        model.zero_grad()
        balance = model.blocks["1"].feed_forward.router.balance
        balance.adds_gradient = True
        balance.factors.fill_(0.1)
        balance.counts.zero_()
        loss, _ = model(ids, ids)
        loss.backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        results.append((float(loss.detach()), gradients, balance.counts.clone()))
    (loss, gradients, counts), (compiled_loss, compiled_gradients, compiled_counts) = results
    assert loss == compiled_loss and torch.equal(gradients, compiled_gradients) and torch.equal(counts, compiled_counts)


def test_full_recomputation_changes_neither_results_nor_shares():
    shape = shape_with(KINDS["softmax"])
    ids = torch.randint(0, shape.vocab_size, (2, 8, 4))
    found = {}
    for recompute in ("none", "full"):
        model = GPTModel(shape, recompute)
        initialize(model, shape, seed=1)
        loss, _ = model(ids, ids)
        loss.backward()
        counts = model.blocks["0"].feed_forward.router.balance.counts
        found[recompute] = float(loss.detach()), counts / counts.sum(), model.blocks["0"].feed_forward.router.weight.grad
    assert found["none"][0] == found["full"][0]
    assert torch.equal(found["none"][1], found["full"][1]) and torch.equal(found["none"][2], found["full"][2])


def test_initial_weights_of_experts_are_scaled_as_those_of_other_layers():
    shape = dataclasses.replace(shape_with(ExpertShape(8, 2, 256, shared_ffn_hidden_size=64)), hidden_size=128, num_layers=8)
    model = GPTModel(shape, layers=range(1, 2))
    initialize(model, shape, seed=1)
    deviations = {name.split("feed_forward.")[1]: float(p.std()) for name, p in model.named_parameters() if "feed_forward." in name}
    residual = shape.init_std / 4  # 1/sqrt(2·8)
    for name, deviation in deviations.items():
        assert deviation == pytest.approx(residual if name.endswith("down.weight") else shape.init_std, rel=0.05), name


QWEN3_30B = ModelShape(
    *(48, 2048, 32, 4, 128, 6144, 151_936, 151_936, 40_960),
    norm_epsilon=1e-6,
    rotary_base=1e6,
    qk_norm=True,
    experts=ExpertShape(128, 8, 768),
)
MIXTRAL_8X7B = ModelShape(*(32, 4096, 32, 8, 128, 14_336, 32_000, 32_000, 32_768), experts=ExpertShape(8, 2, 14_336))
OLMOE_1B_7B = ModelShape(
    *(16, 2048, 16, 16, 128, 1024, 50_304, 50_304, 4096),
    qk_norm=True,
    qk_norm_scope="all",
    experts=ExpertShape(64, 8, 1024, renormalized=False),
)


@pytest.mark.parametrize(
    ("shape", "total", "active"),
    [
        (QWEN3_30B, 30_532_122_624, 3_353_032_704),
        (MIXTRAL_8X7B, 46_702_792_704, 12_879_925_248),
        (OLMOE_1B_7B, 6_919_161_856, 1_282_017_280),
    ],
    ids=["Qwen3-30B-A3B", "Mixtral 8x7B", "OLMoE-1B-7B"],
)
def test_parameters_of_published_models(shape, total, active):
    """The totals are those of the models' own files (Hugging Face's safetensors index)."""
    count = parameter_count(shape)
    assert (count.total, count.active) == (total, active)
    matrices = active - shape.vocab_size * shape.hidden_size  # without the embedding
    norms = sum(numel for size in parameters_of_layers(shape).values() if len(size) == 1 for numel in size)
    products = 2 * (matrices - norms)
    attention = 4 * shape.num_layers * shape.num_attention_heads * shape.head_size * (4096 + 1) / 2
    assert forward_flops_per_position(shape, 4096) == products + attention


@pytest.mark.parametrize(
    ("experts", "changes", "words"),
    [
        (ExpertShape(1, 1, 8), {}, "--num-experts 1"),
        (ExpertShape(4, 5, 8), {}, "--moe-router-topk 5 of --num-experts 4"),
        (ExpertShape(4, 0, 8), {}, "--moe-router-topk 0"),
        (ExpertShape(4, 1, 8, scaling=0.0), {}, "--moe-router-topk-scaling-factor 0.0"),
        (ExpertShape(4, 1, 8, dense_layers=(0, 1)), {}, "blocks without experts"),
        (ExpertShape(4, 1, 8, dense_layers=(7,)), {}, "blocks without experts"),
        (ExpertShape(4, 5, 8, scaling=0.0, dense_layers=(0, 1)), {}, "(?s)3 problems.*topk 5.*factor 0.0.*blocks without experts"),
        (ExpertShape(4, 1, 8), {"activation": "gelu"}, "--num-experts with GELU"),
        (ExpertShape(4, 1, 8), {"mlp_bias": True}, "--num-experts with GELU or with biases"),
    ],
)
def test_shapes_that_cannot_be_built_are_refused(experts, changes, words):
    with pytest.raises(ConfigError, match=words):
        check_shape(shape_with(experts, **changes))
