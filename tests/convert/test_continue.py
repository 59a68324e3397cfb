"""A public model is imported, trained in a patch and a token stage, and exported again, all by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from megatron_patch.convert.architectures import shape_of
from megatron_patch.convert.flags import training_flags
from megatron_patch.engine.inference import load_model
from tests.config.test_resolve import ROOT, resolve
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import make_corpus, printed, start_program
from tests.tools.test_tools import tool

transformers = pytest.importorskip("transformers")
PLAN = [
    "--seq-length",
    "16",
    "--micro-batch-size",
    "2",
    "--global-batch-size",
    "12",
    "--patch-size",
    "4",
    "--patch-fraction",
    "0.5",
    "--train-tokens",
    "4608",
    "--lr",
    "3e-3",
    "--split",
    "90,10,0",
    "--eval-tokens",
    "512",
    "--seed",
    "7",
    "--shuffle-window-blocks",
    "16",
    "--num-workers",
    "1",
    "--bf16",
    "--zero-stage",
    "3",
]


@pytest.fixture(scope="module")
def journey(tmp_path_factory):
    """(folder, transformers' model, flags that from-hf printed)."""
    folder = tmp_path_factory.mktemp("journey")
    torch.manual_seed(0)
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        rope_parameters={**rope, "original_max_position_embeddings": 16}, tie_word_embeddings=True, bos_token_id=None, eos_token_id=63,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(str(folder / "public"), max_shard_size="20KB")
    result = json.loads(tool("convert_checkpoint", "from-hf", "--input", folder / "public", "--output", folder / "ckpt").splitlines()[-1])
    assert len(list((folder / "public").glob("*.safetensors"))) > 1
    return folder, model.eval(), result["flags"], make_corpus(folder / "walks")


def run(folder, name, *words):
    return run_ranks(start_program, 2, folder / f"{name}-logs", [*words, "--save", str(folder / name)])


def test_an_imported_model_trains_through_both_stages_and_is_exported(journey):
    folder, model, flags, corpus = journey
    assert run(folder, "run", *flags, *PLAN, "--data-path", corpus, "--load", str(folder / "ckpt"), "--finetune") == [0, 0]
    assert "new run from the weights of" in printed(folder / "run")
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["type"] == "step"]
    assert {record["patch_size"] for record in steps} == {1, 4}

    words = ("to-hf", "--load", folder / "run", "--output", folder / "trained", "--verify", "--max-shard-size", "30KB")
    result = json.loads(tool("convert_checkpoint", *words).splitlines()[-1])
    assert result["dtype"] == "bf16" and len(result["files"]) > 1 and result["verified"]["difference"] <= 1e-5
    trained = transformers.AutoModelForCausalLM.from_pretrained(str(folder / "trained"))
    assert trained.dtype == torch.bfloat16 and trained.config.rope_parameters == model.config.rope_parameters
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    ours = load_model(str(folder / "run")).model.to(torch.bfloat16).float()
    with torch.no_grad():
        expected = trained.float()(ids).logits
        torch.testing.assert_close(ours.logits(ids[..., None]), expected, rtol=0.0, atol=1e-5)
        assert float((model(ids).logits - expected).abs().max()) > 0.1, "it has learnt something"


def test_the_first_loss_is_that_of_the_imported_weights(journey):
    """One step at a learning rate of nearly 0 changes nothing: the held-out loss is transformers' own."""
    folder, model, flags, corpus = journey
    plan = "--seq-length 16 --global-batch-size 4 --train-tokens 64 --lr 1e-12 --split 90,10,0 --eval-tokens all"
    plan = plan.replace("all", "100k").split()
    words = [*flags, *plan, "--data-path", corpus, "--load", str(folder / "ckpt"), "--finetune"]
    assert run_ranks(start_program, 1, folder / "one-logs", [*words, "--save", str(folder / "one")]) == [0]
    evaluation = json.loads(tool("evaluate", "--load", folder / "one", "--data-path", corpus))
    result = json.loads(tool("evaluate", "--load", folder / "ckpt", "--data-path", corpus, "--seq-length", "16"))
    assert evaluation["loss"] == pytest.approx(result["loss"], rel=1e-6) and result["step"] == 0
    from megatron_patch.data.corpus import TokenCorpus

    tokens = torch.from_numpy(TokenCorpus([corpus]).read(0, TokenCorpus([corpus]).num_tokens)).long()
    samples = (len(tokens) - 1) // 16
    with torch.no_grad():
        logits = model(tokens[: samples * 16].view(samples, 16)).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1 : samples * 16 + 1])
    assert result["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_a_run_from_weights_that_is_started_again_resumes_its_own_checkpoint(journey):
    """The command of a job that its cluster restarts: the same flags, --finetune among them."""
    folder, _, flags, corpus = journey
    words = [*flags, *PLAN, "--data-path", corpus, "--load", str(folder / "ckpt"), "--finetune"]
    assert run(folder, "again", *words, "--exit-interval", "2") == [0, 0]
    assert run(folder, "again", *words) == [0, 0]
    assert "resumed from" in printed(folder / "again")
    losses = [
        [
            record["loss"]
            for record in map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
            if record["type"] == "step"
        ]
        for name in ("again", "run")
    ]
    assert losses[0] == losses[1] and len(losses[0]) > 4


def test_weights_alone_cannot_be_resumed(journey):
    folder, _, flags, corpus = journey
    assert run(folder, "resumed", *flags, *PLAN, "--data-path", corpus, "--load", str(folder / "ckpt")) == [4, 4]
    assert "only weights" in printed(folder / "resumed") and "--finetune" in printed(folder / "resumed")


def test_another_shape_than_the_imported_one_is_refused(journey):
    folder, _, flags, corpus = journey
    words = [*flags, "--rotary-base", "10000", *PLAN, "--data-path", corpus, "--load", str(folder / "ckpt"), "--finetune"]
    assert run(folder, "other", *words) == [4, 4]
    assert "--rotary-base 10000.0 (checkpoint: 500.0)" in printed(folder / "other")


FAMILIES = {
    "mistral": ({"architectures": ["MistralForCausalLM"], "sliding_window": 5}, "--zero-stage 1"),
    "qwen2": (
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        "--tensor-model-parallel-size 2",
    ),
    "smollm3": ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 0]}, "--pipeline-model-parallel-size 2 --zero-stage 1"),
    "olmo2": ({"architectures": ["Olmo2ForCausalLM"]}, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "olmo3": (
        {"architectures": ["Olmo3ForCausalLM"], "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
        "--zero-stage 3",
    ),
    "gemma2": (
        {
            "architectures": ["Gemma2ForCausalLM"],
            "sliding_window": 5,
            "head_dim": 16,
            "query_pre_attn_scalar": 9,
            "final_logit_softcapping": 3.0,
        },
        "--tensor-model-parallel-size 2",
    ),
    "gemma3_text": (
        {
            "architectures": ["Gemma3ForCausalLM"],
            "sliding_window": 5,
            "head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "--pipeline-model-parallel-size 2 --zero-stage 1",
    ),
    "llama": (
        {
            "architectures": ["LlamaForCausalLM"],
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        },
        "--zero-stage 3",
    ),
    "dots1": (
        {
            "architectures": ["Dots1ForCausalLM"],
            "sliding_window": None,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "n_shared_experts": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        },
        "--tensor-model-parallel-size 2 --moe-router-bias-update-rate 0.01",
    ),
    "qwen3_moe": (
        {"architectures": ["Qwen3MoeForCausalLM"], "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        "--pipeline-model-parallel-size 2 --zero-stage 1",
    ),
    "mixtral": ({"architectures": ["MixtralForCausalLM"], "sliding_window": 5, "num_local_experts": 4}, "--zero-stage 3"),
    "olmoe": (
        {"architectures": ["OlmoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 2},
        "--tensor-model-parallel-size 2 --sequence-parallel",
    ),
}


SLOW = {"mistral", "olmo3", "llama", "qwen3_moe", "mixtral", "olmoe"}
"""Families that differ from one of the others only in shape, or in rotary tables and routers that other tests compare."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in FAMILIES])
def test_a_family_with_windows_layers_without_rotation_yarn_or_experts_trains_through_both_stages(name, journey, tmp_path):
    """What the program has no use for, the padding token and dropout, is in the export of the trained model, too."""
    corpus = journey[3]
    special, layout = FAMILIES[name]
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 63, "pad_token_id": 62}
    config = transformers.AutoConfig.for_model(name, **sizes, **more, **special, attention_dropout=0.125)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(str(tmp_path / "public"))
    flags = json.loads(
        tool("convert_checkpoint", "from-hf", "--input", tmp_path / "public", "--output", tmp_path / "ckpt").splitlines()[-1]
    )
    plan = [word for word in PLAN if word not in ("--bf16", "--zero-stage", "3")]
    words = [*flags["flags"], *plan, *layout.split(), "--data-path", corpus, "--load", str(tmp_path / "ckpt"), "--finetune"]
    assert run(tmp_path, "run", *words) == [0, 0]
    words = ("to-hf", "--load", tmp_path / "run", "--output", tmp_path / "trained", "--verify")
    result = json.loads(tool("convert_checkpoint", *words).splitlines()[-1])
    assert result["verified"]["difference"] <= 1e-6
    trained = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "trained")).eval()
    assert type(trained) is type(model)
    same = ("rope_parameters", "sliding_window", "layer_types", "no_rope_layers", "pad_token_id", "attention_dropout")
    assert {key: getattr(trained.config, key, None) for key in same} == {key: getattr(config, key, None) for key in same}
    ids = torch.arange(5, 21)[None]
    with torch.no_grad():
        assert float((model(ids).logits - trained(ids).logits).abs().max()) > 0.1, "it has learnt something"


def test_the_example_has_the_shape_of_the_model_it_names():
    """The flags of Llama 3.2 1B's config.json, as published, and those of the example make the same model."""
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "hidden_act": "silu", "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0, "tie_word_embeddings": True, "max_position_embeddings": 131072,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3"},
    }  # fmt: skip
    path = ROOT / "examples" / "configs" / "continue_llama.yaml"
    assert yaml.safe_load(path.read_text())["finetune"] is True
    example = resolve("--config", str(path), "--dry-run", "--save", "run", ranks=8)
    words = ["--seq-length", "4096", "--global-batch-size", "8", "--train-tokens", "1M", "--dry-run"]
    assert resolve(*training_flags(shape_of(config, "x"), "llama"), *words).shape == example.shape
    assert Path(example.options.checkpoint.load).name == "llama-3.2-1b"
