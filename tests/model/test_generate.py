"""Generation: the same greedy tokens as transformers, batches of prompts of different lengths, sampling sets, seeds."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_patch.convert.checkpoint_io import open_checkpoint
from megatron_patch.convert.to_hugging_face import to_hugging_face
from megatron_patch.engine.inference import load_model
from megatron_patch.errors import ConfigError
from megatron_patch.model.attention import ModelCache
from megatron_patch.model.expert_shape import ExpertShape
from megatron_patch.model.generate import Sampling, _Chooser, generate, generate_without_cache
from megatron_patch.model.gpt import GPTModel
from megatron_patch.model.init import initialize
from tests.convert.models import SHAPES, make_checkpoint
from tests.model.shapes import BIASED, GPT2, LLAMA, LLAMA3, QWEN3

PROMPTS = [[3, 8, 1, 17, 4], [50], [2, 2, 2], [9, 11, 13, 15, 17, 19, 21]]
EXPERTS = dataclasses.replace(LLAMA, experts=ExpertShape(6, 2, 24, 16, "sigmoid", bias=True))
DRAWN = Sampling(temperature=1.0, top_p=0.9, seed=1)


def make(shape, dtype=torch.float32):
    model = GPTModel(shape)
    initialize(model, shape, seed=1)
    return model.to(dtype).eval()


@pytest.mark.parametrize("name", ["llama", "one-group", "linear", "llama3-tied", "qwen2", "qwen3", "gpt2", "gpt2-untied"])
def test_greedy_output_is_that_of_transformers_on_the_export(name, tmp_path):
    """Four prompts of different lengths in one batch, compared with transformers on each prompt without padding."""
    transformers = pytest.importorskip("transformers")
    checkpoint = make_checkpoint(tmp_path / "ckpt", SHAPES[name])
    to_hugging_face(open_checkpoint(str(checkpoint)), tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "hf")).eval()
    found = generate(load_model(str(checkpoint)).model, PROMPTS, 20)
    for prompt, mine in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert mine == expected[0, len(prompt) :].tolist()
    assert len({token for row in found for token in row}) > 5


@pytest.mark.parametrize(
    "shape", [LLAMA, LLAMA3, QWEN3, BIASED, GPT2, EXPERTS], ids=["llama", "llama3", "qwen3", "biased", "gpt2", "experts"]
)
def test_a_batch_of_unequal_prompts_gives_each_the_logits_it_has_alone(shape):
    model = make(shape, torch.float64)
    longest = max(map(len, PROMPTS))
    padding = torch.tensor([longest - len(prompt) for prompt in PROMPTS])
    cache = ModelCache(padding=padding)
    ids = torch.tensor([[7] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    pieces = [model.logits(piece[..., None], cache=cache) for piece in (ids[:, :4], ids[:, 4:6], ids[:, 6:])]
    together = torch.cat(pieces, dim=1)
    assert torch.isfinite(together).all()
    for row, prompt in enumerate(PROMPTS):
        alone = model.logits(torch.tensor([prompt])[..., None])[0]
        torch.testing.assert_close(together[row, longest - len(prompt) :], alone, rtol=1e-12, atol=1e-12)


def test_what_is_drawn_for_a_prompt_does_not_depend_on_the_others():
    model = make(LLAMA, torch.float64)
    together = generate(model, PROMPTS, 12, DRAWN)
    for row, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], 12, dataclasses.replace(DRAWN, seed=1 + row)) == [together[row]]
    assert generate(model, [[3, 8, 1]] * 2, 12, DRAWN)[0] != generate(model, [[3, 8, 1]] * 2, 12, DRAWN)[1], "each row has its own seed"


def test_sampling_is_seeded():
    model = make(LLAMA)
    first = generate(model, PROMPTS, 20, DRAWN)
    assert first == generate(model, PROMPTS, 20, DRAWN)
    assert first != generate(model, PROMPTS, 20, dataclasses.replace(DRAWN, seed=2))
    coldest = generate(model, PROMPTS, 20, Sampling(temperature=1e-40, seed=1))
    assert coldest == generate(model, PROMPTS, 20), "the smallest temperatures take the likeliest token"
    assert generate(model, PROMPTS, 20, Sampling(temperature=5.0, top_k=1, seed=1)) == coldest


def test_a_row_ends_with_its_end_of_document_and_the_others_go_on():
    model = make(LLAMA)
    whole = generate(model, PROMPTS, 20, DRAWN)
    eod = whole[0][3]
    found = generate(model, PROMPTS, 20, DRAWN, eod_id=eod)
    assert found == [row[: row.index(eod) + 1] if eod in row else row for row in whole]
    assert len(found[0]) <= 4 and max(map(len, found)) == 20
    steps = []
    assert generate(model, PROMPTS[:1], 20, DRAWN, eod_id=eod, on_token=steps.append) == [[ids[0] for ids in steps]]


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(1.0, seed=0), {0, 1, 2, 3}),
        (Sampling(1.0, top_k=2, seed=0), {1, 3}),
        (Sampling(1.0, top_p=0.5, seed=0), {3}),
        (Sampling(1.0, top_p=0.51, seed=0), {1, 3}),
        (Sampling(1.0, top_p=0.81, seed=0), {0, 1, 3}),
        # top_k first, as transformers does: of 0.5 and 0.3 the larger has 0.625 of what is left.
        (Sampling(1.0, top_p=0.6, top_k=2, seed=0), {3}),
        (Sampling(0.5, top_p=0.65, seed=0), {3}),
    ],
)
def test_draws_come_from_the_right_set_in_the_right_shares(sampling, allowed):
    p = torch.tensor([0.15, 0.3, 0.05, 0.5])
    rows = 4000
    drawn = _Chooser(sampling, rows, torch.device("cpu"))(p.log().expand(rows, -1))
    assert set(drawn.tolist()) == allowed
    expected = torch.zeros(4)
    expected[list(allowed)] = p[list(allowed)] ** (1 / sampling.temperature)
    shares = torch.bincount(drawn, minlength=4) / rows
    torch.testing.assert_close(shares, expected / expected.sum(), rtol=0.0, atol=0.04)


@pytest.mark.parametrize("shape", [LLAMA, GPT2, EXPERTS], ids=["llama", "gpt2", "experts"])
@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_rereading_gives_what_the_cache_gives(shape, sampling):
    model = make(shape, torch.float64)
    sizes = set()

    def logits(ids):
        sizes.add(tuple(ids.shape))
        return model(ids[..., None], None)

    expected = generate(model, PROMPTS, 10, sampling, eod_id=4)
    assert generate_without_cache(logits, PROMPTS, 10, sampling, 4, torch.device("cpu")) == expected
    assert sizes == {(4, 17)}


@pytest.mark.parametrize(
    ("prompts", "sampling", "words"),
    [
        ([[1], []], Sampling(), "a prompt is empty"),
        ([], Sampling(), "a prompt is empty"),
        ([[1]], Sampling(-1.0), "temperature -1.0"),
        ([[1]], Sampling(float("nan")), "temperature nan"),
        ([[1]], Sampling(1.0, 0.0), "top_p 0.0"),
        ([[1]], Sampling(1.0, 1.0, -1), "top_k -1"),
        ([[1] * 30, [1]], Sampling(), "have 33 tokens, but the model has 32 learned positions"),
    ],
)
def test_impossible_requests_are_refused(prompts, sampling, words):
    with pytest.raises(ConfigError, match=words):
        generate(make(GPT2), prompts, 3, sampling)
