"""Experts on a GPU: grouped products against float64, one graph for a block, and the scale of the balance in float16."""

from __future__ import annotations

import pytest
import torch

from megatron_patch.model.experts import MixtureOfExperts
from megatron_patch.model.gpt import GPTModel
from megatron_patch.model.init import initialize
from tests.distributed.runs import make_corpus
from tests.gpu.test_training import train
from tests.model.test_experts import KINDS, shape_with

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("width", [64, 52])  # the grouped product takes multiples of 8 only
def test_products_give_what_float64_gives(dtype, tolerance, width):
    torch.manual_seed(0)
    shape = shape_with(KINDS["softmax"], hidden_size=width)
    layer = MixtureOfExperts(shape, shape.experts).cuda().to(dtype)
    exact = MixtureOfExperts(shape, shape.experts).cuda().double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    exact.load_state_dict(layer.state_dict())
    hidden = torch.randn(4, 64, width, device="cuda", dtype=dtype, requires_grad=True)
    wide = hidden.detach().double().requires_grad_()
    out, expected = layer(hidden), exact(wide)
    same = (layer.router(hidden.flatten(0, 1), 0)[0] == exact.router(wide.flatten(0, 1), 0)[0]).all(1).view(4, 64)
    assert same.float().mean() > 0.95
    assert (out.double() - expected)[same].norm() < tolerance * expected.norm()
    out.float().sum().backward()
    expected.sum().backward()
    difference = (hidden.grad.double() - wide.grad)[same].norm()
    assert difference < tolerance * wide.grad.norm()


def test_a_block_is_one_graph():
    shape = shape_with(KINDS["softmax"], hidden_size=64)
    model = GPTModel(shape)
    initialize(model, shape, seed=1)
    model = model.cuda().bfloat16()
    ids = torch.randint(0, shape.vocab_size, (2, 8, 4), device="cuda")
    plain, _ = model(ids, ids)
    for block in model.blocks.values():
        block.compile(dynamic=False, fullgraph=True)
    compiled, _ = model(ids, ids)
    compiled.backward()
    assert float(compiled.detach()) == pytest.approx(float(plain.detach()), rel=1e-2)


def test_float16_scales_the_balance_as_the_loss(tmp_path):
    """With a z-loss that dominates the gradient; the scale of the loss must not change its share."""
    corpus, words = make_corpus(tmp_path / "c"), "--num-experts 4 --moe-z-loss-coeff 30"
    single = train(tmp_path / "single", corpus, words, "--zero-stage 1").values("grad_norm")
    half = train(tmp_path / "half", corpus, words, "--fp16 --zero-stage 1 --initial-loss-scale 1024").values("grad_norm")
    assert half[0] == pytest.approx(single[0], rel=2e-2)
