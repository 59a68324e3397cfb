"""load_model and evaluate: the logits of transformers, losses by the definition at every K, the texts and numbers of the tools."""

from __future__ import annotations

import json
import math

import pytest
import torch

from megatron_patch.api import evaluate, load_model
from megatron_patch.cli import evaluate as evaluate_tool
from megatron_patch.cli import generate as generate_tool
from megatron_patch.convert.checkpoint_io import open_checkpoint
from megatron_patch.convert.to_hugging_face import to_hugging_face
from megatron_patch.errors import CheckpointError, ConfigError
from tests.convert.models import SHAPES, make_checkpoint, make_tokenizer

IDS = torch.randint(0, 53, (2, 24), generator=torch.Generator().manual_seed(5))
DOCUMENTS = ["the cat sat on the mat", "and the dog sat on the log, and the cat sat on the dog"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "ckpt", SHAPES["llama"])


@pytest.fixture(scope="module")
def with_text(tmp_path_factory):
    """A checkpoint with a byte-level tokenizer, and the arguments that name it."""
    import dataclasses

    folder = tmp_path_factory.mktemp("text")
    tokenizer = make_tokenizer(folder / "tokenizer", 280)
    shape = dataclasses.replace(SHAPES["llama"], vocab_size=320, padded_vocab_size=320)
    return make_checkpoint(folder / "ckpt", shape), {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": tokenizer}


def test_logits_are_those_of_transformers(checkpoint, tmp_path):
    transformers = pytest.importorskip("transformers")
    to_hugging_face(open_checkpoint(str(checkpoint)), tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "hf")).eval()
    with torch.no_grad():
        expected = theirs(IDS).logits
    model = load_model(checkpoint)
    torch.testing.assert_close(model.logits(IDS), expected, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(model.logits(IDS.tolist()), expected, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(model.logits(IDS[0].tolist()), expected[0], rtol=0.0, atol=1e-5)
    assert (
        model.generate(IDS[0, :5].tolist(), 6, temperature=0)
        == theirs.generate(
            IDS[:1, :5],
            attention_mask=torch.ones(1, 5, dtype=torch.int64),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, 5:].tolist()
    )


@pytest.mark.parametrize("patch_size", [1, 2, 3, 5])
def test_the_loss_is_the_mean_over_the_tokens_after_the_first_patch(patch_size, checkpoint):
    model = load_model(checkpoint)
    row = IDS[0].tolist()
    complete = len(row) // patch_size * patch_size
    logits = model.logits(row[:complete], patch_size)
    assert logits.shape == (complete // patch_size, 53)
    scored = [-float(logits[n // patch_size - 1].log_softmax(-1)[token]) for n, token in enumerate(row) if n >= patch_size]
    assert model.loss(row, patch_size) == pytest.approx(sum(scored) / len(scored), rel=1e-5)
    both = model.loss(IDS, patch_size)
    assert both == pytest.approx((model.loss(IDS[0], patch_size) + model.loss(IDS[1], patch_size)) / 2, rel=1e-5)


def test_texts_are_those_of_the_tool(with_text, capsys):
    folder, tokenizer = with_text
    model = load_model(folder, **tokenizer)
    for settings in ({"temperature": 0.0}, {"temperature": 0.9, "seed": 3}):
        flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        named = ["--tokenizer-type", tokenizer["tokenizer_type"], "--tokenizer-model", str(tokenizer["tokenizer_model"])]
        generate_tool.main(["--load", str(folder), "--prompt", "the cat", "--max-new-tokens", "8", "--json", *named, *flags])
        assert model.generate("the cat", 8, **settings) == json.loads(capsys.readouterr().out)["text"]
    assert model.generate("", 2, temperature=0) and "LanguageModel(" in repr(model) and model.step == 0


def test_an_evaluation_is_that_of_the_tool(with_text, tmp_path, capsys):
    folder, tokenizer = with_text
    model = load_model(folder, **tokenizer)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    named = ["--tokenizer-type", tokenizer["tokenizer_type"], "--tokenizer-model", str(tokenizer["tokenizer_model"])]
    for patch_size in (1, 2):
        evaluate_tool.main(["--load", str(folder), "--text", str(tmp_path / "text.jsonl"), "--patch-size", str(patch_size), *named])
        expected = json.loads(capsys.readouterr().out)
        assert evaluate(model, text=tmp_path / "text.jsonl", patch_size=patch_size) == expected
        del expected["text"]
        assert evaluate(model, texts=DOCUMENTS, patch_size=patch_size) == expected
    assert expected["documents"] == 2 and math.isfinite(expected["loss"])


def test_what_cannot_be_computed_is_named(checkpoint, tmp_path):
    model = load_model(checkpoint)
    for call, words in (
        (lambda: model.logits([1, 2, 3], 2), "3 tokens in patches of 2"),
        (lambda: model.logits([53]), "token id 53"),
        (lambda: model.logits([[1, 2], [3]]), "rows of one length"),
        (lambda: model.logits([]), "at least one"),
        (lambda: model.logits([1], 0), "patch_size=0"),
        (lambda: model.loss([1, 2], 2), "at least 3 tokens"),
        (lambda: model.generate([1], 3, temperature=-1), "temperature -1"),
        (lambda: model.generate("text"), "tokenizer"),
        (lambda: evaluate(model), "evaluate of nothing"),
        (lambda: evaluate(model, text="a", texts=["b"]), "evaluate of text and texts"),
        (lambda: evaluate(model, data_path="x", seq_lenght=3), "did you mean --seq-length"),
        (lambda: evaluate(model, data_path="x", bf16=True), "load_model"),
        (lambda: evaluate(model, tasks="arc", patch_size=2), "--tasks with --patch-size 2"),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        assert words in str(caught.value), caught.value
    with pytest.raises(CheckpointError, match="contains no checkpoint"):
        load_model(tmp_path)
