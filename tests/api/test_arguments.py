"""Arguments of a wrong type: every function names them, and none of them changes its meaning without a word."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from megatron_patch.api import evaluate, load_model, plan, preprocess, train_tokenizer
from megatron_patch.errors import ConfigError
from tests.api.runs import TINY
from tests.convert.models import SHAPES, make_checkpoint, make_tokenizer


def refused(words: str, call) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    assert words in str(caught.value) and caught.value.allowed and caught.value.do, caught.value


def test_wrong_arguments_of_a_model_are_named(tmp_path):
    folder = make_checkpoint(tmp_path / "ckpt", SHAPES["llama"])
    model = load_model(folder)
    assert model.loss(np.arange(8), np.int64(2)) == model.loss(list(range(8)), 2)
    assert model.generate([1, 2], np.int64(2), seed=np.int64(3)) == model.generate([1, 2], 2, seed=3)
    refused("of type torch.float32", lambda: model.loss([1.5, 2.5, 3.5]))
    refused("of type torch.bool", lambda: model.logits([True, False]))
    refused("give several texts one by one", lambda: model.loss(["a text", "another"]))
    refused("patch_size='2'", lambda: model.logits([1, 2], "2"))
    refused("2 rows as the prompt", lambda: model.generate([[1, 2], [3, 4]]))
    for name, value in (
        ("max_new_tokens", "5"),
        ("max_new_tokens", -1),
        ("temperature", "0"),
        ("top_k", 2.5),
        ("seed", "a"),
        ("seed", 2**70),
    ):
        refused(f"{name}={value!r}", lambda name=name, value=value: model.generate([1], **{name: value}))
    refused("checkpoint is given as a value of type NoneType", lambda: load_model(None))
    refused("device='gpu'", lambda: load_model(folder, device="gpu"))
    refused("device='cuda:99'", lambda: load_model(folder, device="cuda:99"))
    refused("dtype='bfloat16'", lambda: load_model(folder, dtype="bfloat16"))
    refused("dtype=torch.int8", lambda: load_model(folder, dtype=torch.int8))
    refused("texts is one text", lambda: evaluate(model, texts="a text"))
    refused("unknown setting help", lambda: evaluate(model, data_path="x", help=True))


def test_wrong_arguments_of_preprocess_are_named_and_a_single_key_is_a_key(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "the cat sat on the mat"}) + "\n")
    text, tokenizer = tmp_path / "a.jsonl", make_tokenizer(tmp_path / "tokenizer", 280)
    one = preprocess(text, tmp_path / "one", tokenizer_model=tokenizer, json_keys="text", append_eod=np.bool_(True))
    assert one.outputs == (f"{tmp_path}/one_text_document",)
    for name, value in (
        ("on_bad_line", "stop"),
        ("append_eod", "no"),
        ("workers", "2"),
        ("workers", 0),
        ("shuffle_documents", "3"),
        ("max_tokens", "40"),
        ("max_tokens", -4),
        ("json_keys", []),
        ("overwrite", None),
    ):
        refused(
            f"{name}={value!r}",
            lambda name=name, value=value: preprocess(text, tmp_path / "two", tokenizer_model=tokenizer, **{name: value}),
        )
    refused("the input is given as a value of type NoneType", lambda: preprocess(None, tmp_path / "two", tokenizer_model=tokenizer))
    refused("output_prefix is given as", lambda: preprocess(text, None, tokenizer_model=tokenizer))
    refused("output is given as", lambda: train_tokenizer(text, None, 300))


def test_wrong_arguments_of_plan_are_named():
    for ranks in (0, -1, "2", 2.0, True):
        refused(f"world_size={ranks!r}", lambda ranks=ranks: plan(TINY, world_size=ranks))
    assert plan(TINY, world_size=np.int64(2)).layout.ranks == 2
    refused("gpu=None", lambda: plan(TINY, gpu=None))
