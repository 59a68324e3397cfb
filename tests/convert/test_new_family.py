"""A model family and its Hugging Face architecture, registered by a user's script: imported, trained, exported and verified."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from megatron_patch.cli.convert_checkpoint import main
from megatron_patch.convert.architectures import ARCHITECTURES
from megatron_patch.convert.checkpoint_io import open_checkpoint
from megatron_patch.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_patch.engine.inference import load_model
from megatron_patch.errors import CheckpointError
from megatron_patch.model.families import FAMILIES
from tests.config.test_resolve import ROOT, RUN, resolve
from tests.convert.models import make_checkpoint
from tests.convert.seed_oss import register_seed_oss
from tests.model.shapes import LLAMA
from tests.programs import run_program

transformers = pytest.importorskip("transformers")
IDS = torch.randint(0, 53, (2, 32), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def seed_oss(monkeypatch):
    """Registers Seed-OSS for one test."""
    with monkeypatch.context() as patch:
        patch.setitem(FAMILIES, "seed_oss", None)
        patch.setitem(ARCHITECTURES, "SeedOssForCausalLM", None)
        register_seed_oss()
        yield


def published(folder, **values):
    """Writes a Seed-OSS model with transformers, and returns it."""
    torch.manual_seed(0)
    config = transformers.SeedOssConfig(
        vocab_size=53, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
        max_position_embeddings=32, rms_norm_eps=1e-6, pad_token_id=None, **{"initializer_range": 0.2, **values},
    )  # fmt: skip
    model = transformers.SeedOssForCausalLM(config).eval()
    model.save_pretrained(str(folder))
    return model


def test_a_model_of_transformers_comes_in_trains_with_the_printed_flags_and_goes_out_as_itself(seed_oss, tmp_path, capsys):
    model = published(tmp_path / "published")
    main(["from-hf", "--input", str(tmp_path / "published"), "--output", str(tmp_path / "ckpt")])
    flags = json.loads(capsys.readouterr().out.splitlines()[-1])["flags"]
    assert flags[:2] == ["--model-family", "seed_oss"]
    shape = resolve(*flags, "--seq-length", "32", "--global-batch-size", "4", "--train-tokens", "1024", "--dry-run").shape
    loaded = load_model(str(tmp_path / "ckpt")).model
    assert (shape.num_query_groups, shape.norm_epsilon) == (2, 1e-6) and shape.padded_vocab_size == loaded.shape.padded_vocab_size
    with torch.no_grad():
        expected = model(IDS).logits
        torch.testing.assert_close(loaded.logits(IDS[..., None]), expected, rtol=0.0, atol=1e-5)
    assert float(expected.std()) > 0.05

    main(["to-hf", "--load", str(tmp_path / "ckpt"), "--output", str(tmp_path / "again")])
    again = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "again")).eval()
    assert type(again).__name__ == "SeedOssForCausalLM" and again.config.attention_dropout == 0.1
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, expected)


def test_the_family_decides_between_architectures_that_compute_the_same(seed_oss, tmp_path):
    kinds = {}
    for family in ("llama", "seed_oss"):
        make_checkpoint(tmp_path / family, dataclasses.replace(LLAMA, qkv_bias=True), options={"seq_length": 16, "model_family": family})
        main(["to-hf", "--load", str(tmp_path / family), "--output", str(tmp_path / f"{family}-hf")])
        kinds[family] = json.loads((tmp_path / f"{family}-hf" / "config.json").read_text())["architectures"]
    assert kinds == {"llama": ["Qwen2ForCausalLM"], "seed_oss": ["SeedOssForCausalLM"]}
    assert open_checkpoint(str(tmp_path / "seed_oss")).family == "seed_oss"


def test_what_the_family_does_not_have_is_refused(seed_oss, tmp_path):
    for key, value in (("attention_out_bias", True), ("mlp_bias", True), ("attention_bias", False)):
        published(tmp_path / key, **{key: value})
        with pytest.raises(CheckpointError, match=f"config.json: {key} is {value}"):
            main(["from-hf", "--input", str(tmp_path / key), "--output", str(tmp_path / "ckpt")])


def test_the_family_trains_by_its_name(seed_oss):
    shape = resolve(*RUN, "--model-family", "seed_oss", "--num-query-groups", "2").shape
    assert (shape.qkv_bias, shape.attention_bias, shape.mlp_bias) == (True, False, False)
    assert (shape.normalization, shape.activation, shape.position_embedding, shape.tie_embeddings) == ("RMSNorm", "swiglu", "rope", False)


def test_the_script_of_the_documentation_verifies_its_export(tmp_path):
    """Runs the script as a user does: it registers the family and calls the program's main."""
    published(tmp_path / "published")

    def script(*words):
        result = run_program("-m", "tests.convert.seed_oss", *words, cwd=ROOT)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    script("from-hf", "--input", tmp_path / "published", "--output", tmp_path / "ckpt")
    with IndexedDatasetWriter(str(tmp_path / "ids"), np.dtype(np.uint16)) as writer:
        writer.append(IDS[0].numpy().astype(np.uint16), np.array([32]))
        writer.finish()
    words = ("--load", tmp_path / "ckpt", "--output", tmp_path / "hf", "--verify", "--verify-data", tmp_path / "ids")
    result = script("to-hf", *words)
    assert result["verified"]["difference"] <= 1e-5 and result["verified"]["same_choice"] == 1.0
