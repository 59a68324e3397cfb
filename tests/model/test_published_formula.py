"""The published loss, computed with Hugging Face's models on the same weights: the loss and every gradient must agree.

The oracle reads only the formula: average K embeddings (`inputs_embeds`), run the stock model, and add up -log p of each of the K tokens of
the next patch, with loops over k. Hugging Face computes norms and rotary tables in float32 even in a float64 model; for the comparison in
float64 the oracle's are replaced by the same formulas in float64, written here.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_patch.model.generate import generate
from megatron_patch.model.gpt import GPTModel
from megatron_patch.model.init import initialize
from megatron_patch.model.shape import ModelShape
from megatron_patch.ops import IGNORE_INDEX
from tests.model.shapes import BIASED, GPT2, LLAMA, QWEN3, TIED

transformers = pytest.importorskip("transformers")
B, T = 2, 5


class Float64Norm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in the input's precision."""

    def __init__(self, stock):
        super().__init__()
        self.weight, self.eps = stock.weight, stock.variance_epsilon

    def forward(self, x):
        return self.weight * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps))


class Float64Rotary(nn.Module):
    """cos and sin of position * base^(-2i/d), in the input's precision."""

    def __init__(self, head_size, base):
        super().__init__()
        self.head_size, self.base = head_size, base

    def forward(self, x, position_ids):
        frequency = torch.tensor([self.base ** (-2 * i / self.head_size) for i in range(self.head_size // 2)], dtype=x.dtype)
        angle = position_ids[..., None].to(x.dtype) * frequency
        return torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)


def widen(module):
    for name, child in module.named_children():
        if "RMSNorm" in type(child).__name__:
            setattr(module, name, Float64Norm(child))
        else:
            widen(child)


def hugging_face(shape: ModelShape, dtype: torch.dtype) -> nn.Module:
    if shape.position_embedding == "learned":
        config = transformers.GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=shape.max_positions,
            n_embd=shape.hidden_size,
            n_layer=shape.num_layers,
            n_head=shape.num_attention_heads,
            n_inner=shape.ffn_hidden_size,
            layer_norm_epsilon=shape.norm_epsilon,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
        return transformers.GPT2LMHeadModel(config).to(dtype)
    kind = transformers.Qwen3Config if shape.qk_norm else transformers.LlamaConfig
    config = kind(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.head_size,
        rms_norm_eps=shape.norm_epsilon,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=shape.tie_embeddings,
        attention_bias=shape.attention_bias,
        mlp_bias=shape.mlp_bias,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rotary_base},
    )
    model = (transformers.Qwen3ForCausalLM if shape.qk_norm else transformers.LlamaForCausalLM)(config).to(dtype)
    if dtype == torch.float64:
        widen(model)
        model.model.rotary_emb = Float64Rotary(shape.head_size, shape.rotary_base)
    return model


def pairs(ours: GPTModel, theirs: nn.Module, shape: ModelShape):
    """(our parameter, slice of theirs as a function of a tensor like theirs, their parameter)."""
    mine, stock = dict(ours.named_parameters()), dict(theirs.named_parameters())
    rows = shape.vocab_size
    if shape.position_embedding == "learned":
        yield mine["embedding.word.weight"], lambda t: t, stock["transformer.wte.weight"], rows
        yield mine["embedding.position.weight"], lambda t: t, stock["transformer.wpe.weight"], None
        for layer in range(shape.num_layers):
            a, b = f"blocks.{layer}.", f"transformer.h.{layer}."
            for i, part in enumerate(("query", "key", "value")):
                columns = slice(i * shape.hidden_size, (i + 1) * shape.hidden_size)
                yield mine[f"{a}attention.{part}.weight"], lambda t, c=columns: t[:, c].T, stock[f"{b}attn.c_attn.weight"], None
                yield mine[f"{a}attention.{part}.bias"], lambda t, c=columns: t[c], stock[f"{b}attn.c_attn.bias"], None
            for x, y in (("attention.output", "attn.c_proj"), ("feed_forward.up", "mlp.c_fc"), ("feed_forward.down", "mlp.c_proj")):
                yield mine[f"{a}{x}.weight"], lambda t: t.T, stock[f"{b}{y}.weight"], None
                yield mine[f"{a}{x}.bias"], lambda t: t, stock[f"{b}{y}.bias"], None
            for x, y in (("attention_norm", "ln_1"), ("feed_forward_norm", "ln_2")):
                for kind in ("weight", "bias"):
                    yield mine[f"{a}{x}.{kind}"], lambda t: t, stock[f"{b}{y}.{kind}"], None
        for kind in ("weight", "bias"):
            yield mine[f"final_norm.{kind}"], lambda t: t, stock[f"transformer.ln_f.{kind}"], None
        return
    yield mine["embedding.word.weight"], lambda t: t, stock["model.embed_tokens.weight"], rows
    if not shape.tie_embeddings:
        yield mine["head.weight"], lambda t: t, stock["lm_head.weight"], rows
    yield mine["final_norm.weight"], lambda t: t, stock["model.norm.weight"], None
    names = {
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "feed_forward.gate": "mlp.gate_proj",
        "feed_forward.up": "mlp.up_proj",
        "feed_forward.down": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
    }
    if shape.qk_norm:
        names |= {"attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm"}
    for layer in range(shape.num_layers):
        for x, y in names.items():
            for kind in ("weight", "bias"):
                if f"blocks.{layer}.{x}.{kind}" in mine:
                    yield mine[f"blocks.{layer}.{x}.{kind}"], lambda t: t, stock[f"model.layers.{layer}.{y}.{kind}"], None


def build(shape: ModelShape, dtype: torch.dtype, operators="fused"):
    ours = GPTModel(shape, operators=operators)
    initialize(ours, shape, seed=3)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    ours = ours.to(dtype)
    theirs = hugging_face(shape, dtype)
    with torch.no_grad():
        for mine, view, stock, rows in pairs(ours, theirs, shape):
            view(stock).copy_(mine[:rows] if rows else mine)
    return ours, theirs


def published_loss(model, tokens, k, ignored, weights):
    """-(1/W) sum over t, j of w_j log p(x[(t+1)K + j] | patches 0..t) over labels that are not ignored, W the sum of their w_j."""
    table = model.get_input_embeddings().weight
    averages = []
    for t in range(T):
        total = table[tokens[:, t * k]]
        for j in range(1, k):
            total = total + table[tokens[:, t * k + j]]
        averages.append(total / k)
    logits = model(inputs_embeds=torch.stack(averages, dim=1)).logits
    log_p = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    total, count = torch.zeros((), dtype=logits.dtype), 0.0
    for b in range(B):
        for t in range(T):
            for j in range(k):
                if not ignored[b, t, j]:
                    total = total - weights[j] * log_p[b, t, tokens[b, (t + 1) * k + j]]
                    count += weights[j]
    return total / count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize("operators", ["fused", "plain"])
@pytest.mark.parametrize("shape", [LLAMA, TIED, QWEN3, BIASED, GPT2], ids=["llama", "tied", "qwen3", "biased", "gpt2"])
def test_loss_and_every_gradient_equal_the_published_formula(shape, operators, k, dtype):
    check(shape, k, dtype, [1.0] * k, operators)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("operators", ["fused", "plain"])
def test_position_weights_are_the_formula_s(operators, dtype):
    check(LLAMA, 4, dtype, [1 / (j + 1) for j in range(4)], operators)


def check(shape, k, dtype, weights, operators="fused"):
    ours, theirs = build(shape, dtype, operators)
    assert set(map(id, ours.parameters())) == {id(mine) for mine, *_ in pairs(ours, theirs, shape)}, "every parameter is compared"
    assert {id(stock) for _, _, stock, _ in pairs(ours, theirs, shape)} == set(map(id, theirs.parameters()))
    generator = torch.Generator().manual_seed(k)
    tokens = torch.randint(0, shape.vocab_size, (B, (T + 1) * k), generator=generator)
    tokens[0, k : 2 * k] = 7  # a patch of one token repeated: as an input and as K equal labels
    ignored = torch.rand(B, T, k, generator=generator) < 0.2
    inputs = tokens[:, : T * k].view(B, T, k)
    labels = tokens[:, k:].reshape(B, T, k).masked_fill(ignored, IGNORE_INDEX)

    total, count = ours(inputs, labels, None if weights == [1.0] * k else torch.tensor(weights, dtype=dtype))
    loss = total / count
    loss.backward()
    expected = published_loss(theirs, tokens, k, ignored, weights)
    expected.backward()

    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    assert count.item() == pytest.approx(sum(weights[j] * int((~ignored[..., j]).sum()) for j in range(k)), rel=1e-6)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0.0)
    for mine, view, stock, rows in pairs(ours, theirs, shape):
        gradient = mine.grad[:rows] if rows else mine.grad
        reference = view(stock.grad)
        scale = float(reference.abs().max())
        if scale < 1e-6:  # a bias of keys moves no softmax: its gradient is zero but for rounding
            assert float(gradient.abs().max()) < 1e-6
            continue
        torch.testing.assert_close(gradient, reference, rtol=tolerance, atol=tolerance * scale)
        if rows:
            assert not mine.grad[rows:].any(), "padding rows of the vocabulary must not be touched"


@pytest.mark.parametrize("shape", [LLAMA, QWEN3, BIASED, GPT2], ids=["llama", "qwen3", "biased", "gpt2"])
def test_greedy_generation_equals_hugging_face(shape):
    ours, theirs = build(shape, torch.float32)
    prompt = torch.tensor([[5, 9, 11, 2], [1, 30, 2, 2]])
    expected = theirs.eval().generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert generate(ours, prompt.tolist(), 12) == expected[:, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("shape", [LLAMA, TIED, QWEN3, BIASED], ids=["llama", "tied", "qwen3", "biased"])
def test_bfloat16_rounds_where_hugging_face_rounds(shape):
    """A trained model's logits are the same bits there: norms and angles in float32, each rounded once."""
    ours, theirs = build(shape, torch.bfloat16)
    # Converting a model rounds its frequencies too; loading one, as users do, leaves them in float32.
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    tokens = torch.randint(0, shape.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours.logits(tokens[..., None]), theirs(tokens).logits)
